"""Predicting an episode chunk by chunk, and the policy that does it.

A prediction reads from top to bottom: ``engine`` (where an episode begins), ``episode`` (what a caller asks for and
what is history), ``requests`` (checks of what is given), ``candidates`` (what comes back), ``stages`` (the loops that
it takes), ``schedule`` (noise levels and solvers), ``solver`` (the steps of a chunk), ``skipping`` (which of them are
left out), ``chunk_forward`` (the model over the history's keys and values), ``full_forward`` (over all that the chunk
attends to, without a cache). ``layout`` has the sizes, ``latent_ring`` the accepted frames. ``robots`` has one batch
act for many of them.
"""

from .candidates import Candidate, best
from .config import RolloutConfig
from .engine import RolloutEngine
from .episode import Episode
from .schedule import Schedule

__all__ = ["Candidate", "Episode", "RolloutConfig", "RolloutEngine", "Schedule", "best"]
