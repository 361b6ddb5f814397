"""What holds for the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """What is imported by now, a million objects, is not looked through again by each collection of garbage."""
    gc.collect()
    gc.freeze()
