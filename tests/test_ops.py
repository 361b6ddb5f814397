"""An op is one folder and one row of ``wam_kernels.ops``: no part of one is missing, and tables say what rows say."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import wam_kernels
from bench import report, run
from tests.test_op_arguments import OPS as CALLED
from wam_kernels.block_attention.config import fits_triton
from wam_kernels.cached_attention import config as cached
from wam_kernels.ops import OPS, Need, Op
from wam_models import doctor

ROOT = Path(__file__).resolve().parent.parent
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def parts(op: Op) -> list[str]:
    package, suites = f"wam_kernels/{op.package}", ("aot", "gpu", "interpreter")
    modules = {"triton": "kernel_triton", "cuda": "kernel_cuda"}
    return [
        *(f"{package}/{name}" for name in ("README.md", "__init__.py", "config.py", "op.py")),
        *(f"{package}/{modules.get(impl, impl)}.py" for impl in op.backends),
        *(f"tests/{op.package}/{name}.py" for name in ("__init__", "checks", "test_op")),
        *(f"tests/{suite}/test_{op.package}.py" for suite in (*suites, *["csrc"] * ("cuda" in op.backends))),
        f"bench/bench_{op.package}.py",
    ]


@each_op
def test_no_part_is_missing(op):
    assert [part for part in parts(op) if not (ROOT / part).is_file()] == []
    assert {"reference", "cpu", "triton"} <= set(op.backends) and op.package in report.TABLES
    assert f"bench_{op.package}" in {module for modules in run.SUITES.values() for module in modules}
    script = (ROOT / "bench/gpu.sh").read_text()
    assert f" bench_{op.package}" in script and f"tests/gpu/test_{op.package}.py" in script


@each_op
def test_what_the_sanitizers_run_is_right(op):
    import_module(f"tests.{op.package}.checks").check_every_kernel("cpu", "cpu")


def test_every_folder_with_a_backend_is_one_op():
    folders = [path.parent.name for path in (ROOT / "wam_kernels").glob("*/reference.py")]
    assert sorted(folders) == sorted(op.package for op in OPS.values())


def test_every_public_function_that_takes_impl_is_of_one_op():
    public = [getattr(wam_kernels, name) for name in wam_kernels.__all__]
    taking = [f.__name__ for f in public if inspect.isfunction(f) and "impl" in inspect.signature(f).parameters]
    assert sorted(taking) == sorted(name for op in OPS.values() for name in op.functions)
    assert set(taking) <= set(CALLED)


@each_op
def test_defaults_are_backends(op):
    assert op.name in op.functions and set(op.default) == {"cpu", "cuda"}
    assert set(op.default.values()) <= set(op.backends) and op.default["cuda"] in op.gpu_backends


def test_the_doctor_can_look_for_every_need():
    assert set(doctor.NEEDS) == set(Need)


def test_limits_are_those_of_the_configs():
    for op in OPS.values():
        assert len({op.backends[impl].limit for impl in op.gpu_backends}) == 1
    assert OPS["block_attention"].backends["triton"].limit == "float32 up to D=128"
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
