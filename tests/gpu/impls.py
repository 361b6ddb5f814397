"""The GPU backends of an op, a test's parameter; what needs the extension is skipped where that was not built."""

from importlib.util import find_spec

import pytest

from wam_kernels.ops import OPS, Need

_NOT_BUILT = find_spec("wam_kernels._C") is None


def each_impl(op: str) -> pytest.MarkDecorator:
    skip = pytest.mark.skipif(_NOT_BUILT, reason="wam_kernels._C was not built")
    backends = ((impl, OPS[op].backends[impl].needs) for impl in OPS[op].gpu_backends)
    return pytest.mark.parametrize(
        "impl", [pytest.param(impl, marks=[skip] if Need.EXTENSION in needs else []) for impl, needs in backends]
    )
