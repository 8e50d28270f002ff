"""One script for one GPU: correctness, the two ceilings, our cases beside the peers, a JSON.

    python bench/gpu.py --out bench/results/h200.json
    python bench/gpu.py --small              without a GPU: that the script itself works

Correctness comes first: values and gradients in every dtype against float64; the script ends there
if they are wrong. Then the ceilings (copy bandwidth, a large matrix product), then every case in
turns with the bare products of its shape. Meant to end within 8 minutes on one device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

import fused_rl
from fused_rl.bench import environment, judged_rows, stats_errors
from fused_rl.bench_clock import Clock, peak_extra_bytes
from fused_rl.bench_peers import PEERS, Case, batch_of, no_grad, products, steps

SHAPES = {
    "Qwen3-8B": (8192, 4096, 151936),
    "Gemma-2-2B": (8192, 2304, 256000),
    "Llama-3.2-1B": (16384, 2048, 128256),
}
SMALL = {"small": (64, 32, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 1 if args.small else args.rounds
    clock = Clock(device)
    content = {
        "environment": {**environment(device.type), **gpu()},
        "commit": commit(),
        "records": [],
    }
    content["correctness"] = correctness(device)
    content["ceilings"] = ceilings(device, clock, 2**16 if args.small else 2**30)
    for name, (N, H, V) in (SMALL if args.small else SHAPES).items():
        case = Case.make(N, H, V, torch.bfloat16, device)
        content["records"] += measure(name, case, clock, rounds)
        del case
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    print(f"written to {args.out}")


def gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"gpu": None}
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# Relative error that gradients may have: a rounding or two to the dtype.
BUDGET = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def correctness(device: torch.device) -> dict[str, list[float]]:
    """dtype -> errors of logprobs, entropy (largest) and dhidden, dweight, dbias (relative)."""
    found = {}
    for dtype, budget in BUDGET.items():
        torch.manual_seed(0)
        N, H, V = 300, 96, 5003
        inputs = [torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V)]
        labels = torch.randint(0, V, (N,)).where(torch.rand(N) < 0.8, -100)
        upstream = torch.randn(2, N, dtype=torch.float64)
        temperature = torch.rand(N, dtype=torch.float64) + 0.5
        exact = stats_and_gradients(inputs, labels, temperature, upstream, torch.float64, "cpu")
        ours = stats_and_gradients(inputs, labels, temperature, upstream, None, device)
        errors = [(a - b).abs().max().item() for a, b in zip(ours[:2], exact[:2], strict=True)]
        pairs = zip(ours[2:], exact[2:], strict=True)
        errors += [((a - b).norm() / b.norm()).item() for a, b in pairs]
        found[str(dtype).removeprefix("torch.")] = errors
        if max(errors[:2]) > 5e-5 or max(errors[2:]) > budget:
            raise SystemExit(f"wrong on {device} in {dtype}: {errors}")
    return found


def stats_and_gradients(inputs, labels, temperature, upstream, dtype, device) -> list[torch.Tensor]:
    """logprobs, entropy, dhidden, dweight, dbias as float64 on the CPU."""
    leaves = [t.to(device, dtype or t.dtype).requires_grad_() for t in inputs]
    head = fused_rl.LMHead(leaves[1], leaves[2], scale=0.7, softcap=5.0)
    t = temperature.to(device, torch.float64 if dtype else torch.float32)
    stats = fused_rl.linear_logprobs(leaves[0], head, labels.to(device), temperature=t)
    weights = [g.to(device, stats.logprobs.dtype) for g in upstream]
    objective = (stats.logprobs * weights[0]).sum() + (stats.entropy * weights[1]).sum()
    results = [*stats, *torch.autograd.grad(objective, leaves)]
    return [r.detach().double().cpu() for r in results]


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


def cases(case: Case) -> dict[str, tuple[int, dict[str, Callable]]]:
    """title -> (NHV multiples of its products, provider -> call)."""
    liger = all(find_spec(name) for name in PEERS["liger"].needs)
    peers = ("eager", "liger") if liger else ("eager",)
    batch, half = batch_of(case), batch_of(case, counted=0.5)
    compiled = ("compile",) if case.hidden.is_cuda else ()
    return {
        "log-probs and entropy, no gradient": (2, no_grad(case, (*peers, *compiled))),
        "GRPO step, head trained": (6, steps(case, batch, peers, frozen=False)),
        "GRPO step, head frozen": (4, steps(case, batch, peers, frozen=True)),
        "GRPO step, half the tokens masked": (6, steps(case, half, peers, frozen=False)),
    }


def measure(shape: str, case: Case, clock: Clock, rounds: int) -> list[dict]:
    records = []
    for title, (nhv, providers) in cases(case).items():
        runnable, failed = {}, {}
        for name, run in providers.items():
            try:
                failed[name] = error_of(case, title, run())
                runnable[name] = run
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                records.append(
                    {"shape": shape, "case": title, "provider": name, "failed": str(error)[:200]}
                )
        base = products(case, nhv)
        times = {name: [] for name in ("bare products", *runnable)}
        for _ in range(rounds):
            for name, run in {"bare products": base, **runnable}.items():
                times[name].append(clock(run) * 1e3)
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times["bare products"], strict=True)]
            records.append(
                {
                    "shape": shape,
                    "case": title,
                    "provider": name,
                    "nhv": nhv,
                    "ms_best": min(taken),
                    "ms_median": statistics.median(taken),
                    "ratio_to_products": statistics.median(ratios),
                    "peak_extra_bytes": peak(runnable.get(name), case),
                    "error": failed.get(name),
                }
            )
    return records


def error_of(case: Case, title: str, result) -> float | None:
    """Of log-probs against float64; a training step must be finite, and its sums are compared."""
    if title.startswith("log-probs"):
        rows = judged_rows(len(case.labels), 16).to(case.hidden.device)
        return stats_errors(case, (result[0][rows], None), rows)[0]
    if not all(t.isfinite().all() for t in result):
        raise RuntimeError("the loss or its gradients are not finite")
    return None


def peak(run: Callable | None, case: Case) -> int | None:
    if run is None or not case.hidden.is_cuda:
        return None
    return peak_extra_bytes(run, case.hidden.device)


def show(content: dict) -> None:
    for dtype, errors in content["correctness"].items():
        print(f"{dtype}: errors " + " ".join(f"{e:.1e}" for e in errors))
    print({k: round(v, 1) for k, v in content["ceilings"].items()})
    header = ("shape", "case", "provider", "ms", "x products", "peak MiB", "error")
    print("{:14}{:38}{:30}{:>9}{:>12}{:>10}{:>10}".format(*header))
    for r in content["records"]:
        if "failed" in r:
            print(f"{r['shape']:14}{r['case']:38}{r['provider']:30}  failed: {r['failed'][:60]}")
            continue
        memory = "" if r["peak_extra_bytes"] is None else f"{r['peak_extra_bytes'] / 2**20:.0f}"
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        print(
            f"{r['shape']:14}{r['case']:38}{r['provider']:30}{r['ms_median']:>9.2f}"
            f"{r['ratio_to_products']:>12.2f}{memory:>10}{error:>10}"
        )


if __name__ == "__main__":
    main()
