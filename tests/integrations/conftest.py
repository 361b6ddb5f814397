"""Fixtures of the integrations' tests."""

import pytest
import torch.distributed as dist


@pytest.fixture
def process_group():
    """A group of this process alone, as sharding and DDP need one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
