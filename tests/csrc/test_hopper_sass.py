"""What ptxas made of the kernels for Hopper: nothing spilled, nothing serialised, and the overlap that they are for."""

import subprocess

import pytest

from bench.static.sass import Body, disassemble, tool
from tests.csrc.sass import Step, registers_of, steps

# of one dtype: kernel, head dim, step -> the most instructions, clocks of tensor cores, products by their columns
STEPS = {
    ("forward", 128, "masked"): (380, 512, {64: 8, 128: 4}),
    ("forward", 128, "full"): (495, 1024, {128: 16}),
    ("forward", 64, "masked"): (335, 256, {64: 8}),
    ("forward", 64, "full"): (445, 512, {64: 8, 128: 4}),
    ("dq", 128, "step"): (345, 768, {64: 16, 128: 4}),
    ("dq", 64, "step"): (310, 384, {64: 12}),
    ("dkdv", 128, "step"): (435, 1024, {64: 16, 128: 8}),
    ("dkdv", 64, "step"): (385, 512, {64: 16}),
    ("streamed_part", 128, "step"): (380, 512, {64: 8, 128: 4}),
    ("streamed_part", 64, "step"): (330, 256, {64: 8}),
}
# of which op, and the registers that setmaxnreg gives a thread of its consumers
KERNELS = {
    "forward": ("block_attention", 240),
    "dq": ("block_attention", 240),
    "dkdv": ("block_attention", 240),
    "streamed_part": ("cached_attention", 160),
}


@pytest.fixture(scope="module")
def kernels(machine_code) -> dict[tuple[str, int, str, str], Step]:
    """By kernel, head dim, step and dtype."""
    found = {}
    for name, body in machine_code.items():
        for kernel, (op, registers) in KERNELS.items():
            for D in (64, 128):
                for dtype, mangled in (("bfloat16", "13__nv_bfloat16"), ("float16", "6__half")):
                    if op in name and f"{kernel}_kernelI{mangled}Li{D}E" in name:
                        assert registers_of(body) <= registers, name
                        assert sum(i.name.startswith(("LDL", "STL")) for i in body) == 0, name
                        # through a generic address shared memory costs more
                        assert sum(i.name.startswith("LD.") for i in body) == 0, name
                        loops = steps(body)
                        kinds = ("masked", "full") if kernel == "forward" else ("step",)
                        assert len(loops) == len(kinds), name
                        # in the forward only masked steps read a word
                        loops.sort(key=lambda step: -step.count("LDG"))
                        found |= {(kernel, D, kind, dtype): step for kind, step in zip(kinds, loops, strict=True)}
    assert len(found) == 2 * len(STEPS)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("which", STEPS, ids="-".join(("%s", "%s", "%s")).__mod__)
def test_a_step_has_the_products_and_the_overlap_that_it_is_for(kernels, which, dtype):
    step, (most, tensor_clocks, products) = kernels[*which, dtype], STEPS[which]
    assert step.instructions <= most
    assert step.tensor_clocks == tensor_clocks
    assert {n: step.products.count(n) for n in set(step.products)} == products
    assert step.local_accesses == 0
    # one group of products stays under way while the exponentials are taken, all of them
    assert step.waits[0] == 1 and step.waits[-1] == 0 and len(step.waits) <= 3
    assert step.exponentials_between_waits == step.count("MUFU.EX2") > 0


def test_tensor_cores_are_the_limit_where_heads_have_128_channels(kernels):
    """A scheduler issues an instruction a clock for a warp of either warpgroup; they take the tensor cores in turn."""
    for (kernel, D, kind, _dtype), step in kernels.items():
        if D == 128 and kind != "masked":
            assert max(step.instructions, step.mufu_clocks) < step.tensor_clocks, (kernel, kind)


# Groups of products that the source commits, unrolled or not: serialised (C7510 to C7512 of ptxas), or with a wait that
# ptxas put in (C7517), there would be more of them
GROUPS = {"forward": 16, "dq": 3, "dkdv": 4, "streamed_part": 5}


def groups_of(body: Body) -> tuple[int, int]:
    """Products, and groups of them: the last product of each closes it."""
    products = [i for i in body if i.name.startswith("HGMMA")]
    return len(products), sum("gsb0" in i.operands for i in products)


def test_no_product_is_serialised(machine_code):
    found = 0
    for name, body in machine_code.items():
        products, groups = groups_of(body)
        if products:
            (kernel,) = (kernel for kernel in KERNELS if f"{kernel}_kernelI" in name)
            assert groups == GROUPS[kernel] <= products // 3, name
            found += 1
    assert found == 4 * len(KERNELS)


PTX = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry two_products(.param .u64 out, .param .u64 a, .param .u64 b) {{
  .reg .f32 %f<4>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [a];
  ld.param.u64 %rd2, [b];
  ld.param.u64 %rd3, [out];
  mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
  wgmma.fence.sync.aligned;
  {product}
  {between}
  {product}
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.v4.f32 [%rd3], {{%f0, %f1, %f2, %f3}};
  ret;
}}
"""
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd2, 1, 1, 1, 0, 0;"


@pytest.mark.parametrize("between, groups", [("", 1), ("add.f32 %f0, %f0, %f0;", 2)])
def test_products_that_ptxas_takes_apart_are_seen(between, groups, tmp_path):
    """A sum that is touched while products are under way: one group in the source, two in the machine code."""
    pytest.importorskip("triton")
    source, cubin = tmp_path / "two.ptx", tmp_path / "two.cubin"
    source.write_text(PTX.format(product=PRODUCT, between=between))
    subprocess.run([tool("ptxas"), "-arch=sm_90a", source, "-o", cubin], check=True, capture_output=True)
    (body,) = disassemble(cubin).values()
    assert groups_of(body) == (2, groups)
