"""The adaLN ops on the CPU: the cpu backend against the formulas written out, registration, refusals."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from tests.adaln.checks import (
    FULL,
    LAYOUTS,
    ROW_DTYPES,
    SHAPES,
    SHARED,
    UNEVEN,
    VARIANTS,
    check_against_reference,
    check_fused_equals_parts,
    check_layout,
    check_nan_stays,
    check_one_gradient,
    check_row_dtypes,
    check_same_bits,
    make_inputs,
    run,
)
from tests.integrations.counts import python_calls
from wam_kernels.adaln import ada_layer_norm, config, gate_residual_ada_layer_norm
from wam_kernels.frame_index import FrameIndex
from wam_kernels.ops import OPS

each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant(variant, dtype):
    check_against_reference(variant, SHARED, make_inputs(SHARED, 2, 72, dtype), "cpu")


@pytest.mark.parametrize("index, B, D, dtype", SHAPES)
def test_shapes_and_dtypes(index, B, D, dtype):
    for variant in (FULL, VARIANTS["gate-and-affine-norm"]):
        check_against_reference(variant, index, make_inputs(index, B, D, dtype), "cpu")


def test_float64():
    check_against_reference(FULL, UNEVEN, make_inputs(UNEVEN, 2, 64, torch.float64), None)


@pytest.mark.parametrize("chunk, long_run", [(64, 1 << 30), (640, 1 << 30), (640, 64), (1 << 20, 64)])
@pytest.mark.parametrize("name", ["gate-and-norm", "gate-and-affine-norm"])
def test_chunks_of_the_cpu_backend(monkeypatch, name, chunk, long_run):
    # chunks of one token, of a part of a run, of some runs, of a whole run
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(config, "CPU_CHUNK", chunk)
    monkeypatch.setattr(config, "CPU_LONG_RUN", long_run)
    for index in (UNEVEN, SHARED, FrameIndex.from_runs([4] * 5)):
        check_against_reference(VARIANTS[name], index, make_inputs(index, 2, 64, torch.bfloat16), "cpu")
    for index in (FrameIndex.from_runs([4] * 5), FrameIndex.per_token(20)):
        inputs = make_inputs(index, 2, 64, torch.bfloat16, rows=torch.bfloat16)
        check_against_reference(VARIANTS[name], index, inputs, "cpu")


def test_no_float32_of_the_size_of_the_tokens():
    """Rows a token in bf16: neither the forward nor the backward makes a float32 tensor of their size."""
    index = FrameIndex.per_token(4096)
    inputs = make_inputs(index, 1, 256, torch.bfloat16, rows=torch.bfloat16)
    wide = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple | list) else [out]
            wide.extend(
                (str(func), t.shape)
                for t in results
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.numel() >= inputs["x"].numel()
            )
            return out

    with Recorder():
        for name in ("norm", "gate-and-norm", "gate-alone"):
            run(VARIANTS[name], index, inputs, "cpu")
    assert not wide


@pytest.mark.parametrize("index, dtype, rows", ROW_DTYPES)
def test_rows_of_their_own_dtype(index, dtype, rows):
    check_row_dtypes(index, dtype, rows, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_never_changes_the_answer(layout):
    check_layout(layout, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_its_parts(dtype):
    check_fused_equals_parts(SHARED, make_inputs(SHARED, 2, 72, dtype), "cpu")


def test_only_one_output_used():
    check_one_gradient(SHARED, make_inputs(SHARED, 2, 64, torch.float32), "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("index", [UNEVEN, SHARED], ids=["uneven", "shared"])
def test_nan_stays(index, impl):
    check_nan_stays(index, impl)


def test_same_bits_from_run_to_run():
    check_same_bits(SHARED, make_inputs(SHARED, 2, 72, torch.float32), "cpu")


def test_nothing_of_the_size_of_the_tokens_is_saved():
    index = FrameIndex.from_runs([64] * 8)
    inputs = make_inputs(index, 1, 64, torch.bfloat16)
    x, y = (inputs[n].requires_grad_() for n in ("x", "y"))
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        r, _ = gate_residual_ada_layer_norm(x, y, gate, shift, scale, index, impl="cpu")
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {r.data_ptr(), y.data_ptr()}


@each_variant
def test_small_calls_take_pytorchs_own_ops(variant, monkeypatch):
    inputs = make_inputs(UNEVEN, 2, 16, torch.float32)

    def ops_of_a_run(impl):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs = run(variant, UNEVEN, inputs, impl)
        return {event.key for event in profile.key_averages() if event.key.startswith("wam::")}, outputs

    names, small = ops_of_a_run(None)
    expected, fused = ops_of_a_run("cpu")
    assert not names and expected
    for name, value in fused.items():
        torch.testing.assert_close(small[name], value, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("wam_kernels.adaln.op._ROW", replace(OPS["ada_layer_norm"], small=inputs["x"][0].numel() - 1))
    assert ops_of_a_run(None)[0] == expected


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_calls_without_a_graph_equal_the_reference(variant, dtype):
    for index in (UNEVEN, FrameIndex.from_runs([4, 4]), FrameIndex.per_sample(5), FrameIndex.per_token(3)):
        inputs = make_inputs(index, 2, 16, dtype)
        # heads before samples, as some attention leaves them
        inputs["y"] = inputs["y"].transpose(0, 1).contiguous().transpose(0, 1) if index is UNEVEN else inputs["y"]
        shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
        tables = inputs["table"].unbind(0) if variant.tables else [None] * 3
        rows = {"shift": shift, "scale": scale} if variant.norm == "adaptive" else {}
        options = {"shift_table": tables[0], "scale_table": tables[1]} if rows else {}
        if variant.norm == "affine":
            options |= {name: inputs[name] for name in ("weight", "bias")}

        def call(impl, inputs=inputs, gate=gate, tables=tables, rows=rows, options=options, index=index):
            if not variant.residual:
                return (ada_layer_norm(inputs["x"], **rows, index=index, **options, impl=impl),)
            gated = {"gate": gate, "gate_table": tables[2]} if variant.gate else {"gate": None}
            rows = rows or {"shift": None, "scale": None}
            return gate_residual_ada_layer_norm(
                inputs["x"], inputs["y"], **gated, **rows, index=index, **options, impl=impl
            )

        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        with torch.no_grad():
            for small, expected in zip(call(None), call("reference"), strict=True):
                assert (small is None) == (expected is None)
                if small is not None:
                    assert small.is_contiguous() and small.dtype == dtype
                    torch.testing.assert_close(small, expected, **close)


@torch.no_grad()
def test_one_row_a_sample_has_the_same_bits_alone_and_in_a_batch():
    index = FrameIndex.per_sample(40)
    inputs = make_inputs(index, 3, 72, torch.float32)
    shift, scale, *_ = inputs["t_proj"].unbind(2)
    together = ada_layer_norm(inputs["x"], shift, scale, index)
    for b in range(3):
        alone = ada_layer_norm(inputs["x"][b : b + 1], shift[b : b + 1], scale[b : b + 1], index)
        assert torch.equal(alone[0], together[b])


def test_a_small_call_costs_few_calls():
    """They cost most of it, and are the same on every machine."""
    index = FrameIndex.from_runs([32, 32])
    inputs = make_inputs(index, 1, 64, torch.float32)
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
    ada_layer_norm(inputs["x"], shift, scale, index)  # makes what is cached
    norm = python_calls(lambda: ada_layer_norm(inputs["x"], shift, scale, index))
    gated = python_calls(lambda: gate_residual_ada_layer_norm(inputs["x"], inputs["y"], gate, shift, scale, index))
    assert norm <= 20 and gated <= 32, (norm, gated)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16])
def test_one_row_a_sample_is_pytorchs_layer_norm(batch, rows, monkeypatch):
    monkeypatch.setattr("wam_kernels.adaln.op._ROW", replace(OPS["ada_layer_norm"], small=0))
    index = FrameIndex.per_sample(40)
    inputs = make_inputs(index, batch, 72, torch.float32, rows=rows)
    plain, fused = (run(VARIANTS["norm"], index, inputs, impl) for impl in (None, "cpu"))
    for name, value in fused.items():
        close = {"rtol": 1e-5, "atol": 1e-4} if value.dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(plain[name], value, **close)
    shift, scale, *_ = inputs["t_proj"].unbind(2)
    leaves = [t.detach().requires_grad_() for t in (inputs["x"], shift, scale)]
    assert "NativeLayerNorm" in type(ada_layer_norm(*leaves, index).grad_fn).__name__ or batch > 1


@each_variant
def test_registration(variant):
    calls = []
    op = torch.ops.wam.gate_residual_norm

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op.default:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    inputs = make_inputs(SHARED, 2, 16, torch.float32)
    with Recorder():
        run(variant, SHARED, inputs, "cpu")
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in calls[0]]
    torch.library.opcheck(op.default, args)
    for a in args:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a.requires_grad_()
    torch.library.opcheck(op.default, args)


def test_compiles_whole_and_only_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, t_proj, table, index, impl=None):
        rows, tables = t_proj.unbind(2), table.unbind(0)
        of_norm = {"shift_table": tables[0], "scale_table": tables[1]}
        h = ada_layer_norm(x * 2, rows[0], rows[1], index, **of_norm, impl=impl)
        return gate_residual_ada_layer_norm(h, y, rows[2], rows[3], rows[4], index, gate_table=tables[2], impl=impl)

    compilations = []
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([3, 5, 20, 1, 7], [7, 7], [40, 1, 2, 3, 4], [2, 2, 2, 9]):
        index = FrameIndex.from_runs(lengths)
        inputs = make_inputs(index, 2, 64, torch.float32)
        leaves = [inputs[n].requires_grad_() for n in ("x", "y", "t_proj", "table")]
        results = []
        for f in (compiled, partial(step, impl="cpu")):
            outputs = f(*leaves, index)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (inputs["dr"], inputs["dh"]))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        compilations.append(counter.frame_count)
    # the first index may compile with numbers that happen to be equal; the second learns which of them change
    assert len(set(compilations[1:])) == 1


def test_activation_checkpointing():
    inputs = make_inputs(SHARED, 2, 64, torch.bfloat16)
    x = inputs["x"].requires_grad_()
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)

    def block(x):
        r, h = gate_residual_ada_layer_norm(x, inputs["y"], gate, shift, scale, SHARED)
        return r + h

    expected = torch.autograd.grad(block(x), x, inputs["dr"])[0]
    assert torch.equal(torch.autograd.grad(checkpoint(block, x, use_reentrant=False), x, inputs["dr"])[0], expected)


def good_call() -> dict:
    inputs = make_inputs(UNEVEN, 2, 64, torch.bfloat16)
    shift, scale, gate, *_ = inputs["t_proj"].unbind(2)
    return {"x": inputs["x"], "y": inputs["y"], "gate": gate, "shift": shift, "scale": scale, "index": UNEVEN}


D64 = torch.zeros(64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"index": None}, TypeError, "index must be a FrameIndex, got NoneType; see FrameIndex.from_tensor"),
        ({"index": FrameIndex.per_sample(54)}, ValueError, "x must have S=54 tokens like index, got 26; make an index"),
        ({"index": FrameIndex.per_sample(26)}, ValueError, "gate, shift, scale must have F=1 rows like index, got 5"),
        ({"index": UNEVEN.to("meta")}, ValueError, "index must be on cpu like x, got meta; use index.to"),
        ({"y": None}, ValueError, "y must be a tensor, got None; without a residual use ada_layer_norm"),
        ({"y": torch.zeros(2, 26, 64)}, ValueError, "y must be torch.bfloat16 on cpu, got torch.float32 on cpu; use"),
        ({"y": torch.zeros(2, 26, 32)}, ValueError, r"y must have shape \[B=2, S=26, D=64\], got \[2, 26, 32\]"),
        ({"gate": torch.zeros(2, 5, 64).double()}, ValueError, "gate must be torch.float32 or .*, got torch.float64"),
        (
            {"shift": torch.zeros(2, 5, 64).half()},
            ValueError,
            "shift must be torch.float32 like scale, got torch.float16",
        ),
        ({"scale": None}, ValueError, "scale must be given with shift, got None; give both or neither"),
        ({"weight": D64, "bias": D64}, ValueError, "weight must be None with scale, got both"),
        ({"shift": None, "scale": None, "weight": D64}, ValueError, "bias must be given with weight, got None"),
        ({"gate": None, "gate_table": D64}, ValueError, "gate_table must be None without gate, got a tensor; leave"),
        ({"gate_table": D64.double()}, ValueError, "gate_table must be torch.float32 or .*, got torch.float64"),
        (
            {"shift": None, "scale": None, "weight": D64.half(), "bias": D64},
            ValueError,
            "weight must be torch.float32 or torch.bfloat16 on cpu, got torch.float16",
        ),
        ({"impl": "liger"}, ValueError, "impl must be None or one of .*got 'liger'"),
        ({"impl": "triton"}, ValueError, r"impl='triton' needs CUDA tensors \(or TRITON_INTERPRET=1\), got cpu"),
        ({"impl": "cuda"}, ValueError, "impl='cuda' needs CUDA tensors, got cpu; use impl=None"),
    ],
)
def test_refusals_name_the_argument(change, error, message):
    with pytest.raises(error, match=f"gate_residual_ada_layer_norm: {message}"):
        gate_residual_ada_layer_norm(**(good_call() | change))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x", (1, 26, 64)), ("y", (2, 1, 64)), ("y", (2, 26, 1)), ("y", (26, 64)), ("gate", (2, 1, 64)),
        ("gate", (1, 5, 64)), ("shift", (2, 5, 1)), ("shift", (5, 64)), ("scale", (1, 5, 64)), ("scale", (1,)),
        ("gate_table", (1,)), ("shift_table", ()), ("scale_table", (1, 64)), ("weight", (1,)), ("bias", (1, 64)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_pytorch_would_broadcast_is_refused(name, shape, dtype):
    """The quick look at a small call lets nothing through that the full checks refuse."""
    call = {k: v.to(dtype) if k in ("x", "y") else v for k, v in good_call().items()}
    if name in ("weight", "bias"):
        call |= {"shift": None, "scale": None, "weight": D64, "bias": D64}
    gate_residual_ada_layer_norm(**call)
    call |= {name: torch.zeros(shape, dtype=call[name].dtype if name in call else torch.float32)}
    with pytest.raises(ValueError, match=r"gate_residual_ada_layer_norm: .* must have "):
        gate_residual_ada_layer_norm(**call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf, "1e-6", True, None])
def test_small_calls_refuse_what_is_no_eps(eps, dtype):
    call = good_call() | {"eps": eps}
    call |= {name: call[name].to(dtype) for name in ("x", "y")}
    with pytest.raises(ValueError, match="gate_residual_ada_layer_norm: eps must be a "):
        gate_residual_ada_layer_norm(**call)


@pytest.mark.parametrize("D", [4, 12, 8200])
def test_refuses_widths_outside_its_range(D):
    rows = torch.zeros(1, 1, D)
    with pytest.raises(ValueError, match=f"ada_layer_norm: D must be a multiple of 8 from 8 to 8192, got {D}"):
        ada_layer_norm(torch.zeros(1, 3, D), rows, rows, FrameIndex.per_sample(3))


def test_a_norm_needs_its_modulation():
    call = good_call()
    for name in ("shift", "scale"):
        arguments = {n: call[n] for n in ("x", "shift", "scale", "index")} | {name: None}
        with pytest.raises(TypeError, match=f"ada_layer_norm: {name} must be a torch.Tensor, got NoneType"):
            ada_layer_norm(**arguments)


def test_refuses_strided_channels():
    call = good_call()
    call["x"] = call["x"].mT.contiguous().mT
    with pytest.raises(ValueError, match=r"x must have last-dim stride 1, got 26; use .contiguous\(\)"):
        gate_residual_ada_layer_norm(**call)
