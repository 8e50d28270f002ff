"""Every block of docs/distributed.md runs on two ranks, and gives the gradients of one process."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()


def blocks(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_every_block_is_run():
    run = [block for heading in (*STEPS, *OTHERS) for block in blocks(heading)]
    assert len(run) + 1 == PAGE.count("```python\n")
