"""Tests that need a GPU; ``tools/gpu/gpu.sh`` runs them. Without one they are skipped, and say so."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; not run on this machine")
