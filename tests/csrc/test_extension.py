"""The compiled extension: what ptxas says of every kernel, and that it loads without a driver and fails clearly."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wam_kernels.adaln import kernel_cuda as adaln
from wam_kernels.runtime.cuda import extension

from .conftest import ROOT, SOURCES, compiled_extension

ARCHITECTURES = ("sm_80", "sm_90a")  # sm_90a is what is shipped; sm_80 shows that nothing needs Hopper yet
KERNELS = {  # of one architecture
    "adaln": 3 * 2 * 3,  # dtypes, directions, vectors of a thread
    "cached_attention": 2 * (4 + 1),  # dtypes, head dims of the part kernel, the combine kernel
    "qk_norm_rope": 3 * 2 * 3,  # dtypes, directions, (width, units of a thread)
    "sum_kernel": 1,
}


@pytest.fixture(scope="module")
def ptxas_output(tmp_path_factory) -> str:
    """Compiles the kernels as the install does, for a second architecture too, with the assembler told to report.

    In two units instead of one a file: half of a file's time goes to the headers that all share.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    import pybind11

    build = tmp_path_factory.mktemp("ptxas")
    kernels = [source for source in SOURCES if source.suffix == ".cu"]
    # cmake and ninja of this environment come first, as in an install
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
                 "-DCMAKE_CUDA_FLAGS=-Xptxas -v -gencode arch=compute_80,code=sm_80",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                 "-DCMAKE_UNITY_BUILD=ON", f"-DCMAKE_UNITY_BUILD_BATCH_SIZE={-(-len(kernels) // 2)}"]  # fmt: skip
    objects = [f"CMakeFiles/_C.dir/Unity/unity_{i}_cu.cu.o" for i in range(2)]
    output = ""
    for command in (configure, ["ninja", "-C", build, "-j2", *objects]):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        output += done.stdout
    return output


def test_no_kernel_spills(ptxas_output):
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
