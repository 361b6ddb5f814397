"""The compiled extension: what ptxas says of every kernel, and that it loads without a driver and fails clearly."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from wam_kernels.adaln import kernel_cuda as adaln
from wam_kernels.runtime.cuda import extension

from .conftest import compiled_extension

# sm_90a is what is shipped; sm_80 shows what needs Hopper: kernels of sm90.cuh, whose bodies are empty there
ARCHITECTURES = ("sm_80", "sm_90a")
KERNELS = {  # of one architecture
    "adaln": 3 * 2 * 3,  # dtypes, directions, vectors of a thread
    "block_attention": 2 * 3 * 2,  # dtypes, kernels, head dims
    "cached_attention": 2 * (4 + 1),  # dtypes, head dims of the part kernel, the combine kernel
    "qk_norm_rope": 3 * 2 * 3,  # dtypes, directions, (width, units of a thread)
    "sum_kernel": 1,
}


def test_no_kernel_spills(compiled_kernels):
    ptxas_output = compiled_kernels.report
    for arch in ARCHITECTURES:
        kernels = re.findall(rf"Compiling entry function '(\S+)' for '{arch}'", ptxas_output)
        assert {name: sum(name in kernel for kernel in kernels) for name in KERNELS} == KERNELS, arch
        assert len(kernels) == sum(KERNELS.values()), arch
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_output)
    # device functions that were not inlined report too
    assert len(used) >= len(ARCHITECTURES) * sum(KERNELS.values())
    assert set(used) == {("0", "0", "0")}, ptxas_output
    # ptxas says so where it had to serialise wgmma
    assert "Potential Performance Loss" not in ptxas_output, ptxas_output


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wam_kernels._C", None)  # what Python does for a module that is not there
    with pytest.raises(RuntimeError, match="wam_kernels._C, the CUDA extension, cannot be loaded.*WAM_CUDA=1 pip"):
        extension()


def test_extension_loads_without_a_driver():
    assert compiled_extension() is extension()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the call would run on it")
def test_call_without_a_gpu_names_the_op_and_the_cuda_error(monkeypatch):
    compiled_extension()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    x, row, index = torch.zeros(1, 5, 64), torch.zeros(1, 1, 64), torch.zeros(5, dtype=torch.int32)
    message = r"^adaln_forward: the CUDA kernel could not be launched: cudaError\w+ \(.+\); it needs an NVIDIA GPU"
    with pytest.raises(RuntimeError, match=message):
        adaln.forward(x, None, None, row, row, None, None, None, None, None, index, 1e-6)
