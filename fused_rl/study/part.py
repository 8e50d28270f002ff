"""What a part of the study is, and what one leaves behind: numbers, tables and pictures.

A part is a module: `measure` finds its numbers, which are all that is kept (JSON); `tables` and
PICTURES show them, and need nothing else, so that a page can be written from a file of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fused_rl.system import outputs

Numbers = dict[str, Any]
"""What JSON holds: no tensors, no times, and nothing else that a second run would change."""


@dataclass(frozen=True)
class Options:
    """What a part's numbers depend on.

    Args:
        seed: of everything that is drawn.
        quick: fewer samples, seeds and settings: all parts within three minutes on two cores.
    """

    seed: int = 0
    quick: bool = False


def rounded(numbers: Any) -> Any:
    """The same with ten significant digits, without what another order of sums would change."""
    if isinstance(numbers, Mapping):
        return {key: rounded(value) for key, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [rounded(value) for value in numbers]
    return float(f"{numbers:.10g}") if isinstance(numbers, float) else numbers


def derived_seed(seed: int, i: int) -> int:
    """Of the i-th case, below 1000, of a study; one that torch takes, whatever the seed."""
    return (1000 * seed + i) % 2**63


class Table(NamedTuple):
    """Rows of cells as they are read: numbers already rounded, with their units in the header."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Part(Protocol):
    """The module of a part.

    Attributes:
        NEEDS: packages that it imports and that are no dependencies of fused_rl.
        PICTURES: name of a file -> what makes a figure (see system.drawing) of the numbers.
    """

    NEEDS: tuple[str, ...]
    PICTURES: Mapping[str, Callable[[Numbers], Any]]

    def ticks(self, options: Options) -> int:
        """How often measure calls tick."""

    def measure(self, options: Options, tick: Callable[[], None]) -> Numbers:
        """The numbers; `tick` moves the progress bar."""

    def tables(self, numbers: Numbers) -> list[Table]:
        """What they say."""


def write(name: str, part: Part, numbers: Numbers, folder: Path) -> list[Path]:
    """NAME.json, and NAME-PICTURE.svg and .png for every picture; returns their paths."""
    from fused_rl.system.drawing import save

    paths = files(name, part, folder)
    outputs.write_json(paths[0], numbers)
    for picture, draw in part.PICTURES.items():
        figure = draw(numbers)
        for suffix in ("svg", "png"):
            save(figure, folder / f"{name}-{picture}.{suffix}")
    return paths


def files(name: str, part: Part, folder: Path) -> list[Path]:
    """What write writes."""
    pictures = [f"{name}-{p}.{suffix}" for p in part.PICTURES for suffix in ("svg", "png")]
    return [folder / file for file in (f"{name}.json", *pictures)]
