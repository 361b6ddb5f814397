"""Fixtures of the integrations' tests."""

import pytest
import torch.distributed as dist

from wam_kernels.integrations import _kernels


@pytest.fixture
def process_group():
    """A group of this process alone, as sharding and DDP need one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_call_is_short(monkeypatch):
    """Models of a test are tiny; without this their calls would all be dense ones. test_never_slower.py has those."""
    monkeypatch.setattr(_kernels, "DENSE_PAIRS", 0)
