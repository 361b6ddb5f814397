"""Bugs to plant in the kernels of ``csrc/block_attention``: what is replaced by what, once each."""

from typing import NamedTuple


class Mutant(NamedTuple):
    kernel: str  # forward, dq, dkdv, or all where the kernels share the text
    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    # why no run can find it, where that is proven
    equivalent: str = ""


def _one(kernel: str, name: str, old: str, new: str, equivalent: str = "") -> Mutant:
    file = {"forward": "forward.cuh", "dq": "backward.cuh", "dkdv": "backward.cuh", "all": "pipeline.cuh"}[kernel]
    return Mutant(kernel, name, file, ((old, new),), equivalent)


_PACK_K = "Products::rows(scores, q, k_rows, first(k_rows));"
_LEAVE_K = "        barrier_wait(&s.k.full[at.at], at.phase);\n        barrier_arrive(&s.k.free[at.at]);\n"
_DRAIN = """    wgmma_wait<0>();
    release(&s.v.free[at_v.at]);
    at_v.next();
    keep<N>(scores);
"""
_OUT_ROWS = "    for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i / 2 % 2];\n"

MUTANTS = (
    # ---- shared: stages, work, copies
    _one(
        "all",
        "a stage counts one warp too few",
        "barrier_init(&free[i], kConsumerWarps);",
        "barrier_init(&free[i], kConsumerWarps - 1);",
    ),
    _one(
        "all",
        "a producer does not wait for a free stage",
        "    barrier_wait(&stages.free[ring.at], ring.phase ^ 1);\n",
        "",
    ),
    _one(
        "all",
        "a producer waits for the other phase",
        "barrier_wait(&stages.free[ring.at], ring.phase ^ 1);",
        "barrier_wait(&stages.free[ring.at], ring.phase);",
    ),
    _one("all", "the phase of a ring never flips", "      phase ^= 1;\n", ""),
    _one("all", "a skip forgets the phase", "    phase ^= at / kStages & 1;\n", ""),
    _one(
        "all",
        "work is drawn into an entry that is still read",
        "  barrier_wait(&queue.free[turn.at], turn.phase ^ 1);\n",
        "",
    ),
    _one(
        "all",
        "a warp releases its work before all lanes have read it",
        "  const int work = from_lane_0(queue.work[turn.at]);\n"
        "  if (lane == 0) barrier_arrive(&queue.free[turn.at]);\n",
        "  const int read = queue.work[turn.at];\n  if (lane == 0) barrier_arrive(&queue.free[turn.at]);\n"
        "  const int work = read;\n",
    ),
    _one(
        "all",
        "the second producer does not wait for the work",
        "  barrier_wait(&queue.full[turn.at], turn.phase);\n  const int work = queue.work[turn.at];\n  barrier_arrive",
        "  const int work = queue.work[turn.at];\n  barrier_arrive",
    ),
    _one(
        "all",
        "the second producer does not release the work",
        "  const int work = queue.work[turn.at];\n  barrier_arrive(&queue.free[turn.at]);\n",
        "  const int work = queue.work[turn.at];\n",
    ),
    _one(
        "all",
        "masked steps expect the bytes of full ones",
        "fill(kMaskedTokens * kChannels * 2,",
        "fill(2 * kMaskedTokens * kChannels * 2,",
    ),
    _one("all", "full steps expect half their bytes", "fill(kTokens * kChannels * 2,", "fill(kTokens * kChannels,"),
    _one("all", "both boxes at one place", "x * kBoxTokens * 128, &maps.box", "0 * kBoxTokens * 128, &maps.box"),
    _one("all", "a box has no gap: it reads on behind its tokens", "-(box[x] >> kTokenBits),\n", "0,\n"),
    _one(
        "all",
        "a box reads the tokens before its own instead of zeros",
        "-(box[x] >> kTokenBits),\n                     box[x] & ((1 << kTokenBits) - 1), batch",
        "0,\n                     (box[x] & ((1 << kTokenBits) - 1)) - (box[x] & ((1 << kTokenBits) - 1) "
        "? box[x] >> kTokenBits : 0), batch",
    ),
    _one(
        "all",
        "steps behind begin with those before",
        "masked_steps(tile[2] + n0, tile[5]",
        "masked_steps(tile[2], tile[5]",
    ),
    _one("all", "steps of half 1 alone are not copied", "tile[5] + tile[6], head, batch", "tile[5], head, batch"),
    _one(
        "all",
        "half 1 takes the steps of half 0",
        "skip_before = from_lane_0(half ? n0 : 0);",
        "skip_before = from_lane_0(0);",
    ),
    _one(
        "all",
        "half 0 takes the steps of half 1",
        "skip_behind = from_lane_0(half ? 0 : n1);",
        "skip_behind = from_lane_0(0);",
    ),
    _one("all", "the head of the batch element before", "head = rest - batch * heads;", "head = rest % heads / 1 * 0;"),
    _one("all", "the other row of a thread's fragments", "to[j / 2][r + j % 2 * 2]", "to[j / 2][1 - r + j % 2 * 2]"),
    _one("all", "channels beyond head_dim are read", "there[r] && j * 8 < head_dim ?", "there[r] ?"),
    # ---- forward
    _one(
        "forward",
        "values are multiplied before they are there",
        "    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();",
        "    issue_values<kLast>();",
    ),
    _one(
        "forward",
        "the next keys are not waited for",
        "if (--left > 0) barrier_wait(&s.k.full[at_k.at], at_k.phase);",
        "--left;",
    ),
    _one(
        "forward",
        "scores are read before their wait",
        "    wgmma_wait<1>();\n    release(&s.k.free[at_k.at]);",
        "    release(&s.k.free[at_k.at]);",
    ),
    _one(
        "forward",
        "values are released with the keys",
        "    release(&s.k.free[at_k.at]);\n    at_k.next();\n    mask<N>(scores);\n    softmax<N>(scores, shrink);\n"
        "    await_next_keys();\n    wgmma_wait<0>();\n    release(&s.v.free[at_v.at]);\n",
        "    release(&s.k.free[at_k.at]);\n    release(&s.v.free[at_v.at]);\n    at_k.next();\n    mask<N>(scores);\n"
        "    softmax<N>(scores, shrink);\n    await_next_keys();\n    wgmma_wait<0>();\n",
    ),
    _one(
        "forward",
        "keys are released before their product has read them",
        "    issue_scores<N>(scores);\n    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();\n"
        "    wgmma_wait<1>();\n    release(&s.k.free[at_k.at]);\n",
        "    issue_scores<N>(scores);\n    release(&s.k.free[at_k.at]);\n"
        "    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();\n    wgmma_wait<1>();\n",
    ),
    _one(
        "forward",
        "probabilities are packed while a product reads them",
        _DRAIN,
        _DRAIN.replace("    wgmma_wait<0>();\n", "    keep<N>(scores);\n    wgmma_wait<0>();\n"),
    ),
    _one(
        "forward",
        "no wgmma.fence before the values",
        "at_v.at * kStageUnits);\n    wgmma_fence();\n",
        "at_v.at * kStageUnits);\n",
    ),
    _one("forward", "the sums are not rescaled", _OUT_ROWS, "    for (int i = 0; i < D / 2; ++i) out[i] *= 1.0f;\n"),
    _one(
        "forward", "after a step of another size, values of this one", "next_step<kOther, N>();", "next_step<N, N>();"
    ),
    _one("forward", "the last values as many as in a full step", "if (last == kFullTokens) {", "if (last != 0) {"),
    _one(
        "forward",
        "words of the other half",
        "(static_cast<int64_t>(steps.masked) * 2 + half)",
        "(static_cast<int64_t>(steps.masked) * 2 + 1 - half)",
    ),
    _one("forward", "words advance by one half", "words += 2 * kWarpgroupThreads;", "words += kWarpgroupThreads;"),
    _one(
        "forward",
        "bits in another order",
        "if (!(word >> i & 1)) scores[i] = -INFINITY;",
        "if (!(word >> (i ^ 1) & 1)) scores[i] = -INFINITY;",
    ),
    _one("forward", "steps left out are not waited for", _LEAVE_K, "        barrier_arrive(&s.k.free[at.at]);\n"),
    _one("forward", "steps left out are not released", _LEAVE_K, "        barrier_wait(&s.k.full[at.at], at.phase);\n"),
    _one(
        "forward",
        "all lanes leave steps out",
        "    if (lane == 0) {\n      Ring<kStages> at = at_k;",
        "    {\n      Ring<kStages> at = at_k;",
    ),
    _one("forward", "the rings part after steps left out", "    at_v = at_k;\n", ""),
    _one(
        "forward",
        "lanes go on before the steps are left out",
        "    sync_warp();\n    at_k.skip(steps);",
        "    at_k.skip(steps);",
        "the next shuffle, of the next product or of the next work, holds the lanes together",
    ),
    _one(
        "forward",
        "key tiles of the wrong leading distance",
        "descriptor(s.v.data, kFullTokens * 128, 1024)",
        "descriptor(s.v.data, 16, 1024)",
        "at D = 64 there is one group of 64 channels, so nothing is reached with it; found at D = 128",
    ),
    _one("forward", "key tiles of the wrong stride", "descriptor(s.k.data, 16, 1024)", "descriptor(s.k.data, 16, 512)"),
    _one("forward", "the maximum of one thread alone", "      most = fmaxf(most, shuffle_xor(most, 1));\n", ""),
    _one(
        "forward",
        "fully masked rows are not told apart",
        "most == -INFINITY ? 0.0f : most * p.to_base2",
        "most * p.to_base2",
    ),
    _one(
        "forward",
        "lse of the other row",
        "* p.rows + row[r]] =\n            nothing",
        "* p.rows + row[1 - r]] =\n            nothing",
    ),
    _one(
        "forward",
        "more registers than there are",
        "registers_take<kConsumerRegisters>();",
        "registers_take<kConsumerRegisters + 8>();",
    ),
    _one("forward", "barriers are used before they are initialised", "  sync_block();\n", ""),
    _one("forward", "the keys of the query head", "work.head / p.group, work.batch", "work.head, work.batch"),
    # ---- dq
    _one(
        "dq",
        "v is multiplied before it is there",
        "    barrier_wait(&s.v.full[now.at], now.phase);\n    Products::rows(grads, dout",
        "    Products::rows(grads, dout",
    ),
    _one(
        "dq", "the next k is not waited for", "if (more) barrier_wait(&s.k.full[next.at], next.phase);", "(void)more;"
    ),
    _one(
        "dq",
        "k is released before dq has read it",
        "    Products::sums(dq, packed, k_columns, first(k_columns));\n    now = next;",
        "    Products::sums(dq, packed, k_columns, first(k_columns));\n"
        "    release(&s.k.free[now.at]);\n    some = false;\n"
        "    now = next;",
    ),
    _one(
        "dq",
        "v is released with the scores",
        "    before = now;\n    some = true;\n    if (masked) {",
        "    before = now;\n    some = true;\n    release(&s.v.free[now.at]);\n    if (masked) {",
    ),
    _one(
        "dq",
        "gradients are read before their wait",
        "    wgmma_wait<0>();\n    release(&s.v.free[now.at]);",
        "    release(&s.v.free[now.at]);",
    ),
    _one(
        "dq",
        "the last k is not released",
        "    if (some) release(&s.k.free[before.at]);\n    some = false;",
        "    some = false;",
    ),
    _one(
        "dq",
        "the last product is not waited for",
        "  __device__ __forceinline__ void finish_last() {\n    wgmma_wait<0>();\n",
        "  __device__ __forceinline__ void finish_last() {\n",
    ),
    _one("dq", "delta without the gradient of lse", "? -p.dlse[at] : 0.0f", "? 0.0f : 0.0f"),
    _one(
        "dq",
        "rows that attend to nothing keep their operands",
        "there[r] = row[r] >= 0 && lse[r] != -INFINITY;",
        "there[r] = row[r] >= 0;",
    ),
    _one("dq", "delta of one thread's channels alone", "      delta[r] = sum_of_quad(delta[r]);\n", ""),
    _one("dq", "the other row's lse", "p.to_base2 - lse[i / 2 % 2]", "p.to_base2 - lse[1 - i / 2 % 2]"),
    _one(
        "dq",
        "k by rows where columns are due",
        "Products::sums(dq, packed, k_columns, first(k_columns));",
        "Products::sums(dq, packed, k_columns, first(k_columns) + 64);",
    ),
    # ---- dkdv
    _one(
        "dkdv",
        "lse and delta are not waited for",
        "    barrier_wait(&s.rows_full[now.at], now.phase);\n#pragma",
        "#pragma",
    ),
    _one("dkdv", "lse and delta are written over", "    barrier_wait(&s.dout.free[now.at], now.phase ^ 1);\n", ""),
    _one(
        "dkdv",
        "a warp's lse is there before its lanes are",
        "    sync_warp();\n    if (lane == 0) barrier_arrive(&s.rows_full[now.at]);",
        "    if (lane == 0) barrier_arrive(&s.rows_full[now.at]);",
    ),
    _one(
        "dkdv",
        "one warp's lse is enough",
        "barrier_init(&s.rows_full[i], kBoxes);",
        "barrier_init(&s.rows_full[i], 1);",
    ),
    _one("dkdv", "lse of a box ignores its gap", "const int at = lane - (box >> kTokenBits);", "const int at = lane;"),
    _one(
        "dkdv",
        "dout is multiplied before it is there",
        "    barrier_wait(&s.dout.full[now.at], now.phase);\n    Products::rows(grads, v",
        "    Products::rows(grads, v",
    ),
    _one(
        "dkdv",
        "q is multiplied before it is there",
        "    barrier_wait(&s.q.full[now.at], now.phase);\n    Products::rows(scores, k",
        "    Products::rows(scores, k",
    ),
    _one(
        "dkdv",
        "gradients are read before their wait",
        "first(dout_columns));\n    wgmma_wait<1>();",
        "first(dout_columns));",
    ),
    _one(
        "dkdv",
        "q is released before its last product",
        "    wgmma_wait<0>();\n    release(&s.q.free[now.at]);",
        "    release(&s.q.free[now.at]);\n    wgmma_wait<0>();",
    ),
    _one("dkdv", "k and v are not waited for", "    copy_async_wait_all();\n", ""),
    _one("dkdv", "k and v without the proxy's fence", "    fence_async_proxy();\n", ""),
    _one(
        "dkdv",
        "a warpgroup does not wait for its k and v",
        "    fence_async_proxy();\n    sync_half();\n",
        "    fence_async_proxy();\n",
    ),
    _one(
        "dkdv",
        "the next k and v come while these are read",
        "    sync_half();  // nobody's products read the keys any more when the next ones come\n",
        "",
    ),
    _one("dkdv", "k and v without the swizzle", "((chunk % 8) ^ (row % 8)) * 16", "(chunk % 8) * 16"),
    _one("dkdv", "a key that nothing attends to keeps its sums", "    clear_unattended(steps);\n", ""),
    _one("dkdv", "the bits of the other row", "(0x33333333u << 2 * r)", "(0x33333333u << 2 * (1 - r))"),
    _one(
        "dkdv",
        "one query head of the group alone",
        "turn < p.group; ++turn) queries_of_head",
        "turn < 1; ++turn) queries_of_head",
    ),
    _one(
        "dkdv",
        "words behind the full steps begin anew",
        "(i < steps.before ? i : i - steps.full)",
        "(i < steps.before ? i : i - full_end)",
    ),
    _one("dkdv", "the scale of dk is left out", "dk, p.scale, p.head_dim, lane", "dk, 1.0f, p.head_dim, lane"),
)
