"""One GRPO step of TRL's trainer at a real vocabulary: TRL alone, TRL patched, FusedGRPOTrainer.

    python bench/trl_step.py --out bench/results/trl.json
    python bench/trl_step.py --small --out out/trl.json        to see that it works
    python bench/trl_step.py --readme bench/results/trl.json   measures nothing: the table

A real trl.GRPOTrainer with TRL's defaults, around a Qwen2 of two layers with random weights, made
here as is the tokenizer. Each way runs in processes of its own, in turns. A step is what follows
the generation: loss, backward pass and optimizer; generation and rewards are reported apart. The
memory is how far a step rises above what was resident when it began, and what it reached in all.
The first gradient norms of the three must agree, since every way begins with the same numbers, and
our head must have served the steps that are said to be ours, and no other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from run import PAGE, replace_block

import fused_rl
from fused_rl.bench.clock import process_bytes
from fused_rl.bench.records import MIB, Record
from fused_rl.bench.tasks import environment
from fused_rl.integrations import trl as integration
from fused_rl.integrations.trl import forming, logprobs
from fused_rl.system.outputs import try_folder, write_json

WAYS = ("TRL", "TRL, patched()", "FusedGRPOTrainer")
GENERATIONS = 8  # completions of a prompt
# Relative difference of the first gradient norms: the roundings of a bfloat16 model.
SAME = {"float32": 1e-3, "bfloat16": 3e-2}


class Shape(NamedTuple):
    """A model and a step of it."""

    vocabulary: int = 151936
    hidden: int = 512
    sequences: int = 32
    completion: int = 48
    prompt: int = 16
    dtype: str = "bfloat16"
    tied: bool = True


SMALL = Shape(vocabulary=200, hidden=32, sequences=8, completion=12, prompt=4)


def main() -> int:
    args = options()
    if args.child is not None:
        print(json.dumps(child(WAYS[args.child], Shape(*json.loads(args.shape)), args.steps)))
        return 0
    if args.readme:
        link = os.path.relpath(args.readme.resolve(), PAGE.resolve().parent)
        replace_block(PAGE, "trl", table(json.loads(args.readme.read_text()), link))
        return 0
    try_folder(args.out.parent, args.out.name)
    shape = SMALL if args.small else Shape(hidden=args.hidden)
    shape = shape._replace(dtype=args.dtype, tied=not args.untied)
    found: dict[str, list[Record]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for number, way in enumerate(WAYS):
            began = time.monotonic()
            found[way].append(in_a_child(number, shape, args.steps))
            print(f"{way}: {time.monotonic() - began:.0f} s", flush=True)
    records = [merged(way, results) for way, results in found.items()]
    content = {"environment": environment(), "shape": shape._asdict(), "records": records}
    write_json(args.out, content)
    show(content)
    print(f"written to {args.out}")
    return int(not agree(records, SAME[shape.dtype]))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/trl.json"))
    parser.add_argument("--readme", type=Path, metavar="RESULT.json", help="measure nothing")
    parser.add_argument("--small", action="store_true", help="a vocabulary of 200")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each way")
    parser.add_argument("--hidden", type=int, default=Shape().hidden)
    parser.add_argument("--dtype", choices=SAME, default=Shape().dtype)
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_child(way: int, shape: Shape, steps: int) -> Record:
    """What `child` says, in a process that has done nothing else."""
    command = [sys.executable, __file__, "--child", str(way), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--shape", json.dumps(shape)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(f"{WAYS[way]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(way: str, shape: Shape, steps: int) -> Record:
    """Trains for one step that is not counted, and `steps` that are."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(way, shape, steps + 1, folder)
        watch, calls = Watch(trainer), count_ours()
        with integration.patched() if way == "TRL, patched()" else nullcontext():
            trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "seconds": watch.step_seconds[1:],
        "generation_seconds": watch.generation_seconds[1:],
        "peak_extra_bytes": max(watch.extra_bytes[1:]),
        "peak_bytes": max(watch.peak_bytes[1:]),
        "completion_tokens": watch.tokens[1:],
        "grad_norms": norms,
        "calls_of_ours": len(calls),
    }


def count_ours() -> list[str]:
    """Grows with every call of our head by the integration."""
    calls: list[str] = []

    def counted(module: ModuleType, name: str) -> Callable:
        function = getattr(module, name)
        return lambda *args, **options: calls.append(name) or function(*args, **options)

    for module in (forming, logprobs):
        for name in [name for name in vars(module) if name.startswith("linear_")]:
            setattr(module, name, counted(module, name))
    return calls


def build(way: str, shape: Shape, steps: int, folder: str) -> Any:
    """The trainer; random numbers are the same for every way."""
    import trl
    from datasets import Dataset

    torch.manual_seed(0)
    words = torch.randint(3, shape.vocabulary, (shape.sequences, shape.prompt)).tolist()
    prompts = [" ".join(f"w{i}" for i in row) for row in words]
    args = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=shape.dtype == "bfloat16",
        per_device_train_batch_size=shape.sequences,
        num_generations=GENERATIONS,
        max_completion_length=shape.completion,
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    given = {
        "model": model(shape),
        "reward_funcs": reward,
        "args": args,
        "processing_class": tokenizer(shape.vocabulary),
        "train_dataset": Dataset.from_dict({"prompt": prompts * steps}),
    }
    if way != "FusedGRPOTrainer":
        return trl.GRPOTrainer(**given)
    # The loss that TRL's defaults stand for.
    loss = fused_rl.dapo(clip_low=args.epsilon, clip_high=args.epsilon)
    return integration.FusedGRPOTrainer(**given, policy_loss=loss)


def model(shape: Shape) -> Any:
    """A Qwen2 of two layers; logits have a standard deviation of about 1."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=2,
        num_attention_heads=shape.hidden // 16,
        num_key_value_heads=2,
        max_position_embeddings=shape.prompt + shape.completion,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.hidden**-0.5,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(getattr(torch, shape.dtype))


def tokenizer(vocabulary: int) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(3, vocabulary))]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, padding_side="left", **special)


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of even tokens: it differs among completions, so that advantages are not 0."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Watch:
    """Times and memory of each step of a trainer, from the end of its generation on."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        self.step_seconds: list[float] = []
        self.generation_seconds: list[float] = []
        self.extra_bytes: list[int] = []
        self.peak_bytes: list[int] = []
        self.tokens: list[int] = []
        self.prepare: Callable = trainer._prepare_inputs
        trainer._prepare_inputs = self.prepared
        ends = type("Ends", (TrainerCallback,), {"on_step_end": lambda *_, **__: self.ended()})
        trainer.add_callback(ends())

    def prepared(self, batch: Any) -> Any:
        """The trainer's own, after which a step begins."""
        began = time.perf_counter()
        inputs = self.prepare(batch)
        self.generation_seconds.append(time.perf_counter() - began)
        self.tokens.append(int(inputs["completion_mask"].sum()))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.resident = process_bytes("VmRSS")
        self.began = time.perf_counter()
        return inputs

    def ended(self) -> None:
        self.step_seconds.append(time.perf_counter() - self.began)
        self.peak_bytes.append(process_bytes("VmHWM"))
        self.extra_bytes.append(max(0, self.peak_bytes[-1] - self.resident))


def merged(way: str, results: list[Record]) -> Record:
    """The processes of a way as one: medians of times, the largest peak."""
    seconds = [s for result in results for s in result["seconds"]]
    generation = [s for result in results for s in result["generation_seconds"]]
    tokens = [n for result in results for n in result["completion_tokens"]]
    return {
        "way": way,
        "seconds_median": statistics.median(seconds),
        "seconds_best": min(seconds),
        "seconds": seconds,
        "generation_seconds_median": statistics.median(generation),
        "peak_extra_bytes": max(result["peak_extra_bytes"] for result in results),
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "completion_tokens_median": statistics.median(tokens),
        "grad_norms": results[0]["grad_norms"],
        "calls_of_ours": min(result["calls_of_ours"] for result in results),
    }


def agree(records: list[Record], tolerance: float) -> bool:
    """Whether the first gradient norms are TRL's, and our head was called where it should be."""
    first, *others = (record["grad_norms"][0] for record in records)
    same = first > 0 and all(abs(norm - first) <= tolerance * first for norm in others)
    served = [record["calls_of_ours"] > 0 for record in records]
    return same and served == [way != "TRL" for way in WAYS]


def show(content: Record) -> None:
    shape, records = content["shape"], content["records"]
    where = content["environment"]
    print(
        f"V = {shape['vocabulary']}, H = {shape['hidden']}, {shape['dtype']}, "
        f"{records[0]['completion_tokens_median']:.0f} tokens, on {where['threads']} threads of "
        f"an {where['cpu']}; TRL {where['trl']}, torch {where['torch']}"
    )
    header = ("", "step, s", "x TRL", "extra, MiB", "in all, MiB", "generation, s", "grad norm")
    print("{:22}{:>10}{:>8}{:>12}{:>13}{:>15}{:>12}".format(*header))
    base = records[0]["seconds_median"]
    for r in records:
        print(
            f"{r['way']:22}{r['seconds_median']:>10.3f}{r['seconds_median'] / base:>8.2f}"
            f"{r['peak_extra_bytes'] / MIB:>12.0f}{r['peak_bytes'] / MIB:>13.0f}"
            f"{r['generation_seconds_median']:>15.2f}{r['grad_norms'][0]:>12.4g}"
        )


def table(content: Record, link: str) -> list[str]:
    """The lines between the page's marks."""
    shape, where, records = content["shape"], content["environment"], content["records"]
    base = records[0]["seconds_median"]
    rows = [
        f"| {r['way']} | {r['seconds_median']:.1f} | {r['seconds_median'] / base:.2f} "
        f"| {r['peak_extra_bytes'] / MIB:.0f} | {r['peak_bytes'] / MIB:.0f} |"
        for r in records
    ]
    return [
        f"One step of TRL {where['trl']}'s GRPOTrainer without its generation, on "
        f"{where['threads']} cores of an {where['cpu']}: {shape['dtype']}, a vocabulary of "
        f"{shape['vocabulary']}, H = {shape['hidden']}, two layers, "
        f"{records[0]['completion_tokens_median']:.0f} tokens of completion "
        f"([{Path(link).name}]({link}), `python bench/trl_step.py`):",
        "",
        "| | seconds | x TRL | extra memory of the step, MiB | of the process, MiB |",
        "|---|---|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    sys.exit(main())
