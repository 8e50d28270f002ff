"""One script for one GPU: correctness, the two ceilings, our cases beside the peers, a JSON.

    python bench/gpu.py --out bench/results/h200.json
    python bench/gpu.py --small                  tiny; without a GPU the kernels are interpreted
    python bench/gpu.py --warm                   compiles what the others try, in parallel
    compute-sanitizer --tool memcheck python bench/gpu.py --sanitize

Correctness comes first: values and gradients in every dtype against float64. Then the ceilings
(copy bandwidth, a large matrix product), then our own ways of every case in turns with the bare
products of its shape, then what decisions.py tries, then the peers in turns with us. What is wrong
is recorded, and the script goes on and fails at its end. What no longer fits into --budget seconds
is left out, and named. Every kernel of the package must have run by then.

It runs in a plain checkout: no build is needed, and no git (--commit says what it would).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import decisions
import interpreted
import torch
from errors import BUDGET, LOGPROB_ERROR, correctness
from gpu_peers import EXTRA
from gpu_report import show
from interpreted import Launches

from fused_rl.bench.clock import Clock, interleaved, peak_extra_bytes
from fused_rl.bench.peers import USUAL_PEERS, Case
from fused_rl.bench.records import OURS, PRODUCTS, Record
from fused_rl.bench.tasks import (
    KINDS,
    NO_GRAD,
    STEP,
    Kind,
    environment,
    head_task,
    judged,
    times,
    usable,
)

SHAPES = {
    "Qwen3-8B": (8192, 4096, 151936),
    "Gemma-2-2B": (8192, 2304, 256000),
    "Llama-3.2-1B": (16384, 2048, 128256),
}
SMALL = {"small": (16, 32, 200)}
# torch.compile takes as long as all the rest, where it is compiled anew for each case.
COMPILED = (NO_GRAD, STEP)
# Seconds that are kept for what cannot stop in the middle.
RESERVE = 15.0


def main() -> int:
    args = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.warm:
        return warm()
    if device.type == "cpu" and not (args.small or args.sanitize):
        raise SystemExit("no CUDA device is here; --small runs without one, interpreted")
    if device.type == "cpu":
        interpreted.start()
    launches = Launches(*kernel_modules())
    session = Session(device, args)
    content = session.content
    content["correctness"], content["wrong"] = correctness(device)
    content["small cases"] = small_cases(device)
    if not args.sanitize:
        session.run_all(args.out)
    content["launches"] = dict(launches.count)
    content["never launched"] = launches.idle()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    print(f"written to {args.out}")
    return int(failed(content))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--sanitize", action="store_true", help="the small correctness cases alone")
    parser.add_argument("--warm", action="store_true", help="compile the forwards, and end")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    return parser.parse_args()


def kernel_modules() -> list:
    """Every file of kernels/."""
    from fused_rl.kernels import logprobs

    names = sorted(path.stem for path in Path(logprobs.__file__).parent.glob("*.py"))
    return [importlib.import_module(f"fused_rl.kernels.{name}") for name in names]


def failed(content: Record) -> bool:
    """Whether one of our ways was wrong, a part of the script broke, or a kernel never ran."""
    ours = [*content["small cases"], *content["records"]]
    ours = [r for r in ours if r["provider"].startswith(OURS)]
    errors = [r["logprob_error"] for r in content["forwards"] if "logprob_error" in r]
    return (
        bool(content["wrong"])
        or any(r["verdict"] != "right" for r in ours)
        # Written so that NaN is wrong.
        or not all(error <= LOGPROB_ERROR for error in errors)
        or not all(r.get("within_an_ulp") for r in content["graph"])
        or bool(content["failed"])
        or bool(content["never launched"])
    )


class Session:
    """What every part of the run needs, and what it has found so far."""

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        from fused_rl.kernels.configs import Device

        self.device, self.small = device, args.small
        self.kernel_device = Device.of(device) if device.type == "cuda" else interpreted.device()
        self.rounds = 1 if args.small else args.rounds
        self.clock = Clock(device)
        self.began = time.monotonic()
        self.end = self.began + args.budget
        self.peers, missing = usable((*USUAL_PEERS["cuda"], *EXTRA), device.type)
        if device.type == "cpu":
            self.peers = self.without_compile()
            missing.append("torch.compile: only on a GPU")
        self.content: Record = {
            "environment": {**environment(device.type), **gpu()},
            "commit": args.commit or commit(),
            "kernels": "Triton" if device.type == "cuda" else "Triton, interpreted",
            "missing": missing,
            "left out": [],
            "failed": {},
            "seconds": {},
        }
        self.content |= {name: [] for name in ("records", *DECISIONS)}

    def case(self, shape: str) -> Case:
        return make_case(*(SMALL if self.small else SHAPES)[shape], self.device)

    def run_all(self, out: Path) -> None:
        """Each part, while the budget lasts; the results so far are on the disk after each."""
        elements = 2**16 if self.small else 2**30
        self.content["ceilings"] = ceilings(self.device, self.clock, elements)
        out.parent.mkdir(parents=True, exist_ok=True)
        for title, part in self.parts():
            began = time.monotonic()
            if began > self.end - RESERVE:
                self.content["left out"].append(title)
                continue
            try:
                part()
            # One part of many; the script ends with an error after the others.
            except Exception as error:
                self.content["failed"][title] = f"{type(error).__name__}: {error}"[:400]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.content["seconds"][title] = time.monotonic() - began
            print(f"{time.monotonic() - self.began:6.1f} s  {title}", flush=True)
            out.write_text(json.dumps(self.content, indent=1) + "\n")

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Ours and what they may decide, for every shape; then with the peers; compilers last."""
        shapes = list(SMALL if self.small else SHAPES)
        cases = [(shape, kind) for shape in shapes for kind in KINDS]
        for shape, kind in cases:
            yield f"{shape}: {kind.title}", functools.partial(self.measure, shape, kind, ())
        for i, shape in enumerate(shapes):
            for name in DECISIONS if i == 0 else ("forwards", "chunks"):
                yield f"{shape}: {name}", functools.partial(self.decide, name, shape)
        for title, peers, some in (
            ("with peers", self.without_compile(), cases),
            ("with torch.compile", self.peers, [(shapes[0], kind) for kind in COMPILED]),
        ):
            # Without a compiler the last parts would be those before again.
            if title == "with torch.compile" and peers == self.without_compile():
                continue
            for shape, kind in some:
                part = functools.partial(self.measure, shape, kind, peers)
                yield f"{shape}: {kind.title}, {title}", part

    def without_compile(self) -> tuple[str, ...]:
        return tuple(name for name in self.peers if name != "compile")

    def decide(self, name: str, shape: str) -> None:
        """What decisions.py tries."""
        case = self.case(shape)
        sizes = decisions.SMALL if self.small else decisions.LARGE
        found = DECISIONS[name](self, case, sizes)
        V, H = case.weight.shape
        self.content[name] += [{"shape": shape, "H": H, "V": V, **record} for record in found]

    def measure(self, shape: str, kind: Kind, peers: tuple[str, ...]) -> None:
        """Judges every provider, then times the right ones in turns with the bare products. What
        was known of the case before gives way: all of its records are of the same rounds.
        """
        task = head_task(self.case(shape), kind)
        providers = task.ways(peers)
        verdicts = {name: judged(task, run) for name, run in providers.items()}
        runs = {name: providers[name] for name, v in verdicts.items() if v["verdict"] == "right"}
        taken = self.rounds_of({PRODUCTS: task.bare, **runs})
        before = [
            r for r in self.content["records"] if (r["shape"], r["case"]) != (shape, kind.title)
        ]
        self.content["records"] = before
        for name in (PRODUCTS, *providers):
            record = {"shape": shape, **task.fields, "provider": name}
            record |= verdicts.get(name, {"verdict": "right"})
            if name in taken:
                record |= {"rounds": len(taken[name]), **times(taken[name], taken[PRODUCTS])}
            # In the interpreter it would be that of the interpreter.
            if name in runs and self.device.type == "cuda":
                record["peak_extra_bytes"] = peak_extra_bytes(runs[name], self.device)
            self.content["records"].append(record)

    def rounds_of(self, runs: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each in each round: one round at least, the rest while the budget lasts."""

        def enough() -> bool:
            return time.monotonic() > self.end - RESERVE

        return interleaved(runs, self.rounds, self.clock, enough=enough)


# What decisions.py tries, by name: (session, case, sizes) -> records.
DECISIONS: dict[str, Callable[[Session, Case, decisions.Sizes], list[Record]]] = {
    "forwards": lambda s, case, sizes: decisions.forwards(
        case, sizes, s.kernel_device, s.rounds, s.clock
    ),
    "products": lambda s, case, sizes: decisions.products_of(case, sizes, s.rounds, s.clock),
    "row kernels": lambda s, case, sizes: decisions.row_kernels(
        case.weight.shape[0], sizes, s.kernel_device, s.device, s.rounds, s.clock
    ),
    "chunks": lambda s, case, sizes: decisions.chunks(case, sizes, min(s.rounds, 3), s.clock),
    "graph": lambda s, case, sizes: decisions.graph(case),
}


def warm() -> int:
    """Compiles every forward that decisions.py tries, each in a process of its own: the compiler
    keeps what it made where the later runs find it.
    """
    ways = list(decisions.LARGE.fused)
    with ProcessPoolExecutor(len(ways), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm_one, ways))
    return 0


def warm_one(blocks: tuple[int, ...]) -> None:
    """The first shape with few tokens: strides and sizes of the kind that is timed."""
    from fused_rl.kernels.configs import Device

    _, H, V = next(iter(SHAPES.values()))
    device = torch.device("cuda")
    case = make_case(64, H, V, device)
    sizes = decisions.LARGE._replace(fused=(blocks,), tiles=())
    for run in decisions.forward_ways(case, sizes, Device.of(device)).values():
        # What does not compile says so where it is measured.
        with contextlib.suppress(Exception):
            run()


@functools.lru_cache(maxsize=1)
def make_case(N: int, H: int, V: int, device: torch.device, dtype=torch.bfloat16) -> Case:
    """As Case.make, with numbers from the device's own generator: a CPU's would take too long."""
    noise = torch.Generator(device).manual_seed(0)
    where = {"generator": noise, "device": device}
    hidden = (torch.randn(N, H, **where) * 4 / H**0.5).to(dtype)
    weight = torch.randn(V, H, **where).to(dtype)
    return Case(hidden, weight, torch.randint(0, V, (N,), **where))


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


def small_cases(device: torch.device) -> list[Record]:
    """Our ways of every kind of case at an odd small size, judged and not timed."""
    records = []
    for dtype in BUDGET:
        case = make_case(16, 20, 131, device, dtype)
        for kind in KINDS:
            task = head_task(case, kind)
            for name, run in task.ways(()).items():
                records.append({**task.fields, "provider": name, **judged(task, run)})
    return records


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


if __name__ == "__main__":
    sys.exit(main())
