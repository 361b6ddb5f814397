"""How much shared memory launches count on."""

import re
import shutil
import subprocess

import pytest
import torch
import triton.backends.nvidia

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


@pytest.mark.skipif(shutil.which("g++") is None, reason="NVIDIA's header is compiled with g++")
def test_the_vendor_says_the_same(tmp_path):
    """NVIDIA's occupancy calculator: the most that an SM gives to shared memory, of which a block may not have 1 KB."""
    (tmp_path / "most.cpp").write_text("""
        #include <cstdio>
        #include "cuda_occupancy.h"
        int main() {
          for (int capability = 80; capability < 130; ++capability) {
            cudaOccDeviceProp gpu;
            gpu.computeMajor = capability / 10, gpu.computeMinor = capability % 10;
            size_t most = 0, size = 0;
            for (size_t kilobytes = 1; kilobytes < 512; ++kilobytes)
              if (cudaOccAlignUpShmemSizeVoltaPlus(&(size = kilobytes * 1024), &gpu) == CUDA_OCC_SUCCESS) most = size;
            std::printf("%d %zu ", capability, most);
          }
        }
    """)
    header = f"{triton.backends.nvidia.__path__[0]}/include"
    subprocess.run(["g++", "-w", "-I", header, tmp_path / "most.cpp", "-o", tmp_path / "most"], check=True)
    found = re.findall(r"(\d+) (\d+)", subprocess.check_output([tmp_path / "most"], text=True))
    most = {int(capability): int(size) for capability, size in found}
    assert {capability: most[capability] - 1024 for capability in BLOCK_BYTES} == BLOCK_BYTES


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
