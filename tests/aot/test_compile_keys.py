"""No geometry may cost a compilation: Triton's specialisation key of a launch is the same for all of them."""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tests.geometries import libero, small
from wam_kernels import PROGRAMS, TileShape, compile_plan
from wam_kernels.block_attention import config, kernel_triton
from wam_kernels.masks.systems import lingbot_va_train


def launch_key(plan, B: int, H: int, D: int, side) -> str:
    """What Triton would look its compiled forward up by, with the arguments that ``forward`` passes."""
    kernel = kernel_triton.block_attention_fwd_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    # real strides without real memory: only addresses and numbers take part
    q = torch.empty_strided((B, plan.length, H, D), (plan.length * H * D, H * D, D, 1), dtype=torch.bfloat16)
    lse = torch.empty(B, H, plan.length)
    launch = config.forward(D, q.itemsize, side.shape.rows)
    _, constants = kernel_triton.launch_constants(side.tensors(), side.shape.step, q, q, launch)
    _, specialization, options = bind(
        q, q, q, q, lse, *side.tensors(), *kernel_triton.strides_of(q, q, q, q), plan.length, H, D**-0.5,
        **constants, debug=False,
    )  # fmt: skip
    return str((specialization, sorted(options.items())))


def test_one_key_for_all_geometries():
    plans = [compile_plan(small(p, history="full"), tile=libero_tile()) for p in PROGRAMS]
    plans += [compile_plan(small(chunk_size=c, window=w), tile=libero_tile()) for c in (1, 2, 3) for w in (1, 5, 64)]
    plans += [compile_plan(libero(c, 64, frames=f), tile=libero_tile()) for c in (2, 4) for f in (17, 40, 68)]
    packed = [[libero(4, 64, frames=9), small()]]
    plans += [compile_plan(packed, length=n, tile=libero_tile()) for n in (800, 801, 1024)]
    # dk and dv with a stop-gradient are the same kernel, also where all tiles of a stream are idle
    frozen = [("action", "video"), ("video", "video")]
    plans += [compile_plan(packed, tile=libero_tile(), stop_gradient=frozen[:n]) for n in (1, 2)]
    lengths = {p.length for p in plans}
    assert len(lengths) > 6 and any(n % 16 for n in lengths) and any(n % 16 == 0 for n in lengths)
    keys = {launch_key(plan, 1, 8, 64, side) for plan in plans for side in (plan.queries, plan.keys)}
    assert len(keys) == 1


def test_one_key_for_every_chunk_and_window_of_another_system():
    # LingBot-VA draws both anew at every training step
    sizes = {"samples": 2, "video_tokens": 8, "action_tokens": 4}
    plans = [
        compile_plan(
            lingbot_va_train(**sizes, video_frames=f, action_frames=f, chunk_size=c, window=w), tile=libero_tile()
        )
        for f in (9, 20)
        for c in (1, 2, 3, 4)
        for w in (4, 9, 64)
    ]
    assert len({launch_key(plan, 1, 8, 64, side) for plan in plans for side in (plan.queries, plan.keys)}) == 1


def test_a_key_is_sensitive():
    # the test above would pass on a constant: another head dim, or tile, is another kernel
    plan = compile_plan(small(), tile=libero_tile())
    other_tile = compile_plan(small())
    keys = {launch_key(plan, 1, 8, D, plan.queries) for D in (64, 128)}
    keys.add(launch_key(other_tile, 1, 8, 64, other_tile.queries))
    assert len(keys) == 3


def libero_tile():
    return TileShape(64, 64)
