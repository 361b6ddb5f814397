"""An op is one folder and one row of ``wam_kernels.ops``: no part of one is missing, and tables say what rows say."""

import inspect
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import wam_kernels
from bench.registry import SUITES
from tests import test_modes, test_op_arguments
from tests.aot.test_launchers import CALLS
from tests.csrc.test_extension import KERNELS
from tests.transforms.checks import OPS as TRANSFORMED
from tests.transforms.test_func import INFERENCE
from wam_kernels.block_attention.config import MAX_CUDA_D, fits_triton
from wam_kernels.cached_attention import config as cached
from wam_kernels.ops import OPS, Need, Op
from wam_kernels.runtime.backends import MODULES
from wam_models import doctor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ("params.h", "launch.cpp", "bindings.h")  # of an op with CUDA kernels, beside the kernels themselves
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def files(op: Op) -> list[str]:
    package, suites = f"wam_kernels/{op.package}", ["interpreter", "aot", "gpu", *["csrc"] * ("cuda" in op.backends)]
    # the name of the file tells CMake which architectures it is for
    hopper = "cuda" in op.backends and Need.SM90 in op.backends["cuda"].needs
    kernels = "kernels_sm90a.cu" if hopper else "kernels.cu"
    return [
        *(f"{package}/{name}" for name in ("README.md", "__init__.py", "config.py", "op.py", "reference.py")),
        *(f"{package}/{MODULES[impl][1:]}.py" for impl in op.backends if impl != "reference"),
        *(f"tests/{op.package}/{name}.py" for name in ("__init__", "checks", "test_op")),
        *(f"tests/{suite}/test_{op.package}.py" for suite in suites),
        *(f"csrc/{op.package}/{name}" for name in (*CSRC, kernels) if "cuda" in op.backends),
        f"bench/suites/{op.package}.py",
    ]


def lists(op: Op) -> dict[str, bool]:
    """The lists that do not follow from the rows, because they say more than a row; whether ``op`` is in each."""
    suite, script = SUITES.get(op.package), (ROOT / "tools/gpu/gpu.sh").read_text()
    micro = (ROOT / "bench/micro/test_micro.py").read_text()
    return {
        "wam_kernels.__all__": set(op.functions) <= set(wam_kernels.__all__),
        "tests.test_op_arguments.OPS": set(op.functions) <= set(test_op_arguments.OPS),
        "tests.test_modes.ENTRIES": set(op.functions) <= set(test_modes.ENTRIES),
        "tests.transforms": op.name in {*(case.name for case in TRANSFORMED.values()), *INFERENCE},
        "tests.aot.test_launchers.CALLS": f"{op.package}.forward" in CALLS,
        "bench.registry.SUITES": suite is not None and suite.gpu_seconds is not None,
        "bench/micro/test_micro.py": all(f"{function}(" in micro for function in op.functions),
        "tools/gpu/gpu.sh": f"tests/gpu/test_{op.package}.py" in script,
    }


def csrc_lists(op: Op) -> dict[str, bool]:
    """The same for an op with CUDA kernels."""
    module, readme = ((ROOT / "csrc" / name).read_text() for name in ("module.cpp", "README.md"))
    bound = f'#include "{op.package}/bindings.h"' in module and f"wam::{op.package}_bindings::" in module
    return {
        "csrc/module.cpp": bound,
        "csrc/README.md": f"\n| `{op.package}/` |" in readme,
        "tests.csrc.test_extension.KERNELS": op.package in KERNELS,
    }


def missing(op: Op) -> list[str]:
    absent = [part for part in files(op) if not (ROOT / part).is_file()]
    holding = lists(op) | (csrc_lists(op) if "cuda" in op.backends else {})
    return absent + [name for name, holds_it in holding.items() if not holds_it]


@each_op
def test_no_part_is_missing(op):
    assert missing(op) == [] and {"reference", "cpu", "triton"} <= set(op.backends)


def test_a_row_alone_is_told_every_part():
    alone = replace(OPS["qk_norm_rope"], name="new_op", package="new_op", functions=("new_op",))
    assert missing(alone) == [*files(alone), *lists(alone), *csrc_lists(alone)] and "cuda" in alone.backends


@each_op
def test_what_the_sanitizers_run_is_right(op):
    import_module(f"tests.{op.package}.checks").check_every_kernel("cpu", "cpu")


def test_every_folder_with_a_backend_is_one_op():
    folders = [path.parent.name for path in (ROOT / "wam_kernels").glob("*/reference.py")]
    assert sorted(folders) == sorted(op.package for op in OPS.values())


def test_every_folder_of_csrc_is_of_an_op_with_a_cuda_backend():
    folders = {path.parent.name for path in (ROOT / "csrc").glob("*/*")} - {"common"}
    assert folders == {op.package for op in OPS.values() if "cuda" in op.backends}


def test_every_public_function_that_takes_impl_is_of_one_op():
    public = [getattr(wam_kernels, name) for name in wam_kernels.__all__]
    taking = [f.__name__ for f in public if inspect.isfunction(f) and "impl" in inspect.signature(f).parameters]
    taking.remove("compile_plan")  # no op: it makes the form of a plan that a backend of block_attention walks
    assert sorted(taking) == sorted(name for op in OPS.values() for name in op.functions)


@each_op
def test_defaults_are_backends(op):
    assert op.name in op.functions and set(op.default) == {"cpu", "cuda"}
    assert set(op.default.values()) <= set(op.backends) and op.default["cuda"] in op.gpu_backends


def test_the_doctor_can_look_for_every_need():
    assert set(doctor.NEEDS) == set(Need)


def test_limits_are_those_of_the_configs():
    attention = OPS["block_attention"].backends
    assert attention["triton"].limit == "float32 up to D=128" and attention["cuda"].limit == f"D up to {MAX_CUDA_D}"
    assert fits_triton(128, 4) and not fits_triton(136, 4) and fits_triton(256, 2)
    limit = f"D up to {cached.MAX_KERNEL_D} and up to {cached.MAX_GROUPS} groups"
    assert OPS["cached_attention"].backends["cuda"].limit == limit


SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def support_table(op: Op) -> str:
    lines = ["| impl | dtypes | limit | needs | default for |", "| --- | --- | --- | --- | --- |"]
    for impl, backend in op.backends.items():
        names = (str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        devices = ", ".join(device.upper() for device, default in op.default.items() if default == impl)
        cells = (
            f"`{impl}`",
            ", ".join(SHORT.get(name, name) for name in names),
            backend.limit or "-",
            ", ".join(need.value for need in backend.needs) or "-",
            devices or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@each_op
def test_the_readme_has_the_table_of_the_row(op):
    readme = (ROOT / "wam_kernels" / op.package / "README.md").read_text()
    (section,) = re.findall(r"^## Backends\n\n((?:\|.*\n)+)", readme, re.MULTILINE)
    assert section.rstrip("\n") == support_table(op)
