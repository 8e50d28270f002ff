"""The command `fused-rl study`: its options, and what it prints.

Nothing heavier than torch is imported before the command runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_rl.study import part
from fused_rl.system import outputs
from fused_rl.system.commands import missing_of, usage_error
from fused_rl.system.numbers import seed

NAMES = ("estimators", "gradients", "training", "overoptimisation")
NEEDS = ("rich", "matplotlib")
# Of tables in a file.
WIDTH = 118
DESCRIPTION = (
    "Compute what each KL option does, with this library: how well its value is estimated, how "
    "biased and noisy its gradient is, what it trains, and how far a proxy reward may be followed. "
    "Prints tables; writes their numbers as JSON, and pictures as SVG and PNG. The same seed gives "
    "the same files on the same machine. docs/kl.md is made of them."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the study, and what it does."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("part", nargs="?", choices=(*NAMES, "all"), default="all", help="(default: all)")
    add("--out", metavar="DIR", default="out/study", help="where files go (default: out/study)")
    add("--seed", type=seed, default=0, help="of all that is drawn (default: 0)")
    add("--quick", action="store_true", help="less of it, within three minutes")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts that were asked for; each is written as soon as it is done."""
    chosen = NAMES if arguments.part == "all" else (arguments.part,)
    if missing := missing_of(NEEDS):
        return usage_error("study", f'needs {missing}: pip install "fused-rl[demo]"')
    parts = {name: load(name) for name in chosen}
    if missing := missing_of([need for p in parts.values() for need in p.NEEDS]):
        return usage_error("study", f'needs {missing}: pip install "fused-rl[demo]"')
    folder = Path(arguments.out)
    try:
        files = [path.name for name, p in parts.items() for path in part.files(name, p, folder)]
        outputs.try_folder(folder, *files)
    except outputs.UnusableFolder as error:
        return usage_error("study", str(error))
    options = part.Options(arguments.seed, arguments.quick)
    for name, chosen_part in parts.items():
        study(name, chosen_part, options, folder)
    return 0


def load(name: str) -> part.Part:
    """The module of a part."""
    from importlib import import_module

    return import_module(f"fused_rl.study.{name}")


def study(name: str, chosen: part.Part, options: part.Options, folder: Path) -> None:
    """Measures a part under a progress bar, shows its tables, and writes its files."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=WIDTH)
    columns = (TextColumn(name), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task("", total=chosen.ticks(options))
        numbers = part.rounded(chosen.measure(options, lambda: progress.advance(task)))
    show(console, chosen.tables(numbers))
    part.write(name, chosen, numbers, folder)
    console.print(f"Wrote {folder / name}.json and {len(chosen.PICTURES)} pictures.")


def show(console, tables: list[part.Table]) -> None:
    """Tables on a terminal."""
    from rich.table import Table

    for found in tables:
        grid = Table(title=found.title, title_justify="left", title_style="bold")
        for i, column in enumerate(found.header):
            grid.add_column(column, justify="left" if i == 0 else "right")
        for row in found.rows:
            grid.add_row(*row)
        console.print(grid)
