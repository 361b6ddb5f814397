"""torch.func and second order through the Triton kernels, run by Triton's interpreter."""

import pytest

from tests.transforms.checks import OPS, REFUSED, RIGHT, check_refused, check_right

CASES = [OPS[name] for name in ("block_attention", "gate-and-norm", "qk_norm_rope")]


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)
def test_right(op):
    check_right(RIGHT["vmap-of-grad"], op, "triton")


@pytest.mark.parametrize("transform", ["jvp-no-grad", "create-graph"])
@pytest.mark.parametrize("op", CASES, ids=lambda op: op.name)
def test_refused(op, transform):
    check_refused(REFUSED[transform], op, "triton")
