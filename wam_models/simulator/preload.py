"""What the server that simulators' processes fork from imports once for all of them; it holds no renderer yet."""

from contextlib import suppress

with suppress(Exception):  # whatever is missing, the simulator that needs it says so
    import metaworld.env_dict  # noqa: F401
    import metaworld.policies  # noqa: F401
