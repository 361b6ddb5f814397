"""The fixtures of the training tests serve the demo's too."""

from tests.train.conftest import config, data, no_trial_of_threads, root

__all__ = ["config", "data", "no_trial_of_threads", "root"]
