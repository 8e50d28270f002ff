"""The command `fused-rl demo`: its options, and the processes that it runs in.

Nothing heavier than torch is imported before the command runs.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from fused_rl.system import outputs, processes
from fused_rl.system.commands import USAGE_ERROR, missing_of, usage_error
from fused_rl.system.numbers import not_negative, positive, seed

NEEDS = ("transformers", "rich", "matplotlib")
DESCRIPTION = (
    "Train a transformers model to sort digits, through the fused head: by GRPO, by distillation "
    "on its own answers from a larger model that has learned it, or from pairs of its own answers, "
    "the better one chosen. Nothing is downloaded. Writes log.json and curves.png; Ctrl-C keeps "
    "what was logged."
)
# Of the command, where the others are of the configs of the tasks, by their names there.
_OF_THE_COMMAND = ("command", "task", "processes")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the demo, and what it does. What is not given is not there."""
    parser.description = DESCRIPTION
    estimators = ("k1", "k2", "k3", "abs")
    add = parser.add_argument
    add("--task", choices=("grpo", "distill", "preference"), default="grpo", help="(default: grpo)")
    add(
        "--steps",
        type=positive,
        help="updates, or rollouts (default: 400; distill: 250; preference: 200)",
    )
    add("--seed", type=seed, help="the same seed gives the same run (default: 0)")
    add("--out", metavar="DIR", help="where the log and the curves go (default: out/demo)")
    add(
        "--beta",
        type=not_negative,
        help="weight of the KL penalty (default: 0.02); preference: what log-ratios, or simpo's "
        "mean log-probs, are multiplied by (default: 0.1; simpo: 2)",
    )
    add = parser.add_argument_group("of the task preference").add_argument
    add("--loss", choices=("dpo", "simpo"), help="with a reference, or without (default: dpo)")
    add = parser.add_argument_group("of the task grpo").add_argument
    add("--kl", choices=estimators, help="estimator of the KL that is logged (default: k3)")
    add(
        "--kl-grad",
        choices=estimators,
        help="estimator whose derivative trains the model (default: that of --kl)",
    )
    add(
        "--model",
        metavar="PATH",
        help="directory of a transformers model and its tokenizer, to train on the same task "
        "(default: a new model of two layers)",
    )
    add(
        "--processes",
        metavar="N",
        type=positive,
        help="share prompts and weights (FSDP2, on CPUs) among N processes, a divisor of 16; "
        "`torchrun -m fused_rl.demo` does the same (default: 1)",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo, if what it needs is there; in processes that it starts, or as one of those."""
    if missing := missing_of(NEEDS):
        return usage_error("demo", f'needs {missing}: pip install "fused-rl[demo]"')
    from fused_rl.demo import ranks, train
    from fused_rl.demo.distill import DistillConfig
    from fused_rl.demo.preference import PreferenceConfig
    from fused_rl.demo.task import UnusableModel

    options = {n: value for n, value in vars(arguments).items() if n not in _OF_THE_COMMAND}
    tasks = {"distill": DistillConfig, "preference": PreferenceConfig, "grpo": train.DemoConfig}
    made = tasks[arguments.task]
    if others := options.keys() - {field.name for field in fields(made)}:
        option = min(others).replace("_", "-")
        return usage_error("demo", f"--{option} is of another task than {arguments.task}")
    config, asked = made(**options), getattr(arguments, "processes", 1)
    if made is not train.DemoConfig and max(asked, ranks.announced()) > 1:
        return usage_error("demo", f"the task {arguments.task} runs in one process")
    if made is PreferenceConfig and config.beta == 0:
        return usage_error("demo", "--beta must be above 0 in the task preference")
    try:
        if asked > 1 and ranks.announced() == 1:
            return start(asked, config.prompts, {"out": config.out} | options)
        return train.run(config)
    except (outputs.UnusableFolder, UnusableModel, ranks.UnusableProcesses) as error:
        return usage_error("demo", str(error)) if ranks.is_first() else USAGE_ERROR


def start(count: int, prompts: int, options: dict[str, Any]) -> int:
    """The same command in several processes."""
    from fused_rl.demo import ranks

    ranks.can_share(prompts, count)
    paths = {n: Path(options[n]).absolute() for n in ("out", "model") if options.get(n)}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in (options | paths).items()]
    return processes.run(count, "-m", "fused_rl.demo", *given)
