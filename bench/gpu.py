"""One script for one GPU: correctness, the ceilings, our ways, the peers, a JSON.

    python bench/gpu.py --out bench/results/h200-bfloat16.json
    python bench/gpu.py --parts correctness,forwards   these parts alone
    python bench/gpu.py --small                        tiny; without a GPU interpreted
    python bench/gpu.py --warm                         compiles what the others try, in parallel
    compute-sanitizer --tool memcheck python bench/gpu.py --sanitize

What matters comes first, and every time is taken in turns with the bare products of its shape. The
results so far are written after each part. What is wrong or breaks is recorded, and the script goes
on and fails at its end; of peers it is recorded only. Ours run twice, as users have them and
("unproven") with the kernels that are off by default. What no longer fits into --budget seconds is
left out, and named.

Times are the device's (events); host_ms beside them is the time until the call returns. Where it is
as long, the call is bound by its launches, or waits for the device within.

It runs in a plain checkout: no build is needed, and no git (--commit says what it would). `make
gpu` runs it together with the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import decisions
import forwards
import gpu_session
import interpreted
import torch
from gpu_report import show
from interpreted import Launches
from shapes import SHAPES, make_case

from fused_rl.bench.records import OURS, Record
from fused_rl.bench.tasks import KINDS, head_task

# Tokens and vocabulary while warming: multiples of all that kernels are specialised for, and so few
# that many processes have room beside the tests.
FEW, NARROW = 64, 2**14
NO_GPU = "no CUDA device is here; --small runs without one, interpreted"


def main() -> int:
    args = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (args.small or args.sanitize):
        raise SystemExit(NO_GPU)
    if args.without_gluon:
        importlib.import_module("without_gluon")
    if args.warm:
        return warm(args.without_gluon)
    if device.type == "cpu":
        interpreted.start()
    launches = Launches(*kernel_modules())
    session = gpu_session.Session(device, args)
    session.run_all(args.out)
    content = session.content
    content["launches"] = dict(launches.count)
    # Every kernel of the package runs in that part.
    content["never launched"] = launches.idle() if "correctness" in args.parts else []
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    print(f"written to {args.out}")
    return int(failed(content))


def options() -> argparse.Namespace:
    listed = "\n".join(f"  {name:13}{what}" for name, what in gpu_session.PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts, in their order:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--sanitize", action="store_true", help="the part correctness alone")
    parser.add_argument("--warm", action="store_true", help="compile the kernels, and end")
    parser.add_argument(
        "--parts", type=parts, default=tuple(gpu_session.PARTS), metavar="NAME,...", help="below"
    )
    parser.add_argument("--without-gluon", action="store_true", help="as gpu_probe.py may advise")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot say it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    args = parser.parse_args()
    if args.sanitize:
        args.parts = ("correctness",)
    return args


def parts(text: str) -> tuple[str, ...]:
    """Names of parts, separated by commas."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in gpu_session.PARTS]:
        known = ", ".join(gpu_session.PARTS)
        raise argparse.ArgumentTypeError(f"no part is called {unknown[0]!r}; there are {known}")
    return names


def kernel_modules() -> list:
    """Every file of kernels/."""
    from fused_rl.kernels import logprobs

    names = sorted(path.stem for path in Path(logprobs.__file__).parent.glob("*.py"))
    return [importlib.import_module(f"fused_rl.kernels.{name}") for name in names]


def failed(content: Record) -> bool:
    """Whether one of our ways was wrong, a part of the script broke, or a kernel never ran."""
    ours = [*content["small cases"], *content["records"]]
    ours = [r for r in ours if r["provider"].startswith(OURS)]
    return (
        bool(content["wrong"])
        or any(r["verdict"] != "right" for r in ours)
        or not all(forwards.is_right(r) for r in content["forwards"] if "logprob_error" in r)
        or not all(r.get("within_an_ulp") for r in content["graph"])
        or bool(content["failed"])
        or bool(content["never launched"])
    )


def warm(without_gluon: bool) -> int:
    """Calls everything of ours once with few tokens, in many processes: what is compiled for it is
    kept where the later runs find it.
    """
    from fused_rl.kernels.configs import Device

    device = torch.device("cuda")
    titles = [*forward_calls(Device.of(device)), *(kind.title for kind in KINDS)]
    workers = min(len(titles), os.cpu_count())
    also = (importlib.import_module, ("without_gluon",)) if without_gluon else ()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), *also) as pool:
        list(pool.map(warm_one, titles))
    return 0


def forward_calls(kernel_device) -> dict:
    """Every way of the forward pass, with strides and sizes of the kind that is timed."""
    _, H, _ = next(iter(SHAPES.values()))
    case = make_case(FEW, H, NARROW, torch.device("cuda"))
    return forwards.forward_ways(case, decisions.LARGE, kernel_device)


def warm_one(title: str) -> None:
    """Calls it. What does not compile says so where it is measured."""
    from fused_rl.kernels.configs import Device

    device = torch.device("cuda")
    kinds = {kind.title: kind for kind in KINDS}
    with contextlib.suppress(Exception):
        if title not in kinds:
            forward_calls(Device.of(device))[title]()
            return
        case = make_case(16 * FEW, 1024, NARROW, device)
        for run in decisions.with_unproven(head_task(case, kinds[title]).ways(())).values():
            run()


if __name__ == "__main__":
    sys.exit(main())
