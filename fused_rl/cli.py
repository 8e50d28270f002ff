"""The command line: `fused-rl doctor` says what runs here, `demo` trains a small model, `study`
computes what each KL does, `mismatch` says how far a rollout is from its trainer, `bench` measures
beside the peers, `plan` says what a head will need, `export-hub` writes what `kernels` loads.

Nothing heavier than torch is imported before a command needs it.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_rl
from fused_rl import ops
from fused_rl.system import commands, outputs
from fused_rl.system.commands import missing_of, usage_error
from fused_rl.system.numbers import above_zero, positive

BENCH_NEEDS = ("rich", "matplotlib")
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; argv without the program's name.

    Which status says what is in `system.commands.status_of`.
    """

    def run() -> int:
        arguments = build_parser().parse_args(argv)
        return arguments.command(arguments)

    return commands.status_of(run)


class Command(argparse.ArgumentParser):
    """The parser of a command.

    Args:
        later: adds options to the parser once its command is called: for options whose choices are
            not worth an import to any other command.
    """

    def __init__(
        self,
        *args: Any,
        later: Callable[[argparse.ArgumentParser], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.later = later

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple:
        """As of argparse, with the options that come later."""
        later, self.later = self.later, None
        if later:
            later(self)
        return super().parse_known_args(*args, **kwargs)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="fused-rl",
        description=fused_rl.__doc__.splitlines()[0],
        epilog="fused-rl COMMAND --help says what a command does and takes.",
    )
    parser.add_argument("--version", action="version", version=f"fused-rl {fused_rl.__version__}")
    parser.set_defaults(command=lambda _: parser.print_help() or 0)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Command)
    add_doctor(commands)
    add_demo(commands)
    add_study(commands)
    add_mismatch(commands)
    add_bench(commands)
    add_plan(commands)
    add_export_hub(commands)
    return parser


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """The doctor."""
    doctor_parser = commands.add_parser(
        "doctor",
        help="say which kernels run here, and why",
        description="Say which kernel serves each device, why not a better one, and which versions "
        "are here.",
    )
    measure = "what this CPU can do, and where the time of each way goes: about ten seconds"
    doctor_parser.add_argument("--measure", action="store_true", help=measure)
    doctor_parser.set_defaults(command=doctor)


def add_demo(commands: argparse._SubParsersAction) -> None:
    """The demo."""
    commands.add_parser(
        "demo",
        help="train a small model to sort digits by GRPO, or by a teacher",
        argument_default=argparse.SUPPRESS,
        later=add_demo_options,
    )


def add_demo_options(demo_parser: argparse.ArgumentParser) -> None:
    """The options of the demo; their names are those of DemoConfig and DistillConfig."""
    from fused_rl.demo import command

    command.add_options(demo_parser)


def add_study(commands: argparse._SubParsersAction) -> None:
    """The study."""
    commands.add_parser(
        "study",
        help="compute and draw what each KL option does",
        later=add_study_options,
    )


def add_study_options(study_parser: argparse.ArgumentParser) -> None:
    """The options of the study."""
    from fused_rl.study import command

    command.add_options(study_parser)


def add_mismatch(commands: argparse._SubParsersAction) -> None:
    """The report of a rollout."""
    commands.add_parser(
        "mismatch",
        help="say how far a trainer's log-probs are from its rollout's, and why",
        later=add_mismatch_options,
    )


def add_mismatch_options(mismatch_parser: argparse.ArgumentParser) -> None:
    """The options of the report."""
    from fused_rl.study.mismatch import command

    command.add_options(mismatch_parser)


def add_bench(commands: argparse._SubParsersAction) -> None:
    """The benchmark."""
    bench_parser = commands.add_parser(
        "bench",
        help="measure time, memory and error beside the peers",
        description="Run our ways and the peers in turns with the bare matrix products. Writes "
        "bench.json, bench.csv and pictures. `fused-rl bench compare A.json B.json` compares two.",
        later=add_bench_options,
    )
    bench_parser.set_defaults(command=bench)


def add_bench_options(bench_parser: argparse.ArgumentParser) -> None:
    """The options of the benchmark; their names are those of bench.run.BenchConfig."""
    from fused_rl.bench import peers

    add = bench_parser.add_argument
    works = "log-probs and policy steps, divergences from a teacher, or steps from pairs"
    choices = ("logprobs", "divergence", "preference")
    add("--work", choices=choices, default="logprobs", help=works)
    add("--preset", choices=peers.PRESETS, help="the head of a model: sets H and V")
    add("--tokens", type=positive, default=1024, help="N, a multiple of 8 (default: 1024)")
    add("--hidden", type=positive, help="H (default: 1024)")
    add("--vocabulary", type=positive, help="V (default: 32768)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of hidden and weight")
    add("--device", choices=tuple(peers.USUAL_PEERS), default="cpu")
    names = ", ".join(peers.PEERS)
    add("--peers", help=f"of {names}; or none (default: those found)")
    add("--rounds", type=positive, default=7, help="timed rounds (default: 7)")
    add("--sweep", action="store_true", help="smaller N, V, H and padding, for curves of logprobs")
    load = "beside so many processes that each keep a core busy; several: once beside each"
    add("--load", type=int, nargs="+", metavar="K", help=f"{load} (default: 0)")
    add("--out", metavar="DIR", default="out/bench", help="where the results go")
    actions = bench_parser.add_subparsers(metavar="compare")
    compare_parser = actions.add_parser("compare", help="what changed between two results")
    compare_parser.add_argument("before", type=Path, metavar="A.json")
    compare_parser.add_argument("after", type=Path, metavar="B.json")
    compare_parser.set_defaults(command=compare)


def add_plan(commands: argparse._SubParsersAction) -> None:
    """The options of the planner; their names are those of plan.memory.plan and plan.ranks."""
    from fused_rl.plan.devices import CARDS
    from fused_rl.plan.ranks import NAMES

    plan_parser = commands.add_parser(
        "plan",
        help="say what a head will need in memory, FLOP and time, in every way",
        description="Say what one step over N tokens will need in memory and in FLOP at a model's "
        "head, with eager torch and with each of our ways, and how many chunks it takes. For a GPU "
        "that is named, predict milliseconds too, by a model, and show what was measured. With "
        "--world, say what each of so many ranks will hold and receive. Of the model only its "
        "config.json is read.",
        epilog="example: fused-rl plan --model-config config.json --tokens 8192 --device h200",
    )
    add = plan_parser.add_argument
    add("--model-config", type=Path, required=True, metavar="FILE", help="a model's config.json")
    add("--tokens", type=positive, required=True, help="N of one call")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of hidden states and head")
    add("--frozen", action="store_true", help="the head is not trained")
    add("--chunk-bytes", type=positive, help="bound on the buffer for logits")
    add(
        "--device",
        choices=("cpu", "cuda", *CARDS),
        default="cpu",
        help="cuda: the kernels for GPUs; the name of one: as they run there, and times",
    )
    add = plan_parser.add_argument_group("of a head over several ranks").add_argument
    add("--world", type=positive, default=1, metavar="R", help="ranks (default: 1)")
    ways = f"of {', '.join(NAMES)}; or all (default: all)"
    add("--parallel", nargs="+", choices=(*NAMES, "all"), metavar="WAY", help=ways)
    add("--micro-batches", type=positive, metavar="M", help="calls of a step (default: 1)")
    add("--reduce-dtype", choices=DTYPES, help="of sums of dweight (default: --dtype)")
    add("--bandwidth", type=above_zero, metavar="GB/s", help="what a rank receives at")
    plan_parser.set_defaults(command=plan)


def add_export_hub(commands: argparse._SubParsersAction) -> None:
    """The options of the export."""
    export_parser = commands.add_parser(
        "export-hub",
        help="write a folder that Hugging Face's kernels loads",
        description="Write the kernels of this installation as a kernel repository: "
        "kernels.get_local_kernel(Path(DIR)) loads it, without fused_rl. Nothing is uploaded.",
    )
    export_parser.add_argument("directory", type=Path, metavar="DIR", help="new, or empty")
    export_parser.set_defaults(command=export_hub)


def doctor(arguments: argparse.Namespace) -> int:
    """Prints the kernel of each device, on a GPU whether each was right, and versions."""
    tried = ops.triton.check_every_kernel() if torch.cuda.is_available() else []
    for backend in fused_rl.backends():
        print(f"{backend.device:<14}{backend.kernel}")
        print(f"{'':<14}{backend.note}")
    for verdict in tried:
        print(f"{'':<14}{verdict.device}, {verdict.kernel}: {verdict.error or 'right'}")
    print(f"{'fused_rl':<14}{fused_rl.__version__}")
    print(f"{'torch':<14}{torch.__version__}")
    for name in ("triton", "transformers"):
        print(f"{name:<14}{installed_version(name)}")
    print(f"{'python':<14}{platform.python_version()}")
    print(f"{'threads':<14}{torch.get_num_threads()}")
    if arguments.measure:
        show_rates()
    return 0


def show_rates() -> None:
    """Measures this CPU, and prints each line when it is known."""
    from fused_rl.bench import roofline

    print()
    for line in roofline.lines():
        print(line, flush=True)


def installed_version(name: str) -> str:
    """The version of a distribution, without importing it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def bench(arguments: argparse.Namespace) -> int:
    """Runs the benchmark, if what it needs is there."""
    if missing := missing_of(BENCH_NEEDS):
        return usage_error("bench", f'needs {missing}: pip install "fused-rl[bench]"')
    from fused_rl.bench.run import BenchConfig, run

    try:
        config = BenchConfig(**bench_options(arguments))
    except ValueError as error:
        return usage_error("bench", str(error))
    try:
        return run(config)
    except outputs.UnusableFolder as error:
        return usage_error("bench", str(error))


def bench_options(arguments: argparse.Namespace) -> dict:
    """The options of the benchmark as those of bench.run.BenchConfig."""
    from fused_rl.bench import peers

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    del options["command"]
    if preset := options.pop("preset", None):
        H, V = peers.PRESETS[preset]
        options = {"hidden": H, "vocabulary": V, **options}
    chosen = options.get("peers", ",".join(peers.USUAL_PEERS[arguments.device]))
    options["load"] = tuple(options.get("load", (0,)))
    options["peers"] = () if chosen == "none" else tuple(chosen.split(","))
    return options


def compare(arguments: argparse.Namespace) -> int:
    """Compares two results of the benchmark."""
    if missing := missing_of(("rich",)):
        return usage_error("bench compare", f'needs {missing}: pip install "fused-rl[bench]"')
    from fused_rl.bench.report import compare_files

    try:
        return compare_files(arguments.before, arguments.after)
    except (OSError, ValueError) as error:
        return usage_error("bench compare", str(error))


def plan(arguments: argparse.Namespace) -> int:
    """Plans a head's memory and time."""
    if missing := missing_of(("rich",)):
        return usage_error("plan", f'needs {missing}: pip install "fused-rl[bench]"')
    from rich.console import Console

    from fused_rl.plan import memory as planner
    from fused_rl.plan.ranks_report import show_ranks
    from fused_rl.plan.report import show

    options = {
        "dtype": getattr(torch, arguments.dtype),
        "frozen": arguments.frozen,
        "chunk_bytes": arguments.chunk_bytes,
        "device": arguments.device,
    }
    try:
        config = outputs.read_json(arguments.model_config)
        planned = planner.plan(config, arguments.tokens, **options)
        over_ranks = plan_over_ranks(arguments, planned)
    except (OSError, ValueError) as error:
        return usage_error("plan", str(error))
    console = Console(width=118)
    show(console, planned)
    if over_ranks:
        show_ranks(console, *over_ranks, arguments.bandwidth)
    return 0


def plan_over_ranks(arguments: argparse.Namespace, planned: Any) -> tuple | None:
    """A rank in each way that is asked for, and its group; None of one rank."""
    from fused_rl.plan.ranks import NAMES, Group, ranks

    if arguments.world == 1:
        for name in ("parallel", "micro_batches", "reduce_dtype", "bandwidth"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} needs --world, the number of ranks, at least 2")
        return None
    reduce_dtype = getattr(torch, arguments.reduce_dtype or arguments.dtype)
    group = Group(arguments.world, arguments.micro_batches or 1, reduce_dtype)
    chosen = arguments.parallel or ["all"]
    return ranks(planned, group, NAMES if "all" in chosen else tuple(chosen)), group


def export_hub(arguments: argparse.Namespace) -> int:
    """Writes the kernel repository and names its variants."""
    from fused_rl.integrations import hub

    try:
        written = hub.export(arguments.directory)
    except (OSError, ValueError) as error:
        return usage_error("export-hub", str(error))
    for folder in written:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
