"""Largest numbers that are accepted. Free of torch: the command line reads them before it knows what to load."""

LARGEST_INT64 = 2**63 - 1  # of any whole number that torch takes, a seed among them
LARGEST_INT32 = 2**31 - 1  # of a chunk or a window: no clip has so many frames, and draws stay within int64
LARGEST_SIZE = 2**20  # of a width: far above any model, and a matrix of such sizes still has a number of bytes
