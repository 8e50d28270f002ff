"""The parts of bench/gpu.py: what each measures, in the order of what matters, as time allows."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import decisions
import forwards
import gpu_peers
import interpreted
import torch
from errors import BUDGET, correctness
from shapes import FIRST, SHAPES, SMALL, make_case

from fused_rl.bench.clock import Clock, Timing, interleaved, peak_extra_bytes
from fused_rl.bench.peers import Case
from fused_rl.bench.records import PRODUCTS, Record
from fused_rl.bench.tasks import (
    KINDS,
    NO_GRAD,
    STEP,
    Kind,
    Task,
    environment,
    head_task,
    judged,
    times,
    usable,
)
from fused_rl.bench.two_heads import (
    TWO_HEAD_KINDS,
    TWO_HEAD_PEERS,
    TwoHeadKind,
    TwoHeads,
    two_head_task,
)

# Every part, in the order in which they run.
PARTS = {
    "correctness": "values and gradients in every dtype against float64, small",
    "ceilings": "copy bandwidth, a large matrix product",
    "products": "each product of a step: TFLOP/s",
    "forwards": "every way through the forward pass: time, and error beside the products'",
    "chunks": "tokens of a chunk in the one pass, bytes of the logits in two passes",
    "cases": "ours, every kind of case of every preset; as users have it, and with all kernels",
    "graph": "a step in a CUDA graph",
    "rows": "the row kernels: GB/s beside a copy",
    "peers": "every kind of case of the first presets with the peers that are here",
    "divergences": "two heads, the first preset, beside the peers that are here",
    "compile": "the first preset with torch.compile, which takes as long as all the rest",
}
COMPILED = (NO_GRAD, STEP)
COMPILER = "compile"
# Seconds that are kept for what cannot stop in the middle.
RESERVE = 15.0
# What fails in these parts may be a peer's fault, and ours are judged by their records.
OF_PEERS = ("peers", "divergences", "compile")
Part = tuple[str, Callable[[], None]]


class Session:
    """What every part of the run needs, and what it has found so far."""

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        from fused_rl.kernels.configs import Device

        self.device, self.small, self.chosen = device, args.small, args.parts
        self.kernel_device = Device.of(device) if device.type == "cuda" else interpreted.device()
        self.sizes = decisions.SMALL if args.small else decisions.LARGE
        self.rounds = 1 if args.small else args.rounds
        self.clock = Clock(device)
        self.began = time.monotonic()
        self.end = self.began + args.budget
        self.shapes = SMALL if args.small else SHAPES
        self.first = list(SMALL) if args.small else list(FIRST)
        self.peers: tuple[str, ...] = ()
        self.content: Record = {
            "environment": {**environment(device.type), **gpu()},
            "commit": args.commit or commit(),
            "kernels": "Triton" if device.type == "cuda" else "Triton, interpreted",
            "parts": list(args.parts),
            "missing": [],
            "left out": [],
            "failed": {},
            "peers failed": {},
            "seconds": {},
            "correctness": {},
            "wrong": {},
        }
        kinds = ("forwards", "products", "row kernels", "chunks", "graph")
        self.content |= {name: [] for name in ("small cases", "records", *kinds)}

    def case(self, shape: str) -> Case:
        return make_case(*self.shapes[shape], self.device)

    def run_all(self, out: Path) -> None:
        """Each part, while the budget lasts; the results so far are on the disk after each."""
        out.parent.mkdir(parents=True, exist_ok=True)
        for name, title, part in self.parts():
            began = time.monotonic()
            # A run whose kernels nobody has judged would be worth nothing.
            if name != "correctness" and began > self.end - RESERVE:
                self.content["left out"].append(title)
                continue
            try:
                part()
            # One part of many; the script ends with an error after the others.
            except Exception as error:
                where = "peers failed" if name in OF_PEERS else "failed"
                self.content[where][title] = f"{type(error).__name__}: {error}"[:400]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.content["seconds"][title] = time.monotonic() - began
            print(f"{time.monotonic() - self.began:6.1f} s  {title}", flush=True)
            out.write_text(json.dumps(self.content, indent=1) + "\n")

    def parts(self) -> Iterator[tuple[str, str, Callable[[], None]]]:
        """Those that were asked for: the name, the title of a piece of it, and what to call."""
        for name in PARTS:
            if name in self.chosen:
                for title, part in getattr(self, f"parts_of_{name}")():
                    yield name, title, part

    def parts_of_correctness(self) -> Iterator[Part]:
        yield "correctness", self.judge_small

    def parts_of_ceilings(self) -> Iterator[Part]:
        yield "ceilings", self.ceilings

    def parts_of_products(self) -> Iterator[Part]:
        yield from self.of_first_shapes("products", decisions.products_of, self.rounds)

    def parts_of_forwards(self) -> Iterator[Part]:
        find = functools.partial(forwards.forwards, device=self.kernel_device)
        yield from self.of_first_shapes("forwards", find, self.rounds)

    def parts_of_chunks(self) -> Iterator[Part]:
        yield from self.of_first_shapes("chunks", decisions.chunks, min(self.rounds, 3))

    def parts_of_cases(self) -> Iterator[Part]:
        yield from self.measured("", self.shapes, KINDS, lambda: ())

    def parts_of_graph(self) -> Iterator[Part]:
        shape = self.first[0]
        yield (
            f"{shape}: graph",
            lambda: self.keep("graph", shape, decisions.graph(self.case(shape))),
        )

    def parts_of_rows(self) -> Iterator[Part]:
        shape = self.first[0]
        V = self.shapes[shape][2]
        args = (V, self.sizes, self.kernel_device, self.device, self.rounds, self.clock)
        name = "row kernels"
        yield f"{shape}: {name}", lambda: self.keep(name, shape, decisions.row_kernels(*args))

    def parts_of_peers(self) -> Iterator[Part]:
        yield "peers", self.find_peers
        yield from self.measured(", with peers", self.first, KINDS, self.without_compiler)
        for shape in self.first[:1]:
            title = f"{shape}: {gpu_peers.SUM.title}, with peers"
            yield title, functools.partial(self.measure_sum, shape)

    def parts_of_divergences(self) -> Iterator[Part]:
        shape = self.first[0]
        for kind in TWO_HEAD_KINDS:
            yield f"{shape}: {kind.title}", functools.partial(self.measure_two_heads, shape, kind)

    def parts_of_compile(self) -> Iterator[Part]:
        # The compiled peer beside all the others, whose rounds are then the same.
        if self.device.type == "cuda":
            if "peers" not in self.chosen:
                yield "peers", self.find_peers
            some = self.first[:1]
            yield from self.measured(", with torch.compile", some, COMPILED, lambda: self.peers)

    def of_first_shapes(self, name: str, find: Callable, rounds: int) -> Iterator[Part]:
        """find(case, sizes, rounds=, clock=) for each of them."""
        for shape in self.first:

            def part(shape=shape) -> None:
                found = find(self.case(shape), self.sizes, rounds=rounds, clock=self.clock)
                self.keep(name, shape, found)

            yield f"{shape}: {name}", part

    def measured(
        self, suffix: str, shapes: list[str], kinds: tuple[Kind, ...], peers: Callable
    ) -> Iterator[Part]:
        """peers(): their names, asked for when it is time."""
        for shape in shapes:
            for kind in kinds:

                def part(shape=shape, kind=kind) -> None:
                    self.measure(shape, head_task(self.case(shape), kind), peers())

                yield f"{shape}: {kind.title}{suffix}", part

    def judge_small(self) -> None:
        """Every op in every dtype, and our ways of every kind of case at an odd small size."""
        self.content["correctness"], self.content["wrong"] = correctness(self.device)
        for dtype in BUDGET:
            case = make_case(16, 20, 131, self.device, dtype)
            for kind in KINDS:
                task = head_task(case, kind)
                for name, run in decisions.with_unproven(task.ways(())).items():
                    record = {**task.fields, "provider": name, **judged(task, run)}
                    self.content["small cases"].append(record)

    def ceilings(self) -> None:
        elements = 2**16 if self.small else 2**30
        self.content["ceilings"] = ceilings(self.device, self.clock, elements)

    def find_peers(self) -> None:
        """Late, since to import them takes seconds."""
        self.peers, self.content["missing"] = gpu_peers.found(self.device)

    def without_compiler(self) -> tuple[str, ...]:
        return tuple(name for name in self.peers if name != COMPILER)

    def keep(self, name: str, shape: str, found: list[Record]) -> None:
        _, H, V = self.shapes[shape]
        self.content[name] += [{"shape": shape, "H": H, "V": V, **record} for record in found]

    def measure_sum(self, shape: str) -> None:
        task, missing = gpu_peers.sum_task(self.case(shape))
        self.content["missing"] += missing
        self.measure(shape, task, ())

    def measure_two_heads(self, shape: str, kind: TwoHeadKind) -> None:
        heads = TwoHeads.make(*self.shapes[shape], torch.bfloat16, self.device.type)
        names = (*TWO_HEAD_PEERS,) if self.device.type == "cuda" else ("eager",)
        peers, _ = usable(names, self.device.type, TWO_HEAD_PEERS)
        self.measure(shape, two_head_task(heads, kind), peers)

    def measure(self, shape: str, task: Task, peers: tuple[str, ...]) -> None:
        """Judges every provider, then times the right ones in turns with the bare products. What
        was known of the case before gives way: all of its records are of the same rounds.
        """
        providers = decisions.with_unproven(task.ways(peers))
        verdicts = {name: judged(task, run) for name, run in providers.items()}
        runs = {name: providers[name] for name, v in verdicts.items() if v["verdict"] == "right"}
        taken = self.rounds_of({PRODUCTS: task.bare[PRODUCTS], **runs})
        seconds = {name: [t.seconds for t in of] for name, of in taken.items()}
        records = []
        for name in (PRODUCTS, *providers):
            record = {"shape": shape, **task.fields, "provider": name}
            record |= verdicts.get(name, {"verdict": "right"})
            if name in taken:
                record |= {"rounds": len(taken[name]), **times(seconds[name], seconds[PRODUCTS])}
                record["host_ms"] = decisions.host_ms(taken[name])
            # In the interpreter it would be that of the interpreter.
            if name in runs and self.device.type == "cuda":
                record["peak_extra_bytes"] = peak_extra_bytes(runs[name], self.device)
            records.append(record)
        others = [
            r
            for r in self.content["records"]
            if (r["shape"], r["case"]) != (shape, task.fields["case"])
        ]
        self.content["records"] = [*others, *records]

    def rounds_of(self, runs: dict[str, Callable]) -> dict[str, list[Timing]]:
        """What each took in each round: one round at least, the rest while the budget lasts."""

        def enough() -> bool:
            return time.monotonic() > self.end - RESERVE

        return interleaved(runs, self.rounds, self.clock.timing, enough=enough)


def gpu() -> Record:
    import triton

    found: Record = {"triton": triton.__version__, "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda}
        found["multiprocessors"] = properties.multi_processor_count
    return found


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def ceilings(device: torch.device, clock: Clock, elements: int) -> dict[str, float]:
    """GB/s of a large copy (read and written), TFLOP/s of a large product of random bf16."""
    source = torch.randn(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(5))
    size = 8192 if device.type == "cuda" and elements > 2**20 else 256
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = min(clock(lambda: a @ b) for _ in range(5))
    return {
        "copy_GB_per_s": 8 * elements / copy / 1e9,
        "product_TFLOP_per_s": 2 * size**3 / product / 1e12,
    }
