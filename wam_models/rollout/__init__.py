"""Predicting an episode chunk by chunk, and the policy that does it.

A prediction reads from top to bottom: ``episode`` (what a caller asks for and what is history), ``stages`` (the loops
that it takes), ``solver`` (the denoising steps of a loop), ``chunk_forward`` (the model over the history's keys and
values). ``layout`` has the sizes, ``latent_ring`` the accepted frames.
"""

from .config import RolloutConfig
from .episode import Candidate, Episode, RolloutEngine

__all__ = ["Candidate", "Episode", "RolloutConfig", "RolloutEngine"]
