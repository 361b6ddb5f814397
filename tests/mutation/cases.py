"""What every mutant runs: three plans in several orders, against float64.

    python -m tests.mutation.cases LIBRARY KERNEL

Ends with 1 and one line that tells what was wrong.
"""

import ctypes
import importlib.machinery
import importlib.util
import resource
import sys
from types import SimpleNamespace

import torch

from tests.block_attention.checks import NAMES, make_inputs, run
from tests.csrc.conftest import Machine
from tests.csrc.test_block_attention import run_cuda
from tests.geometries import libero, small
from wam_kernels import Plan, Ranges, compile_plan
from wam_kernels.block_attention import kernel_cuda
from wam_kernels.runtime import cuda

TOLERANCE = 0.02  # of the largest number
LIMIT_S = 90  # of CPU time: a wrong kernel may never end; a right one takes a quarter of it


def plans() -> list[tuple[Plan, int, int, int, int]]:
    """Plans with heads, key heads, head dim and orders."""
    holes = Ranges([(0, 90), (0, 40), (90, 200), (77, 155)], [(3, 207), (300, 321), (31, 409), (411, 455)], 220, 470)
    return [
        (compile_plan(libero(4, 64, 9)), 2, 1, 64, 4),
        (compile_plan([[small("decoupled_same_step"), holes]]), 1, 1, 40, 4),
        (compile_plan(libero(1, 4, 12)), 2, 2, 64, 4),
    ]


def wrong(plan: Plan, H: int, kv_heads: int, D: int, orders: int, machine: Machine, kernel: str) -> str:
    mask = plan.mask()[:, 0]
    inputs = make_inputs(plan, 1, H, D, torch.bfloat16, kv_heads=kv_heads)
    truth = run(plan, [t.double() for t in inputs], "reference")
    q, k, v, dout, dlse = inputs
    unseen, blind = ~mask.any(1), ~mask.any(2)
    # what lies behind a tensor's channels, and what no pair holds, is NaN
    wide = [torch.full((*t.shape[:-1], t.shape[-1] + 8), torch.nan, dtype=t.dtype) for t in (q, k, v, dout)]
    for w, t in zip(wide, (q, k, v, dout), strict=True):
        w[..., :D] = t
    q, k, v, dout = (w[..., :D] for w in wide)
    k[unseen] = v[unseen] = q[blind] = dout[blind] = torch.nan

    def forward() -> tuple:
        return kernel_cuda.forward(q, k, v, plan.boxes.queries.tensors(), True, D**-0.5)

    both = lambda: run_cuda(plan, [q, k, v, dout, dlse])  # noqa: E731
    got = machine.run(forward if kernel == "forward" else both, orders=orders)
    for name, a, t in zip(NAMES, got, truth, strict=False):
        finite = torch.isfinite(t)
        error = (a.double() - t)[finite].abs().max().item()
        if not error <= TOLERANCE * max(1.0, t[finite].abs().max().item()) or not torch.equal(
            torch.isfinite(a), finite
        ):
            return f"{name}: error {error:.2g}"
    return ""


def main() -> None:
    library, kernel = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 10))
    loader = importlib.machinery.ExtensionFileLoader("_C", library)
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    cuda.extension = lambda: module
    torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    torch.set_num_threads(1)
    machine = Machine("cpu", ctypes.CDLL(library))
    for number, (plan, H, kv_heads, D, orders) in enumerate(plans()):
        try:
            reported = wrong(plan, H, kv_heads, D, orders, machine, kernel)
        except (AssertionError, RuntimeError) as error:
            reported = str(error).splitlines()[0].removeprefix("sm90 emulation: ")
        if reported:
            print(f"{reported} (plan {number})")
            sys.exit(1)


if __name__ == "__main__":
    main()
