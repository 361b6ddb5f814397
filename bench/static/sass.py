"""Disassembled kernels (SASS), and their loops by control flow.

A step is the innermost natural loop that multiplies on tensor cores: the blocks from which a back edge is reached
without leaving the loop's first block. What only waits (a loop of its own around a barrier's test, usually behind the
end of the kernel) is no part of a step, nor are the paths of warps whose threads have parted.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with what follows its dots
    operands: str
    predicated: bool = False

    @property
    def group(self) -> str:
        """The name without what follows its dots."""
        return self.name.partition(".")[0]


Body = Sequence[Instruction]

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"(\.L_x_\d+):")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


def tool(name: str) -> Path:
    """``cuobjdump`` or ``nvdisasm``, which come with triton.

    Raises:
        ModuleNotFoundError: triton is not installed.
    """
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def parse(text: str) -> dict[str, list[Instruction]]:
    """Kernels by mangled name, of what cuobjdump or nvdisasm prints; addresses are those of branches' targets."""
    kernels: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    body: list[Instruction] = []
    waiting: list[str] = []  # labels whose address is that of the next instruction
    for line in text.splitlines():
        if function := re.search(r"Function : (\S+)|^\s*\.section\s+\.text\.(\S+?),", line):
            body = kernels.setdefault(function[1] or function[2], [])
        elif label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            body.append(Instruction(address, found[3], found[4].strip(), found[2] is not None))
    known = re.compile(r"`?\(?(\.L_x_\d+)\)?")
    for name, instructions in kernels.items():
        kernels[name] = [
            Instruction(
                i.address, i.name, known.sub(lambda m: hex(labels.get(m[1], -1)), i.operands), i.predicated
            ) if ".L_x_" in i.operands else i
            for i in instructions
        ]  # fmt: skip
    return kernels


def disassemble(path: Path, architecture: str | None = "sm_90a") -> dict[str, list[Instruction]]:
    """Kernels by mangled name, of an object file, a library or a cubin; of one architecture where it has several.

    Raises:
        ModuleNotFoundError: triton, which brings the disassembler, is not installed.
        subprocess.CalledProcessError: a file that is none of these.
    """
    chosen = [] if architecture is None else ["-arch", architecture]
    done = subprocess.run([tool("cuobjdump"), "-sass", *chosen, path], capture_output=True, text=True, check=True)
    return parse(done.stdout)


# ---- control flow ----


@dataclass(frozen=True)
class _Graph:
    """Blocks of a kernel: where each begins and ends, and what may follow it."""

    spans: tuple[tuple[int, int], ...]
    after: tuple[tuple[int, ...], ...]

    @cached_property
    def before(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(a for a, follow in enumerate(self.after) if b in follow) for b in range(len(self.spans)))

    def dominators(self) -> list[set[int]]:
        """Of each block those that every path from the first one to it passes, itself included; empty: no path."""
        order, stack = [], [0]
        reached = {0}
        while stack:
            order.append(block := stack.pop())
            for follow in self.after[block]:
                if follow not in reached:
                    reached.add(follow)
                    stack.append(follow)
        found: list[set[int]] = [set(order) if b in reached else set() for b in range(len(self.spans))]
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                known = [found[p] for p in self.before[block] if p in reached]
                new = set.intersection(*known) | {block}
                changed |= new != found[block]
                found[block] = new
        return found


def _target(i: Instruction) -> int | None:
    found = re.search(r"0x([0-9a-f]+)", i.operands) if i.group == "BRA" else None
    return int(found[1], 16) if found else None


def _graph(body: Body) -> _Graph:
    index = {i.address: n for n, i in enumerate(body)}
    starts = {0}
    for n, i in enumerate(body):
        target = _target(i)
        if target is not None or i.group in _ENDS:
            starts |= {n + 1} | ({index[target]} if target in index else set())
    edges = sorted(s for s in starts if s < len(body))
    number = {start: block for block, start in enumerate(edges)}
    spans = tuple(zip(edges, [*edges[1:], len(body)], strict=True))
    after = []
    for _, end in spans:
        last, follow = body[end - 1], []
        target = _target(last)
        # where the threads of a warp have parted it goes elsewhere, and comes back
        if target is not None and target in index and ".DIV" not in last.name:
            follow.append(number[index[target]])
        conditional = last.predicated or last.name.startswith("BRA.") or (target is not None and "P" in last.operands)
        falls_through = conditional if target is not None or last.group in _ENDS else True
        if falls_through and end < len(body):
            follow.append(number[end])
        after.append(tuple(dict.fromkeys(follow)))
    return _Graph(spans, tuple(after))


@dataclass(frozen=True)
class Loop:
    """What one turn executes, in the order of the code; the first block is where it begins."""

    body: tuple[Instruction, ...]

    def count(self, *prefixes: str) -> int:
        return sum(i.name.startswith(prefixes) for i in self.body)


def _loops(graph: _Graph) -> dict[int, set[int]]:
    """Blocks of each natural loop, by its first block."""
    dominators = graph.dominators()
    loops: dict[int, set[int]] = {}
    for tail, follow in enumerate(graph.after):
        for head in follow:
            if head in dominators[tail]:
                inside = loops.setdefault(head, {head})
                stack = [tail]
                while stack:
                    block = stack.pop()
                    if block not in inside and dominators[block]:
                        inside.add(block)
                        stack.extend(graph.before[block])
    return loops


def loops_with(body: Body, *wanted: tuple[str, ...]) -> list[Loop]:
    """The innermost loops with an instruction that begins with one of each tuple, in the order of their code.

    Loops inside them that have none of the first tuple wait, and are left out with what only they lead to.
    """
    graph = _graph(body)
    dominators, loops = graph.dominators(), _loops(graph)

    def has(blocks: Iterable[int], prefixes: tuple[str, ...]) -> bool:
        return any(body[n].name.startswith(prefixes) for b in blocks for n in range(*graph.spans[b]))

    chosen = {head: blocks for head, blocks in loops.items() if all(has(blocks, prefixes) for prefixes in wanted)}
    found = []
    for head, blocks in chosen.items():
        if any(other != head and chosen[other] < blocks for other in chosen):
            continue
        waits = {h for h, inner in loops.items() if h != head and inner < blocks and not has(inner, wanted[0])}
        once = [b for b in blocks if not dominators[b] & waits]
        found.append((head, Loop(tuple(_instructions(body, graph, once)))))
    return [loop for _, loop in sorted(found, key=lambda item: item[0])]


def longest_turn(body: Body, *wanted: tuple[str, ...]) -> Loop:
    """The longest way through the innermost loop with one of each tuple, or through all of a kernel without one.

    Of two branches one is taken; a loop inside is gone through once.
    """
    graph = _graph(body)
    dominators, loops = graph.dominators(), _loops(graph)

    def has(blocks: Iterable[int], prefixes: tuple[str, ...]) -> bool:
        return any(body[n].name.startswith(prefixes) for b in blocks for n in range(*graph.spans[b]))

    found = {head: blocks for head, blocks in loops.items() if all(has(blocks, prefixes) for prefixes in wanted)}
    head = min(found, key=lambda h: len(found[h])) if found else 0
    inside = found.get(head, set(range(len(graph.spans))))
    best: dict[int, tuple[int, tuple[int, ...]]] = {}  # instructions and blocks of the longest way to the end

    def visit(block: int) -> tuple[int, tuple[int, ...]]:
        if block not in best:
            begin, end = graph.spans[block]
            ways = [visit(b) for b in graph.after[block] if b in inside and b not in dominators[block]]
            length, blocks = max(ways, default=(0, ()))
            best[block] = length + end - begin, (block, *blocks)
        return best[block]

    return Loop(tuple(_instructions(body, graph, visit(head)[1])))


def _instructions(body: Body, graph: _Graph, blocks: Iterable[int]) -> Iterator[Instruction]:
    for block in sorted(blocks):
        yield from body[slice(*graph.spans[block])]


PRODUCTS = ("HGMMA", "HMMA")
COPIES = ("UTMALDG",)


def steps(body: Body) -> list[Loop]:
    """The innermost loops with a product."""
    return loops_with(body, PRODUCTS)


def producer_steps(body: Body) -> list[Loop]:
    """The innermost loops that wait for room and copy to shared memory, and multiply nothing."""
    return [loop for loop in loops_with(body, COPIES, ("SYNCS.PHASECHK",)) if not loop.count(*PRODUCTS)]
