"""Launch choices for cached_attention, and what is known about each. Nothing here has been timed on a GPU yet."""

MAX_D = 256

# Which backend impl=None takes for each device type.
DEFAULT_IMPL = {"cpu": "cpu", "cuda": "reference"}
