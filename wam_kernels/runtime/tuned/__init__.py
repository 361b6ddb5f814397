"""Launch choices by device, one JSON file each; written by ``wam bench tune``, read by ``tuning``."""
