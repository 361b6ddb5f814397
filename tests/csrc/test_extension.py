"""The compiled extension: what ptxas says of every kernel, and that it loads without a driver and fails clearly."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from wam_kernels._cuda import extension

from .ada_layer_norm import DTYPES, SHAPES, assert_correct, make_case

ROOT = Path(__file__).parents[2]


def import_extension():
    try:
        return import_module("wam_kernels._C")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}: it is built at install time where nvcc is found, see setup.py")


@pytest.fixture(scope="module")
def ptxas_output(tmp_path_factory) -> str:
    """Compiles csrc exactly as the install does, with the assembler told to report."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    import pybind11

    build = tmp_path_factory.mktemp("ptxas")
    # cmake and ninja of this environment come first, as in an install
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_CUDA_FLAGS=-Xptxas -v",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]  # fmt: skip
    output = ""
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        output += done.stdout
    return output


def test_no_kernel_spills(ptxas_output):
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_90a'", ptxas_output)
    assert sum("ada_layer_norm" in name for name in kernels) == len(DTYPES)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_output)
    assert len(used) >= len(kernels)  # device functions that were not inlined report too
    assert set(used) == {("0", "0", "0")}, ptxas_output
    # ptxas says so where it had to serialise wgmma
    assert "Potential Performance Loss" not in ptxas_output, ptxas_output


def test_cmake_lists_every_source():
    listed = set(re.findall(r"csrc/\S+\.(?:cpp|cu)", (ROOT / "CMakeLists.txt").read_text()))
    on_disk = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")}
    assert listed == on_disk


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wam_kernels._C", None)  # what Python does for a module that is not there
    with pytest.raises(RuntimeError, match="wam_kernels._C, the CUDA extension, cannot be loaded.*WAM_CUDA=1 pip"):
        extension()


def test_extension_loads_without_a_driver():
    assert import_extension() is extension()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the call would run on it")
def test_call_without_a_gpu_names_the_op_and_the_cuda_error():
    module = import_extension()
    case = make_case(5, 64, (2, 3), "float32")
    message = r"^ada_layer_norm: the CUDA kernel could not be launched: cudaError\w+ \(.+\); it needs an NVIDIA GPU"
    with pytest.raises(RuntimeError, match=message):
        module.ada_layer_norm(**case.arguments(), stream=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": 12}, "ada_layer_norm: channels must be a multiple of 8 from 8 to 8192, got 12"),
        ({"dtype": "float64"}, "ada_layer_norm: dtype must be 'bfloat16', 'float16' or 'float32', got 'float64'"),
    ],
)
def test_refusals_are_value_errors(change, message):  # runs without a GPU: the checks come before the launch
    module = import_extension()
    case = make_case(5, 64, (5,), "float32")
    with pytest.raises(ValueError, match=message):
        module.ada_layer_norm(**case.arguments() | change, stream=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, channels, frame_rows", SHAPES)
def test_ada_layer_norm_on_the_gpu(rows, channels, frame_rows, dtype):
    module = import_extension()
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = make_case(rows, channels, frame_rows, dtype, device="cuda")
    module.ada_layer_norm(**case.arguments(), stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert_correct(case)
