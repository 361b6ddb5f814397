"""The GPU backends of an op that has both, as values of ``impl``; CUDA is skipped where it was not built."""

from importlib.util import find_spec

import pytest

_NOT_BUILT = find_spec("wam_kernels._C") is None
IMPLS = ["triton", pytest.param("cuda", marks=pytest.mark.skipif(_NOT_BUILT, reason="wam_kernels._C was not built"))]
