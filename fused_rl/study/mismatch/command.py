"""The command `fused-rl mismatch`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fused_rl.rollouts.mismatch import LogitRounding, mismatch_report
from fused_rl.study.mismatch import dumps
from fused_rl.system import outputs
from fused_rl.system.commands import missing_of, usage_error
from fused_rl.system.numbers import above_zero

DESCRIPTION = (
    "Say how far a trainer's log-probs are from those of the engine that sampled, how much of it "
    "rounding explains, and what the rest looks like: another temperature, a kept set, shifted "
    "tokens, stale weights. FILE is a rollout as .json (a list of records, or an object of "
    "arrays), .jsonl or .parquet, with log-probs in nats, a list per sequence."
)
PICTURES = (".svg", ".png")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command, and what it does."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".json, .jsonl or .parquet")
    first = "default: the first of"
    names = ", ".join(dumps.LOGPROBS)
    add("--logprobs", metavar="NAME", help=f"field of the trainer ({first} {names})")
    add("--rollout", metavar="NAME", help=f"of the engine ({first} {', '.join(dumps.ROLLOUT)})")
    add("--mask", metavar="NAME", help=f"1 counts ({first} {', '.join(dumps.MASK)}; or all count)")
    usual = LogitRounding().magnitude
    magnitude = f"of likely tokens' logits, for what rounding gives (default: {usual:g})"
    add("--logit-magnitude", type=above_zero, default=usual, metavar="Z", help=magnitude)
    add("--picture", type=Path, metavar="OUT", help="draw it, as .svg or .png")
    add("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the report of a file, and draws it where that is asked for."""
    try:
        can_draw(arguments.picture)
        names = dumps.Names(arguments.logprobs, arguments.rollout, arguments.mask)
        rollout = dumps.read(arguments.file, names)
    except (OSError, ValueError) as error:
        return usage_error("mismatch", str(error))
    report = mismatch_report(
        rollout.logprobs,
        rollout.rollout_logprobs,
        rollout.loss_mask,
        cu_seqlens=rollout.cu_seqlens,
        rounding=LogitRounding(arguments.logit_magnitude),
    )
    if arguments.json:
        print(json.dumps({"fields": rollout.named, **report.numbers()}, indent=1))
    else:
        print(f"{'fields':<13}{outputs.one_line(', '.join(rollout.named))}\n{report}")
    if arguments.picture is not None:
        return draw(arguments.picture, report)
    return 0


def can_draw(path: Path | None) -> None:
    """ValueError where a picture is asked for that cannot be."""
    if path is None:
        return
    if path.suffix not in PICTURES:
        raise ValueError(f"--picture must be .svg or .png, got {path}")
    if missing := missing_of(("matplotlib",)):
        raise ValueError(f"--picture needs {missing}: pip install matplotlib")
    outputs.try_folder(path.parent, path.name)


def draw(path: Path, report) -> int:
    """Writes the picture, unless there is nothing to see."""
    from fused_rl.study.mismatch import picture

    if not len(report.logprobs):
        return usage_error("mismatch", f"{report.verdict}: {path} is not drawn")
    picture.write(path, report)
    return 0
