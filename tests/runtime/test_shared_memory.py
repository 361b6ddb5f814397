"""How much shared memory launches count on."""

import pytest
import torch

from wam_kernels.block_attention import config
from wam_kernels.runtime.shared_memory import BLOCK_BYTES, SMALL_BLOCK, block_bytes, compiling_for


@pytest.mark.parametrize("capability, expected", [((9, 0), 227 * 1024), ((8, 9), 99 * 1024), ((99, 0), SMALL_BLOCK)])
def test_the_current_device_says_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert block_bytes() == expected
    with compiling_for(80):
        assert block_bytes() == BLOCK_BYTES[80]
    assert block_bytes() == expected


def test_without_a_device_it_is_an_h100():
    assert block_bytes() == BLOCK_BYTES[90]


@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_small_blocks_get_no_more_rows_or_stages(name):
    choose = getattr(config, name)
    for itemsize, largest in ((2, 256), (4, 128)):
        for D in range(8, largest + 1, 8):
            for rows in (16, 32, 64, 128):
                large = choose(D, itemsize, rows)
                with compiling_for(86):
                    small = choose(D, itemsize, rows)
                assert small.rows <= large.rows and small.num_stages <= large.num_stages
                assert rows % small.rows == 0
