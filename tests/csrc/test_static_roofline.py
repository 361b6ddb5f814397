"""The loops of the CUDA kernels are as fast as the committed prediction: a regression of one fails here."""

from bench.static.kernels import cuda_kernels
from bench.static.norms import cuda_rows
from bench.suites.static import row_of, row_of_norm
from tests.bench.test_static import committed, key, require_committed


def test_the_kernels_are_as_fast_as_committed(machine_code):
    found = [*map(row_of, cuda_kernels(machine_code)), *map(row_of_norm, cuda_rows(machine_code))]
    assert {key(row) for row in found} == {k for k in committed() if "cuda" in k}
    require_committed(found)
