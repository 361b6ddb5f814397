"""The loops of the CUDA kernels are as fast as the committed prediction: a regression of one fails here."""

import pytest

from bench.static.kernels import cuda_kernels
from bench.static.sass import disassemble
from bench.suites.static import row_of
from tests.bench.test_static import committed, key, require_committed


def test_the_kernels_are_as_fast_as_committed(built):
    pytest.importorskip("triton", reason="cuobjdump comes with triton")
    found = list(cuda_kernels(disassemble(built)))
    assert {key(row_of(c)) for c in found} == {k for k in committed() if "cuda" in k}
    require_committed(found)
