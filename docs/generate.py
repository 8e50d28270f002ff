"""The tables of docs/ that the code knows, written between their marks: `make docs` runs this.

docs/losses.md    from the docstrings of losses/, and of the named losses
docs/distillation.md    from the docstrings of losses/distillation.py
docs/preference.md      from the docstrings of losses/preference/
docs/kl.md        the expected gradients that study/enumeration.py and exact_enumeration.py find,
                  and what losses on preferences end at (preference_world.py)
                  what `fused-rl study` found, of its files in docs/study/
docs/study.md     all of that
docs/predictions.md     what fused_rl/plan says of one head over ranks
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pdoc.doc import Doc

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("docs", "bench", "tests")]

from preference_world import PreferenceWorld, preference_markdown  # noqa: E402 - see above
from reference import Page, pages  # noqa: E402
from run import replace_block  # noqa: E402

from fused_rl.losses import (  # noqa: E402
    distillation,
    means,
    named,
    ratios,
    surrogates,
    trust_regions,
)
from fused_rl.losses.preference import links, scores  # noqa: E402
from fused_rl.losses.preference import named as preferences  # noqa: E402
from fused_rl.losses.sequences import Level  # noqa: E402
from fused_rl.plan import ranks, ranks_report  # noqa: E402
from fused_rl.plan.memory import plan  # noqa: E402
from fused_rl.study import command  # noqa: E402
from fused_rl.study.enumeration import World, markdown  # noqa: E402
from fused_rl.study.exact_enumeration import ExactWorld, exact_markdown  # noqa: E402
from fused_rl.system.outputs import read_json  # noqa: E402


def named_losses() -> list[str]:
    """A row for each loss that has a name."""
    rows = [(f"`{name}`", *parts(inspect.getdoc(loss))) for name, loss in named.NAMES.items()]
    return table(("name", "loss", "from", "mean over", "TRL 1.16", "verl 0.9.1"), rows)


def parts(docstring: str) -> tuple[str, ...]:
    """Formula, source, mean, and the names in TRL and in verl, of a named loss's docstring."""
    first, _, rest = docstring.partition("\n\n")
    formula, source = first.rstrip(".").split(": ", 1)
    text = " ".join(rest.split())
    mean = re.search(r"Mean over (.*?)[.:] ", text)[1]
    elsewhere = re.search(r"Elsewhere: (.*)\.$", text)
    names = dict(name.split(" ", 1) for name in elsewhere[1].split("; ")) if elsewhere else {}
    return f"`{formula}`", linked(source), mean, *(names.get(who, "") for who in ("TRL", "verl"))


def distillation_losses() -> list[str]:
    """A row for each loss of distillation that has a name."""
    rows = []
    for name in distillation.__all__:
        first, _, rest = inspect.getdoc(getattr(distillation, name)).partition("\n\n")
        text = " ".join(rest.split())
        if samples := re.search(r"Samples: (.*?)\. ", text):
            formula, source = " ".join(first.split()).rstrip(".").split(": ", 1)
            elsewhere = re.search(r"Elsewhere: (.*)\.$", text)
            names = elsewhere[1] if elsewhere else ""
            rows.append((f"`{name}`", f"`{formula}`", linked(source), samples[1], names))
    return table(("name", "loss", "from", "samples", "elsewhere"), rows)


def preference_losses() -> list[str]:
    """A row for each preference loss that has a name."""
    rows = []
    for name, loss in preferences.NAMES.items():
        first, _, rest = inspect.getdoc(loss).partition("\n\n")
        text = " ".join(rest.split())
        formula, source = " ".join(first.split()).rstrip(".").split(": ", 1)
        paper = re.search(r"arXiv \d{4}\.\d{5}", text)
        if "arXiv" not in source and paper:
            source += f" ({paper[0]})"
        elsewhere = re.search(r"Elsewhere: TRL (.*)\.$", text)
        rows.append(
            (f"`{name}`", f"`{formula}`", linked(source), elsewhere[1] if elsewhere else "")
        )
    return table(("name", "loss", "from", "TRL"), rows)


def of_calls(heading: str, module: object, columns: tuple[str, ...]) -> list[str]:
    """A module's own tables, indented in its docstring, of rows that begin with Name(arguments)."""
    rows = []
    for line in re.findall(r"^ {4}(\w+\(.*)$", module.__doc__, re.MULTILINE):
        name, *cells = re.split(r"\s{2,}", line)
        assert hasattr(module, name.partition("(")[0]), name
        cells = [*cells, ""][: len(columns)]
        rows.append((f"`{name}`", f"`{cells[0]}`", *(c and _code(c) for c in cells[1:])))
    return table((heading, *columns), rows)


def _code(cell: str) -> str:
    """A formula as one; words as they are."""
    return f"`{cell}`" if re.search(r"[(^]", cell) else cell


def linked(source: str) -> str:
    """With each paper a link."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def levels() -> list[str]:
    """A row for each Level."""
    found = re.findall(
        r"([A-Z]+): (.*?)(?=\. [A-Z]+:|\.$)", " ".join(inspect.getdoc(Level).split())
    )
    rows = [(f"`Level.{name}`", f'"{Level[name].value}"', text) for name, text in found]
    assert len(rows) == len(Level)
    return table(("level", "value", "the log-ratio"), rows)


def of_module(heading: str) -> Callable[..., list[str]]:
    """A module's own table, which is indented in its docstring."""

    def rows(module: object, columns: tuple[str, ...]) -> list[str]:
        block = re.search(r"\n\n((?: {4}.*\n|\n)+)", module.__doc__)[1]
        cells = [re.split(r"\s{2,}", line.strip()) for line in block.splitlines()]
        known = [row for row in cells if hasattr(module, row[0])]
        return table((heading, *columns), [(f"`{name}`", *more) for name, *more in known])

    return rows


def first_lines(*modules: object) -> list[str]:
    """A row for each class of modules: what its docstring's first line says."""
    rows = []
    for module in modules:
        for name, found in vars(module).items():
            if inspect.isclass(found) and found.__module__ == module.__name__ and name[0] != "_":
                rows.append((f"`{name}`", inspect.getdoc(found).split("\n")[0].rstrip(".")))
    return table(("surrogate", "what it is"), rows)


def public_names() -> list[str]:
    """A list of names for each public module."""
    lines = []
    for path, page in pages().items():
        rows = [(f"`{doc.name}`", first_paragraph(doc.docstring)) for doc in public(page)]
        lines += ["", f"## {path}", "", first_paragraph(page.docstring), "", *table(("", ""), rows)]
    return lines[1:]


def public(page: Page) -> list[Doc]:
    """What a page has, without what its leading underscore calls private."""
    return [doc for doc in page.own_members if not doc.name.startswith("_")]


def first_paragraph(docstring: str) -> str:
    """In one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Markdown; a bar inside a cell is written as one."""
    written = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    assert all(len(row) == len(header) for row in written), written
    lines = [header, ["---"] * len(header), *written]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def over_ranks() -> list[str]:
    """What one of 8 ranks receives, in every way, at the head of Qwen3-8B."""
    planned = plan({"hidden_size": 4096, "vocab_size": 151936}, 8192, device="h200")
    group = ranks.Group(8, 1, torch.bfloat16)
    rows = ranks_report.received_rows(ranks.ranks(planned, group), group)
    return table(("way", *ranks_report.MOVED), rows)


def studied(name: str, *titles: str) -> list[str]:
    """Tables of a part of the study whose titles begin so, each under its title; all if none is
    given."""
    part, numbers = command.load(name), read_json(ROOT / "docs" / "study" / f"{name}.json")
    found = part.tables(numbers)
    if name == "gradients" and not titles:
        found.append(part.everything(numbers))
    chosen = [next(t for t in found if t.title.startswith(title)) for title in titles] or found
    lines = []
    for title, header, rows in chosen:
        lines += ["", f"**{title}**", "", *table(header, rows)]
    return lines[1:]


def claims() -> list[str]:
    """A row for each claim of a paper, of all parts."""
    rows = []
    for name in command.NAMES:
        part, numbers = command.load(name), read_json(ROOT / "docs" / "study" / f"{name}.json")
        (found,) = (t for t in part.tables(numbers) if t.title == "Claims")
        rows += [(claim, linked_id(source), *rest) for claim, source, *rest in found.rows]
    return table(found.header, rows)


def linked_id(source: str) -> str:
    """With each arXiv number a link."""
    return re.sub(r"(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", source)


BLOCKS = {
    "losses.md": {
        "losses": named_losses,
        "levels": levels,
        "ratios": lambda: of_module("ratio")(ratios, ("log-ratio of a token",)),
        "means": lambda: of_module("mean")(means, ("weight of a counted token", "elsewhere")),
        "surrogates": lambda: first_lines(surrogates, trust_regions),
    },
    "kl.md": {
        "kl": lambda: markdown(World()).splitlines(),
        "exact": lambda: exact_markdown(ExactWorld()).splitlines(),
        "optimum": lambda: preference_markdown(PreferenceWorld()).splitlines(),
        "values": lambda: studied("estimators", "Up to which KL"),
        "gradients": lambda: studied("gradients", "Gradients"),
        "training": lambda: studied("training", "What a KL trains"),
        "peaks": lambda: studied("overoptimisation", "Where a monitor", "Schedules"),
        "claims": claims,
    },
    "study.md": {name: partial(studied, name) for name in command.NAMES},
    "distillation.md": {"distillation": distillation_losses},
    "preference.md": {
        "preference": preference_losses,
        "scores": lambda: of_calls("score", scores, ("formula", "of")),
        "links": lambda: of_calls("link", links, ("of the chosen, or of both", "of the rejected")),
    },
    "predictions.md": {"ranks": over_ranks},
    "reference.md": {"names": public_names},
}
"""page -> the name of its block -> the lines in it."""


def main() -> None:
    for page, blocks in BLOCKS.items():
        for name, lines in blocks.items():
            replace_block(ROOT / "docs" / page, name, lines())


if __name__ == "__main__":
    main()
