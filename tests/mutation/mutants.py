"""Bugs to plant, one at a time, in the kernels of ``csrc`` and in the plans that they walk."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# kernel -> the file that holds it, and what stands before and behind it there
SECTIONS = {
    "shared": ("csrc/block_attention/pipeline.cuh", "", ""),
    "forward": ("csrc/block_attention/forward.cuh", "", ""),
    "dq": ("csrc/block_attention/backward.cuh", "// ---- dq\n", "// ---- dk and dv"),
    "dkdv": ("csrc/block_attention/backward.cuh", "// ---- dk and dv", "// ---- launches"),
    "ranges": ("csrc/cached_attention/ranges.cuh", "", ""),
    "cached": ("csrc/cached_attention/kernels.cu", "", ""),
    "streamed": ("csrc/cached_attention/streamed_sm90a.cu", "", ""),
    "plan": ("wam_kernels/plan/boxes.py", "", ""),
    "stop": ("wam_kernels/plan/side_rows.py", "", ""),
}
PLANS = ("plan", "stop")  # of Python: compiled and run in place of their module


class Mutant(NamedTuple):
    """``old``, which the kernel's section holds once, becomes ``new``."""

    # shared: of forward, dq and in parts of dkdv; ranges: of both part kernels of cached_attention; stop: stop-gradient
    kernel: str
    bug: str
    old: str
    new: str
    equivalent: str = ""  # why no run can find it, where that is proven
    head_dim: int = 64  # 64 or 128: of the kernel that is compiled

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.bug

    @property
    def kernels(self) -> tuple[str, ...]:
        """In which the bug is planted, one after the other until one shows it."""
        several = {"shared": ("forward", "dq", "dkdv"), "ranges": ("cached", "streamed")}
        return several.get(self.kernel, (self.kernel,))

    @property
    def path(self) -> Path:
        return ROOT / SECTIONS[self.kernel][0]

    def planted(self) -> str:
        """The file with this bug.

        Raises:
            ValueError: the section does not hold ``old`` exactly once.
        """
        _, before, behind = SECTIONS[self.kernel]
        text = self.path.read_text()
        begin = text.index(before)
        end = text.index(behind, begin) if behind else len(text)
        section = text[begin:end]
        if section.count(self.old) != 1:
            raise ValueError(
                f"mutation: {self.kernel}: {self.bug}: {self.path.name} must hold once what the bug replaces, got "
                f"{section.count(self.old)} times; adapt the bug to the source: {self.old!r}"
            )
        return text[:begin] + section.replace(self.old, self.new) + text[end:]


_LEAVE_X = "      barrier_wait(&x.full[at.at], at.phase);\n      barrier_arrive(&x.free[at.at]);\n"
_DRAIN = """    wgmma_wait<0>();
    release(&s.v.free[at_v.at], lane);
    at_v.next();
    keep<N>(scores);
"""
_OUT_ROWS = "    for (int i = 0; i < D / 2; ++i) out[i] *= shrink[i / 2 % 2];\n"

MUTANTS = (
    # ---- shared: stages, work, copies
    Mutant(
        "shared",
        "a stage counts one warp too few",
        "barrier_init(&free[i], kConsumerWarps);",
        "barrier_init(&free[i], kConsumerWarps - 1);",
    ),
    Mutant(
        "shared",
        "a producer does not wait for a free stage",
        "    barrier_wait(&stages.free[ring.at], ring.phase ^ 1);\n",
        "",
    ),
    Mutant(
        "shared",
        "a producer waits for the other phase",
        "barrier_wait(&stages.free[ring.at], ring.phase ^ 1);",
        "barrier_wait(&stages.free[ring.at], ring.phase);",
    ),
    Mutant("shared", "the phase of a ring never flips", "      phase ^= 1;\n", ""),
    Mutant("shared", "a skip forgets the phase", "    phase ^= at / kStages & 1;\n", ""),
    Mutant(
        "shared",
        "work is drawn into an entry that is still read",
        "  barrier_wait(&queue.free[turn.at], turn.phase ^ 1);\n",
        "",
    ),
    Mutant(
        "shared",
        "a warp releases its work before all lanes have read it",
        "  const int work = from_lane_0(queue.work[turn.at]);\n"
        "  if (lane == 0) barrier_arrive(&queue.free[turn.at]);\n",
        "  const int read = queue.work[turn.at];\n  if (lane == 0) barrier_arrive(&queue.free[turn.at]);\n"
        "  const int work = read;\n",
    ),
    Mutant(
        "shared",
        "the second producer does not wait for the work",
        "  barrier_wait(&queue.full[turn.at], turn.phase);\n  const int work = queue.work[turn.at];\n  barrier_arrive",
        "  const int work = queue.work[turn.at];\n  barrier_arrive",
    ),
    Mutant(
        "shared",
        "the second producer does not release the work",
        "  const int work = queue.work[turn.at];\n  barrier_arrive(&queue.free[turn.at]);\n",
        "  const int work = queue.work[turn.at];\n",
    ),
    Mutant(
        "shared",
        "masked steps expect the bytes of full ones",
        "fill(kMaskedTokens * kChannels * 2,",
        "fill(2 * kMaskedTokens * kChannels * 2,",
    ),
    Mutant(
        "shared", "full steps expect half their bytes", "fill(kTokens * kChannels * 2,", "fill(kTokens * kChannels,"
    ),
    Mutant("shared", "both boxes at one place", "x * kBoxTokens * 128, &maps.box", "0 * kBoxTokens * 128, &maps.box"),
    Mutant("shared", "a box has no gap: it reads on behind its tokens", "-(box[x] >> kTokenBits),\n", "0,\n"),
    Mutant(
        "shared",
        "a box reads the tokens before its own instead of zeros",
        "-(box[x] >> kTokenBits),\n                     box[x] & ((1 << kTokenBits) - 1), batch",
        "0,\n                     (box[x] & ((1 << kTokenBits) - 1)) - (box[x] & ((1 << kTokenBits) - 1) "
        "? box[x] >> kTokenBits : 0), batch",
    ),
    Mutant(
        "shared",
        "steps behind begin with those before",
        "masked_steps(tile[2] + n0, tile[5]",
        "masked_steps(tile[2], tile[5]",
    ),
    Mutant("shared", "steps of half 1 alone are not copied", "tile[5] + tile[6], head, batch", "tile[5], head, batch"),
    Mutant(
        "shared",
        "half 1 takes the steps of half 0",
        "skip_before = from_lane_0(half ? n0 : 0);",
        "skip_before = from_lane_0(0);",
    ),
    Mutant(
        "shared",
        "half 0 takes the steps of half 1",
        "skip_behind = from_lane_0(half ? 0 : n1);",
        "skip_behind = from_lane_0(0);",
    ),
    Mutant(
        "shared", "the head of the batch element before", "head = rest - batch * heads;", "head = rest % heads / 1 * 0;"
    ),
    Mutant(
        "shared", "the other row of a thread's fragments", "to[j / 2][r + j % 2 * 2]", "to[j / 2][1 - r + j % 2 * 2]"
    ),
    Mutant("shared", "channels beyond head_dim are read", "there[r] && j * 8 < head_dim ?", "there[r] ?"),
    Mutant("shared", "steps left out are not waited for", _LEAVE_X, "      barrier_arrive(&x.free[at.at]);\n"),
    Mutant("shared", "steps left out are not released", _LEAVE_X, "      barrier_wait(&x.full[at.at], at.phase);\n"),
    Mutant(
        "shared",
        "all lanes leave steps out",
        "  if (lane == 0) {\n    Ring<X::kStages> at = now;",
        "  {\n    Ring<X::kStages> at = now;",
    ),
    Mutant(
        "shared",
        "lanes go on before the steps are left out",
        "  sync_warp();\n  now.skip(steps);",
        "  now.skip(steps);",
        "the next shuffle, of the next product or of the next work, holds the lanes together",
    ),
    Mutant("shared", "a ring stays where it was after steps left out", "  now.skip(steps);\n", ""),
    Mutant("shared", "the batch element of a tile's steps is left out", "    batch += tile[7];\n", ""),
    Mutant(
        "shared",
        "a box steps from head to head instead of from token to token",
        "{2, of_head, of_token, of_token, of_batch}",
        "{2, of_head, of_head, of_token, of_batch}",
    ),
    Mutant(
        "shared",
        "the map of boxes ends one token early",
        "{head_dim, heads, kBoxTokens, tokens, batch}",
        "{head_dim, heads, kBoxTokens - 1, tokens, batch}",
    ),
    Mutant(
        "shared",
        "full steps copy what lies behind head_dim",
        "{head_dim, heads, tokens, batch, 1}",
        "{64, heads, tokens, batch, 1}",
    ),
    Mutant(
        "shared",
        "the second 64 channels of a full step are copied over the first",
        "tma_load(to + c * kTokens * 2, &maps.whole",
        "tma_load(to, &maps.whole",
        head_dim=128,
    ),
    # ---- forward
    Mutant(
        "forward",
        "values are multiplied before they are there",
        "    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();",
        "    issue_values<kLast>();",
    ),
    Mutant(
        "forward",
        "the next keys are not waited for",
        "if (--left > 0) barrier_wait(&s.k.full[at_k.at], at_k.phase);",
        "--left;",
    ),
    Mutant(
        "forward",
        "scores are read before their wait",
        "    wgmma_wait<1>();\n    release(&s.k.free[at_k.at], lane);",
        "    release(&s.k.free[at_k.at], lane);",
    ),
    Mutant(
        "forward",
        "values are released with the keys",
        "    release(&s.k.free[at_k.at], lane);\n    at_k.next();\n    mask<N>(scores);\n"
        "    softmax<N>(scores, shrink);\n    await_next_keys();\n    wgmma_wait<0>();\n"
        "    release(&s.v.free[at_v.at], lane);\n",
        "    release(&s.k.free[at_k.at], lane);\n    release(&s.v.free[at_v.at], lane);\n    at_k.next();\n"
        "    mask<N>(scores);\n    softmax<N>(scores, shrink);\n    await_next_keys();\n    wgmma_wait<0>();\n",
    ),
    Mutant(
        "forward",
        "keys are released before their product has read them",
        "    issue_scores<N>(scores);\n    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();\n"
        "    wgmma_wait<1>();\n    release(&s.k.free[at_k.at], lane);\n",
        "    issue_scores<N>(scores);\n    release(&s.k.free[at_k.at], lane);\n"
        "    barrier_wait(&s.v.full[at_v.at], at_v.phase);\n    issue_values<kLast>();\n    wgmma_wait<1>();\n",
    ),
    Mutant(
        "forward",
        "probabilities are packed while a product reads them",
        _DRAIN,
        _DRAIN.replace("    wgmma_wait<0>();\n", "    keep<N>(scores);\n    wgmma_wait<0>();\n"),
    ),
    Mutant(
        "forward",
        "no wgmma.fence before the values",
        "at_v.at * kStageUnits);\n    wgmma_fence();\n",
        "at_v.at * kStageUnits);\n",
    ),
    Mutant("forward", "the sums are not rescaled", _OUT_ROWS, "    for (int i = 0; i < D / 2; ++i) out[i] *= 1.0f;\n"),
    Mutant(
        "forward", "after a step of another size, values of this one", "next_step<kOther, N>();", "next_step<N, N>();"
    ),
    Mutant("forward", "the last values as many as in a full step", "if (last == kFullTokens) {", "if (last != 0) {"),
    Mutant(
        "forward",
        "words of the other half",
        "(static_cast<int64_t>(steps.masked) * 2 + half)",
        "(static_cast<int64_t>(steps.masked) * 2 + 1 - half)",
    ),
    Mutant("forward", "words advance by one half", "words += 2 * kWarpgroupThreads;", "words += kWarpgroupThreads;"),
    Mutant(
        "forward",
        "bits in another order",
        "if (!(word >> i & 1)) scores[i] = -INFINITY;",
        "if (!(word >> (i ^ 1) & 1)) scores[i] = -INFINITY;",
    ),
    Mutant("forward", "the rings part after steps left out", "    at_v = at_k;\n", ""),
    Mutant(
        "forward",
        "value tiles of the wrong leading distance",
        "descriptor(s.v.data, kFullTokens * 128, 1024)",
        "descriptor(s.v.data, 16, 1024)",
        head_dim=128,
    ),
    Mutant(
        "forward", "key tiles of the wrong stride", "descriptor(s.k.data, 16, 1024)", "descriptor(s.k.data, 16, 512)"
    ),
    Mutant("forward", "the maximum of one thread alone", "      most = fmaxf(most, shuffle_xor(most, 1));\n", ""),
    Mutant(
        "forward",
        "fully masked rows are not told apart",
        "most == -INFINITY ? 0.0f : most * p.to_base2",
        "most * p.to_base2",
    ),
    Mutant(
        "forward",
        "lse of the other row",
        "* p.rows + row[r]] =\n            nothing",
        "* p.rows + row[1 - r]] =\n            nothing",
    ),
    Mutant(
        "forward",
        "more registers than there are",
        "registers_take<kConsumerRegisters>();",
        "registers_take<kConsumerRegisters + 8>();",
    ),
    Mutant("forward", "barriers are used before they are initialised", "  sync_block();\n", ""),
    Mutant("forward", "the keys of the query head", "work.head / p.group, work.batch", "work.head, work.batch"),
    Mutant("forward", "the sum of probabilities is not rescaled", "      total[r] *= shrink[r];\n", ""),
    Mutant("forward", "the sum of one thread alone", "sum_of_quad(total[r])", "total[r]"),
    Mutant("forward", "lse in base 2", "log2f(sum)) / kLog2e", "log2f(sum))"),
    Mutant("forward", "a negative scale keeps q's sign", "? 0x80008000u : 0u", "? 0u : 0u"),
    # ---- dq
    Mutant(
        "dq",
        "v is multiplied before it is there",
        "    barrier_wait(&s.v.full[now.at], now.phase);\n    Products::rows(grads, dout",
        "    Products::rows(grads, dout",
    ),
    Mutant(
        "dq", "the next k is not waited for", "if (more) barrier_wait(&s.k.full[next.at], next.phase);", "(void)more;"
    ),
    Mutant(
        "dq",
        "k is released before dq has read it",
        "    Products::sums(dq, packed, k_columns, first(k_columns));\n    now = next;",
        "    Products::sums(dq, packed, k_columns, first(k_columns));\n"
        "    release(&s.k.free[now.at], lane);\n    some = false;\n"
        "    now = next;",
    ),
    Mutant(
        "dq",
        "v is released with the scores",
        "    before = now;\n    some = true;\n    if (masked) {",
        "    before = now;\n    some = true;\n    release(&s.v.free[now.at], lane);\n    if (masked) {",
    ),
    Mutant(
        "dq",
        "gradients are read before their wait",
        "    wgmma_wait<0>();\n    release(&s.v.free[now.at], lane);",
        "    release(&s.v.free[now.at], lane);",
    ),
    Mutant(
        "dq",
        "the last k is not released",
        "    if (some) release(&s.k.free[before.at], lane);\n    some = false;",
        "    some = false;",
    ),
    Mutant(
        "dq",
        "the last product is not waited for",
        "  __device__ __forceinline__ void finish_last() {\n    wgmma_wait<0>();\n",
        "  __device__ __forceinline__ void finish_last() {\n",
    ),
    Mutant("dq", "delta without the gradient of lse", "? -p.dlse[at] : 0.0f", "? 0.0f : 0.0f"),
    Mutant(
        "dq",
        "rows that attend to nothing keep their operands",
        "there[r] = row[r] >= 0 && lse[r] != -INFINITY;",
        "there[r] = row[r] >= 0;",
    ),
    Mutant("dq", "delta of one thread's channels alone", "      delta[r] = sum_of_quad(delta[r]);\n", ""),
    Mutant("dq", "the other row's lse", "p.to_base2 - lse[i / 2 % 2]", "p.to_base2 - lse[1 - i / 2 % 2]"),
    Mutant(
        "dq",
        "k by rows where columns are due",
        "Products::sums(dq, packed, k_columns, first(k_columns));",
        "Products::sums(dq, packed, k_columns, first(k_columns) + 64);",
    ),
    Mutant("dq", "bits in another order", "if (!(word >> i & 1))", "if (!(word >> (i ^ 2) & 1))"),
    Mutant("dq", "masked steps behind the full ones are not masked", " || i >= full_end;", ";"),
    Mutant("dq", "v is not released", "    release(&s.v.free[now.at], lane);\n", ""),
    Mutant("dq", "the scale of dq is left out", "dq, p.scale, p.head_dim, lane", "dq, 1.0f, p.head_dim, lane"),
    Mutant(
        "dq",
        "k's tiles of the wrong leading distance",
        "descriptor(s.k.data, kTokens * 128, 1024)",
        "descriptor(s.k.data, 16, 1024)",
        head_dim=128,
    ),
    # ---- dkdv
    Mutant(
        "dkdv",
        "lse and delta are not waited for",
        "    barrier_wait(&s.rows_full[now.at], now.phase);\n#pragma",
        "#pragma",
    ),
    Mutant("dkdv", "lse and delta are written over", "    barrier_wait(&s.dout.free[now.at], now.phase ^ 1);\n", ""),
    Mutant(
        "dkdv",
        "a warp's lse is there before its lanes are",
        "    sync_warp();\n    if (lane == 0) barrier_arrive(&s.rows_full[now.at]);",
        "    if (lane == 0) barrier_arrive(&s.rows_full[now.at]);",
    ),
    Mutant(
        "dkdv",
        "one warp's lse is enough",
        "barrier_init(&s.rows_full[i], kBoxes);",
        "barrier_init(&s.rows_full[i], 1);",
    ),
    Mutant(
        "dkdv", "lse of a box ignores its gap", "const int at = lane - (box >> kTokenBits);", "const int at = lane;"
    ),
    Mutant(
        "dkdv",
        "dout is multiplied before it is there",
        "    barrier_wait(&s.dout.full[now.at], now.phase);\n    Products::rows(grads, v",
        "    Products::rows(grads, v",
    ),
    Mutant(
        "dkdv",
        "q is multiplied before it is there",
        "    barrier_wait(&s.q.full[now.at], now.phase);\n    Products::rows(scores, k",
        "    Products::rows(scores, k",
    ),
    Mutant(
        "dkdv",
        "gradients are read before their wait",
        "first(dout_columns));\n    wgmma_wait<1>();",
        "first(dout_columns));",
    ),
    Mutant(
        "dkdv",
        "q is released before its last product",
        "    wgmma_wait<0>();\n    release(&s.q.free[now.at]);",
        "    release(&s.q.free[now.at]);\n    wgmma_wait<0>();",
    ),
    Mutant("dkdv", "k and v are not waited for", "    copy_async_wait_all();\n", ""),
    Mutant("dkdv", "k and v without the proxy's fence", "    fence_async_proxy();\n", ""),
    Mutant(
        "dkdv",
        "a warpgroup does not wait for its k and v",
        "    fence_async_proxy();\n    sync_half();\n",
        "    fence_async_proxy();\n",
    ),
    Mutant(
        "dkdv",
        "the next k and v come while these are read",
        "    sync_half();  // nobody's products read the keys any more when the next ones come\n",
        "",
    ),
    Mutant("dkdv", "k and v without the swizzle", "((chunk % 8) ^ (row % 8)) * 16", "(chunk % 8) * 16"),
    Mutant("dkdv", "a key that nothing attends to keeps its sums", "    clear_unattended(steps);\n", ""),
    Mutant("dkdv", "the bits of the other row", "(0x33333333u << 2 * r)", "(0x33333333u << 2 * (1 - r))"),
    Mutant(
        "dkdv",
        "one query head of the group alone",
        "turn < p.group; ++turn) queries_of_head",
        "turn < 1; ++turn) queries_of_head",
    ),
    Mutant(
        "dkdv",
        "words behind the full steps begin anew",
        "(i < steps.before ? i : i - steps.full)",
        "(i < steps.before ? i : i - full_end)",
    ),
    Mutant("dkdv", "the scale of dk is left out", "dk, p.scale, p.head_dim, lane", "dk, 1.0f, p.head_dim, lane"),
    Mutant(
        "dkdv",
        "q of steps left out is not released",
        "        barrier_arrive(&s.q.free[at.at]);\n",
        "",
    ),
    Mutant(
        "dkdv",
        "all lanes leave steps out",
        "    if (lane == 0) {\n      Ring<kStages> at = now;",
        "    {\n      Ring<kStages> at = now;",
    ),
    Mutant(
        "dkdv",
        "lse of steps left out is not waited for",
        "        barrier_wait(&s.rows_full[at.at], at.phase);\n        barrier_arrive",
        "        barrier_arrive",
        "the half that takes the step waits for its lse before it releases dout, and the next dout of that stage, "
        "which is waited for before the next lse, comes after that: no phase can be missed",
    ),
    Mutant("dkdv", "lse of both boxes is the first one's", "kBoxes + place / kBoxTokens]", "kBoxes]"),
    Mutant("dkdv", "an empty box has lse of a token", "at < 0 || first == (1 << kTokenBits) - 1 ? -1", "at < 0 ? -1"),
    Mutant("dkdv", "lse of the first half of a full step twice", " + i % 2 * kTokens + place", " + place"),
    Mutant("dkdv", "lse of another query head", "p.heads + work.head * p.group) *", "p.heads + work.head) *"),
    Mutant("dkdv", "lse of another batch element", "((work.tile[7] + work.batch) * p.heads", "(work.batch * p.heads"),
    Mutant(
        "dkdv",
        "q's tiles of the wrong leading distance",
        "q_columns = descriptor(s.q.data, kTokens * 128, 1024)",
        "q_columns = descriptor(s.q.data, 16, 1024)",
        head_dim=128,
    ),
    # ---- cached attention
    Mutant("ranges", "ranges begin before the cache", "start = begin < 0 ? 0 : begin;", "start = begin;"),
    Mutant("ranges", "ranges end behind the cache", "(end < slots ? end : slots) - start", "end - start"),
    Mutant("ranges", "a range that ends before it begins", "    if (length < 0) length = 0;\n", ""),
    Mutant("cached", "places count from the first range", "range_.start + place - before_", "range_.start + place"),
    Mutant("ranges", "rows of the first group", "begin += tile * kTileRows;", "begin = tile * kTileRows;"),
    Mutant("cached", "ranges of the first group", "(b * p.groups + tile.group) *", "(b * p.groups) *"),
    Mutant("cached", "the last steps are of no part", "(steps + p.parts - 1) / p.parts", "steps / p.parts"),
    Mutant("cached", "a part without slots stores nothing", "if (lane < 16 && lane < rows)", "if (false)"),
    Mutant(
        "cached",
        "slots behind the last one are copied",
        "place < visible && chunk * 8 < p.head_dim;",
        "place < slots && chunk * 8 < p.head_dim;",
    ),
    Mutant(
        "cached",
        "channels behind head_dim are copied",
        "place < visible && chunk * 8 < p.head_dim;",
        "place < visible;",
    ),
    Mutant("cached", "copies are not waited for", "    copy_async_wait();\n", ""),
    Mutant("cached", "no barrier between copies and products", "    __syncthreads();\n", ""),
    Mutant("cached", "the next step into the same tiles", "tiles[(step + 1 - first) % 2]", "tiles[(step - first) % 2]"),
    Mutant("cached", "the last step is not masked", "if (columns < kSlots) mask", "if (columns < 0) mask"),
    Mutant("cached", "one column too many", ">= columns) s.at", "> columns) s.at"),
    Mutant("cached", "the sum is not rescaled", "    state.total[r] *= shrink;\n", ""),
    Mutant("cached", "half of out is not rescaled", "      out.at[j][2 * r + 1] *= shrink;\n", ""),
    Mutant(
        "cached",
        "the maximum of two lanes of four",
        "return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));",
        "return v;",
    ),
    Mutant("cached", "a negative scale keeps q's sign", "  if (p.scale < 0.0f) change_sign(q_rows);\n", ""),
    Mutant("cached", "lse of a part is its maximum", "state.m[r] + log2f(total);", "state.m[r];"),
    Mutant("cached", "empty parts are added", "    if (lse == -INFINITY) continue;", "    if (false) continue;"),
    Mutant("cached", "parts have one weight", "const float weight = exp2f(lse - m);", "const float weight = 1.0f;"),
    Mutant("cached", "lse in base 2", "(m + log2f(total)) / kLog2e", "(m + log2f(total))"),
    # ---- cached attention on one stream
    Mutant("streamed", "a stage counts one warp too few", "free[i], kReaderWarps);", "free[i], kReaderWarps - 1);"),
    Mutant(
        "streamed",
        "a strip attends from the second piece of a range on",
        "if (first <= at && at",
        "if (first < at && at",
    ),
    Mutant(
        "streamed",
        "boxes without another one are left out",
        "if (box != kNoBox) add({box, kNoBox, 1, of});",
        "(void)box;",
    ),
    Mutant(
        "streamed",
        "a box that has waited is used again",
        "other == kNoBox ? box(slot, left) : kNoBox;",
        "box(slot, left);",
    ),
    Mutant("streamed", "the last steps are of no part", "(steps_ + p.parts - 1) / p.parts", "steps_ / p.parts"),
    Mutant("streamed", "boxes have no gap", "static_cast<uint32_t>(kBoxTokens - slots) <<", "0u <<"),
    Mutant(
        "streamed",
        "both boxes of a step begin with one slot",
        "box(slot + kBoxTokens, left - kBoxTokens)",
        "box(slot, left - kBoxTokens)",
    ),
    Mutant(
        "streamed",
        "every part begins with the first stretch",
        "    while (left > 0 && step >= now->steps) step -= now++->steps;\n",
        "    step = 0;\n",
    ),
    Mutant(
        "streamed",
        "a part goes on to the end of its stretch",
        "return now->steps - step < left ? now->steps - step : left;",
        "return now->steps - step;",
    ),
    Mutant(
        "streamed",
        "a producer does not wait for a free stage",
        "      barrier_wait(&stages.free[ring.at], ring.phase ^ 1);\n",
        "",
    ),
    Mutant("streamed", "the steps of a stretch have one slot", "++i, slot += kStepSlots)", "++i)"),
    Mutant("streamed", "gaps are not masked", "    if (stretch.second != kWhole) mask(scores, stretch);\n", ""),
    Mutant(
        "streamed",
        "the next keys are not waited for",
        "    if (more) barrier_wait(&s.k.full[at_k.at], at_k.phase);\n",
        "    (void)more;\n",
    ),
    Mutant(
        "streamed",
        "values are multiplied before they are there",
        "      barrier_wait(&s.v.full[at_v.at], at_v.phase);\n      issue_values();\n",
        "      issue_values();\n",
    ),
    Mutant(
        "streamed",
        "scores are read before their wait",
        "      issue_values();\n      wgmma_wait<1>();\n",
        "      issue_values();\n",
    ),
    Mutant(
        "streamed",
        "values are released before their product has read them",
        "      wgmma_wait<0>();\n      release(&s.v.free[at_v.at], lane);\n",
        "      release(&s.v.free[at_v.at], lane);\n      wgmma_wait<0>();\n",
    ),
    Mutant("streamed", "the rings part after steps left out", "        at_v = at_k;\n", ""),
    Mutant("streamed", "the last values before steps left out are not added", "        if (some) last_values();\n", ""),
    Mutant("streamed", "a strip takes the steps of others", ".strips) >> strip & 1)", ".strips) != 0)"),
    Mutant("streamed", "q without the proxy's fence", "  fence_async_proxy();\n", ""),
    Mutant("streamed", "the keys of the query head", "head = work.head / p.group,", "head = work.head,"),
    Mutant("streamed", "a cache for every query", "work.batch / p.call.queries_of_row;", "work.batch;"),
    Mutant("streamed", "the plan is walked while it is written", "  sync_block();\n", ""),
    # ---- plans
    Mutant(
        "plan",
        "a row without a range attends to all that others do",
        "np.minimum.reduceat(hi, rows.starts, axis=1)\n",
        "np.minimum.reduceat(np.where(attended, hi, 1 << bits), rows.starts, axis=1)\n"
        "    all_lo = np.maximum.reduceat(np.where(attended, lo, 0), rows.starts, axis=1)\n",
    ),
    Mutant(
        "plan",
        "full steps are moved beyond their run",
        "np.where(shift <= end - begin - count * FULL, shift, 0)",
        "shift",
    ),
    Mutant("plan", "boxes have no gap", "pieces.first | (BOX - pieces.length) << TOKEN_BITS", "pieces.first"),
    Mutant(
        "plan",
        "boxes read on behind their run",
        "np.minimum(stop.repeat(boxes) - first, BOX)",
        "np.minimum(stop.repeat(boxes), BOX)",
    ),
    Mutant(
        "plan",
        "empty boxes move with their sample",
        "np.add(out, shift[steps], out=out, where=out != EMPTY)",
        "np.add(out, shift[steps], out=out)",
    ),
    Mutant("plan", "the halves of boxes are exchanged", "+ by_half1 - by_half0", "+ by_half0 - by_half1"),
    Mutant(
        "plan",
        "rows count for the other half",
        "[tiles.first < middle, tiles.end > middle]",
        "[tiles.end > middle, tiles.first < middle]",
    ),
    Mutant(
        "plan",
        "bits of a thread's rows at wrong places",
        "np.left_shift(second, np.uint32(2), out=second)",
        "np.left_shift(second, np.uint32(4), out=second)",
    ),
    Mutant(
        "plan", "boxes of half 1 are left over", "-(-sizes // PLACES)", "-(-sizes // PLACES) - (sizes % PLACES == 1)"
    ),
    Mutant(
        "plan", "full steps of one sample twice", "count = (end - begin) // FULL", "count = (end - begin) // FULL + 1"
    ),
    Mutant("plan", "dq takes the masked steps of frozen queries", ", 3:7] = 0", ", 4] = 0"),
    Mutant("plan", "a box has bits of its first column alone", "    if more.size:\n", "    if not more.size:\n"),
    Mutant(
        "plan",
        "a warp's first threads hold the rows of the warp before",
        "    new[(edge + 8) // 16 * 8] = True\n",
        "",
    ),
    # ---- stop-gradient
    Mutant(
        "stop",
        "the flag is ignored",
        "keys.bounds[:, stopped[columns, stream]] = NOWHERE",
        "keys.bounds[:, stopped[columns, stream]] = keys.bounds[:, stopped[columns, stream]]",
    ),
    Mutant(
        "stop",
        "pairs are read the other way round",
        "index(query), STREAMS.index(key)",
        "index(key), STREAMS.index(query)",
    ),
    Mutant("stop", "runs keep what is stopped", "queries._replace(bounds=bounds)", "queries"),
    Mutant(
        "stop",
        "queries lose it too",
        "return queries, keys, queries._replace",
        "return queries._replace(bounds=bounds), keys, queries._replace",
    ),
    Mutant(
        "stop",
        "marked ranges flow on",
        "else _range_side(sample.gradient_rows, sample.frozen_rows)",
        "else queries",
    ),
    Mutant("stop", "keys of a frozen stream get gradients", "    stopped[:, frozen_streams(stops)] = True\n", ""),
    Mutant(
        "stop", "queries of a frozen stream get gradients", "frozen=frozen_streams(stops).take(stream)", "frozen=none"
    ),
    Mutant("stop", "frozen queries share tiles with others", "frozen.astype(np.int64)", "np.zeros_like(rows.start)"),
    Mutant("stop", "pairs of frozen queries count", "self._pairs(self.queries, ~frozen)", "self._pairs(self.queries)"),
)
