"""The command line: `fused-rl doctor` says what runs here, `fused-rl demo` trains a small model.

Nothing heavier than torch is imported before a command needs it.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

import fused_rl

DEMO_NEEDS = ("transformers", "rich", "matplotlib")
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; argv without the program's name."""
    arguments = build_parser().parse_args(argv)
    return arguments.command(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="fused-rl", description=fused_rl.__doc__)
    parser.add_argument("--version", action="version", version=f"fused-rl {fused_rl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor_parser = commands.add_parser("doctor", help="say which kernels run here, and why")
    doctor_parser.set_defaults(command=doctor)
    add_demo(commands)
    return parser


def add_demo(commands: argparse._SubParsersAction) -> None:
    """The options of the demo; their names are those of demo.DemoConfig."""
    estimators = ("k1", "k2", "k3", "abs")
    demo_parser = commands.add_parser(
        "demo",
        help="train a small model to sort digits by GRPO",
        description="Train a transformers model by GRPO to sort digits, through the fused head. "
        "Nothing is downloaded. Writes log.json and curves.png; Ctrl-C keeps what was logged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo_parser.add_argument
    add("--steps", type=positive, default=400, help="rollouts to train on")
    add("--seed", type=int, default=0, help="the same seed gives the same run")
    add("--beta", type=not_negative, default=0.02, help="weight of the KL penalty")
    add("--kl", choices=estimators, default="k3", help="estimator of the KL that is logged")
    add(
        "--kl-grad",
        choices=estimators,
        default=argparse.SUPPRESS,
        help="estimator whose derivative trains the model (default: that of --kl)",
    )
    add("--out", metavar="DIR", default="out/demo", help="where the log and the curves go")
    add(
        "--model",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="directory of a transformers model and its tokenizer, to train on the same task "
        "(default: a new model of two layers)",
    )
    demo_parser.set_defaults(command=demo)


def positive(text: str) -> int:
    """argparse: an integer above 0."""
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def not_negative(text: str) -> float:
    """argparse: a finite number that is not below 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, got {text}")
    return value


def doctor(arguments: argparse.Namespace) -> int:
    """Prints the kernel of each device, and versions."""
    for backend in fused_rl.backends():
        print(f"{backend.device:<14}{backend.kernel}")
        print(f"{'':<14}{backend.note}")
    print(f"{'fused_rl':<14}{fused_rl.__version__}")
    for name in ("torch", "triton", "transformers"):
        print(f"{name:<14}{installed_version(name)}")
    print(f"{'python':<14}{platform.python_version()}")
    print(f"{'threads':<14}{torch.get_num_threads()}")
    return 0


def installed_version(name: str) -> str:
    """The version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def demo(arguments: argparse.Namespace) -> int:
    """Runs the demo, if what it needs is there."""
    if missing := [name for name in DEMO_NEEDS if find_spec(name) is None]:
        return usage_error(f'needs {", ".join(missing)}: pip install "fused-rl[demo]"')
    from fused_rl.demo import DemoConfig, run
    from fused_rl.demo_task import UnusableModel

    options = {name: value for name, value in vars(arguments).items() if name != "command"}
    try:
        return run(DemoConfig(**options))
    except UnusableModel as error:
        return usage_error(str(error))


def usage_error(message: str) -> int:
    """Says on stderr why the demo does not run."""
    print(f"fused-rl demo: {message}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
