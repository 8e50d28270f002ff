"""Machine code as a graph of blocks, and how many instructions a pass through its main loop takes.

It reads what nvdisasm prints of a cubin, and the assembly that LLVM writes for AMD.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w\s+)?([A-Z][A-Z0-9_.]*)(.*)")
AMDGCN = re.compile(r"\t()([a-z]\w+)(.*)")
LABEL = re.compile(r"([.$\w]+):")
# What ends a block. A call of a plain label is a way to jump far, and may come back or not.
JUMPS = re.compile(r"(BRA|BRX|JMP|JMX|CALL|EXIT|RET|s_branch|s_cbranch|s_endpgm|s_setpc)")
# A product on tensor cores; a load from global memory.
PRODUCT = re.compile(r"(HGMMA|UTC\w*MMA|HMMA|v_mfma)")
LOAD = re.compile(r"(LDG|UTMALDG|(global|buffer)_load_)")

# What a row of the table counts. 16 bytes at a time, or 32, are what vectors are for.
COUNTED = {
    "HGMMA": r"HGMMA",
    "UTCHMMA": r"UTC\w*MMA",
    "HMMA": r"HMMA",
    "v_mfma": r"v_mfma",
    "UTMALDG": r"UTMALDG",
    "UTMASTG": r"UTMASTG",
    "LDGSTS": r"LDGSTS",
    "LDG": r"LDG\.",
    "LDG.128": r"LDG(STS)?\..*(128|256)",
    "STG": r"STG\.",
    "STG.128": r"STG\..*(128|256)",
    "LDL": r"LDL",
    "STL": r"STL",
    "load": r"(global|buffer)_load_",
    "load.128": r"(global|buffer)_load_dwordx4",
    "store": r"(global|buffer)_store_",
    "store.128": r"(global|buffer)_store_dwordx4",
    "scratch": r"scratch_",
}


class Block(NamedTuple):
    """Instructions that run one after another, and the blocks that may follow, by number."""

    opcodes: list[str]
    after: set[int]


Edges = dict[int, set[int]]


def blocks(text: str) -> list[Block]:
    """The blocks in the order of the text; the first is where the kernel begins."""
    pattern = SASS if "/*0000*/" in text else AMDGCN
    opcodes: list[list[str]] = [[]]
    jumps: dict[int, tuple[list[str], bool]] = {}
    places: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            if opcodes[-1]:
                opcodes.append([])
            places[label[1]] = len(opcodes) - 1
        elif (found := pattern.match(line)) and found[2] != "NOP":
            opcodes[-1].append(found[2])
            if JUMPS.match(found[2]):
                jumps[len(opcodes) - 1] = jump(*found.groups())
                opcodes.append([])
    code = []
    for n, block in enumerate(opcodes):
        targets, falls = jumps.get(n, ([], True))
        after = {places[target] for target in targets}
        code.append(Block(block, after | {n + 1} if falls and n + 1 < len(opcodes) else after))
    return code


def jump(guard: str | None, opcode: str, operands: str) -> tuple[list[str], bool]:
    """The labels that a jump may go to, and whether it may also go on."""
    if opcode == "s_cbranch_execz":
        # Lanes that are off jump on AMD where NVIDIA's have a guard: some lane is on.
        return [], True
    predicate = "," in operands.split("`")[0]
    falls = bool(guard) or predicate or opcode.startswith(("CALL", "s_cbranch"))
    return re.findall(r"\.L\w+", operands), falls


def counts(code: list[Block]) -> dict[str, int]:
    """How often each of COUNTED stands in the code, where it does."""
    opcodes = [opcode for block in code for opcode in block.opcodes]
    found = {name: sum(bool(re.match(p, o)) for o in opcodes) for name, p in COUNTED.items()}
    return {name: count for name, count in found.items() if count}


def reached(start: int, edges: Edges) -> set[int]:
    """What can come after `start`; with it only if it lies on a circle."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        for after in edges[waiting.pop()] - seen:
            seen.add(after)
            waiting.append(after)
    return seen


def circles(edges: Edges) -> list[frozenset[int]]:
    """The strongly connected parts that hold a loop."""
    after = {node: reached(node, edges) for node in edges}
    found = {frozenset(b for b in after[a] if a in after[b]) for a in edges if a in after[a]}
    return sorted(found, key=min)


class Loop(NamedTuple):
    """The blocks of a loop, and those among them where it is entered."""

    body: frozenset[int]
    heads: frozenset[int]


def once(loop: Loop, edges: Edges) -> Edges:
    """The blocks of a loop without the way back to its heads."""
    return {node: (edges[node] & loop.body) - loop.heads for node in loop.body}


def nests(edges: Edges, holders: set[int]) -> Iterator[tuple[Loop, ...]]:
    """Every innermost loop around one of the holders, with the loops around it, outermost first."""
    entered = {a: {b for b in edges if a in edges[b]} for a in edges}
    for body in circles(edges):
        if body & holders:
            heads = frozenset(n for n in body if entered[n] - body) or frozenset([min(body)])
            loop = Loop(body, heads)
            inner = list(nests(once(loop, edges), holders))
            yield from ((loop, *rest) for rest in inner or [()])


def shortest(edges: Edges, cost: list[int], start: Iterable[int], via: set[int]) -> dict[int, int]:
    """The fewest instructions up to the end of each block on a way through one of `via`."""
    waiting = [(cost[node], node, node in via) for node in start]
    known: dict[tuple[int, bool], int] = {}
    heapq.heapify(waiting)
    while waiting:
        spent, node, passed = heapq.heappop(waiting)
        if (node, passed) in known:
            continue
        known[node, passed] = spent
        for after in edges[node]:
            heapq.heappush(waiting, (spent + cost[after], after, passed or after in via))
    return {node: spent for (node, passed), spent in known.items() if passed}


def holders(code: list[Block], pattern: re.Pattern) -> set[int]:
    """The blocks in which such an instruction stands."""
    return {n for n, block in enumerate(code) if any(map(pattern.match, block.opcodes))}


def a_pass(loop: Loop, edges: Edges, cost: list[int], via: set[int]) -> int:
    """The fewest instructions from a head of the loop back to one."""
    spent = shortest(once(loop, edges), cost, loop.heads, via)
    return min(spent[node] for node in spent if edges[node] & loop.heads)


def a_run(code: list[Block], edges: Edges, cost: list[int], via: set[int]) -> int:
    """The fewest instructions from the beginning of the kernel to its end."""
    spent = shortest(edges, cost, [0], via)
    ends = {n for n in spent if not edges[n] and code[n].opcodes[-1] in ("EXIT", "s_endpgm")}
    return min(spent[node] for node in ends)


def main_loop(code: list[Block]) -> int:
    """Instructions of a pass through the main loop, on the shortest way: what is jumped over in
    most passes (the last columns, a tile with a label, a barrier that is not open yet) is not in.

    Where there are products on tensor cores, their innermost loop is left out, and the main loop
    is the one around it, or the kernel; of several such loops, the longest. Elsewhere it is the
    longest innermost loop that loads, or the kernel if none does.
    """
    cost = [len(block.opcodes) for block in code]
    edges = {n: block.after for n, block in enumerate(code)}
    live = reached(0, edges) | {0}
    edges = {n: after for n, after in edges.items() if n in live}
    products = list(nests(edges, holders(code, PRODUCT)))
    if products:
        inner = {n for nest in products for n in nest[-1].body}
        outside = [0 if n in inner else c for n, c in enumerate(cost)]
        around = {nest[-2] for nest in products if len(nest) > 1}
        if not around:
            return a_run(code, edges, outside, inner)
        return max(a_pass(loop, edges, outside, inner & loop.body) for loop in around)
    loads = list(nests(edges, holders(code, LOAD)))
    if loads:
        return max(a_pass(nest[-1], edges, cost, set(nest[-1].body)) for nest in loads)
    return a_run(code, edges, cost, {0})
