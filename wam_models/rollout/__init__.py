"""Predicting an episode chunk by chunk, and the policy that does it."""
