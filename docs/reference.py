"""The reference: every public name with its docstring, as pages of HTML, by pdoc.

    python docs/reference.py out/docs

A module is shown under the path by which it is public, wherever its file lies. docs/generate.py
makes the list of names in docs/reference.md of the same pages.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc

import fused_rl

# Imported by whoever needs them.
INTEGRATIONS = ("hub", "layers", "liger", "transformers", "trl", "verl")


class Page(pdoc.doc.Module):
    """A module's page, under its public path."""

    def __init__(self, path: str, below: list[Page]) -> None:
        super().__init__(import_module(path))
        self.modulename, self.below = path, below

    @property
    def submodules(self) -> list[Page]:
        """The pages below this one, wherever their files lie."""
        return self.below

    @property
    def _member_objects(self) -> dict[str, Any]:
        """What the module says is public, without modules: they have pages of their own."""
        members = super()._member_objects
        return {n: found for n, found in members.items() if not isinstance(found, ModuleType)}


def pages() -> dict[str, Page]:
    """Path -> page, of all that is public."""
    inside = [Page(f"fused_rl.{m.__name__.rpartition('.')[2]}", []) for m in fused_rl.MODULES]
    doors = [Page(f"fused_rl.integrations.{name}", []) for name in INTEGRATIONS]
    every = [Page("fused_rl", inside), *inside, Page("fused_rl.integrations", doors), *doors]
    return {page.modulename: page for page in every}


def build(directory: Path) -> list[Path]:
    """Writes the pages, an index and what the search needs; returns the paths."""
    pdoc.render.configure(docformat="google", footer_text=f"fused_rl {fused_rl.__version__}")
    found = pages()
    texts = {f"{path.replace('.', '/')}.html": page for path, page in found.items()}
    with warnings.catch_warnings():
        # Of the fields of a NamedTuple, which it then shows as they are written.
        warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef")
        texts = {name: pdoc.render.html_module(page, found) for name, page in texts.items()}
    texts["index.html"] = pdoc.render.html_index(found)
    texts["search.js"] = pdoc.render.search_index(found)
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


if __name__ == "__main__":
    written = build(Path(sys.argv[1]))
    print(f"{len(written)} files written; begin with {written[0]}")
