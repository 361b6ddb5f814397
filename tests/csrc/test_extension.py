"""The compiled extension: every kernel for every architecture, no spills; what refuses a call, and how clearly."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wam_kernels.adaln import kernel_cuda as adaln
from wam_kernels.ops import Need
from wam_kernels.runtime import cuda
from wam_kernels.runtime.cuda import architectures, extension, refusal, refusal_on, runs_on

from .conftest import compiled_extension
from .sass import resources

ROOT = Path(__file__).parents[2]
KERNELS = {  # of every architecture of the list, and of sm_90a alone
    "adaln": (3 * 2 * 3, 0),  # dtypes, directions, vectors of a thread
    "block_attention": (0, 2 * 3 * 2),  # dtypes, kernels, head dims
    # dtypes; head dims of the part kernel, and the combine kernel; head dims of the part kernel by TMA
    "cached_attention": (2 * (4 + 1), 2 * 2),
    "qk_norm_rope": (3 * 2 * 3, 0),  # dtypes, directions, (width, units of a thread)
    "sum_kernel": (1, 0),
}


def test_every_architecture_has_every_kernel_and_none_spills(built):
    found = resources(built)
    for architecture in {*architectures(), "90a"}:
        names = [kernel.name for kernel in found if kernel.architecture == f"sm_{architecture}"]
        expected = {
            op: everywhere * (architecture in architectures()) + of_hopper * (architecture == "90a")
            for op, (everywhere, of_hopper) in KERNELS.items()
        }
        assert {op: sum(op in name for name in names) for op in expected} == expected, architecture
        assert len(names) == sum(expected.values()), architecture
    assert {kernel.architecture for kernel in found} == {f"sm_{a}" for a in (*architectures(), "90a")}
    assert [kernel for kernel in found if kernel.stack] == []


def test_the_default_build_is_for_every_gpu_that_the_tables_name():
    (listed,) = re.findall(r"^set\(WAM_CUDA_ARCHITECTURES (.*)\)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    assert Need.BUILT_FOR.value == "compute capability 8.x, 9.0, 10.x or 12.x"
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        assert any(runs_on(architecture, capability) for architecture in listed.split()), capability


@pytest.mark.parametrize(
    "architecture, runs, does_not",
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0), (12, 0)]),
        ("87", [(8, 7), (8, 9)], [(8, 0), (8, 6)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("100", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0)]),
    ],
)
def test_what_runs_where(architecture, runs, does_not):
    assert all(runs_on(architecture, capability) for capability in runs)
    assert not any(runs_on(architecture, capability) for capability in does_not)


def test_a_gpu_without_the_kernels_is_refused_by_name():
    built_for, hopper, others = ("80", "90a"), (Need.EXTENSION, Need.SM90), (Need.EXTENSION, Need.BUILT_FOR)
    assert refusal(hopper, built_for, (9, 0)) is None and refusal(others, built_for, (8, 9)) is None
    assert refusal(hopper, built_for, (8, 9)) == "needs sm_90; this device is sm_89; use impl='triton'"
    assert refusal(others, built_for, (12, 0), "NVIDIA X") == (
        "is built for sm_80, sm_90a; NVIDIA X is sm_120; use impl='triton', or build it with WAM_CUDA_ARCHITECTURES=120"
    )


@pytest.fixture
def forgotten_refusals():
    refusal_on.cache_clear()
    yield
    refusal_on.cache_clear()


def test_a_launch_asks_for_the_device_first(monkeypatch, forgotten_refusals):
    monkeypatch.setattr(cuda, "extension", lambda: SimpleNamespace(architectures="80 90a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (8, 9), 1: (12, 0)}[device.index])
    q = [SimpleNamespace(is_cuda=True, device=torch.device("cuda", i)) for i in range(2)]
    with pytest.raises(
        RuntimeError, match="impl='cuda' of block_attention needs sm_90; this device is sm_89; use impl"
    ):
        cuda.launch("block_attention_backward", q[0])
    with pytest.raises(RuntimeError, match="impl='cuda' of adaln is built for sm_80, sm_90a; this device is sm_120"):
        cuda.launch("adaln_forward", q[1])


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
