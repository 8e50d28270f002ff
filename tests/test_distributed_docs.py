"""Every block of docs/distributed.md runs on two ranks, and gives the gradients of one process."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
# The heading of a block, its number there; whether ranks have tokens of their own, and the loss.
STEPS = {
    ("Ranks with tokens of their own", 0): (True, "dapo"),
    ("Ranks with tokens of their own", 1): (True, "dapo"),
    ("Ranks with tokens of their own", 2): (True, "dapo"),
    ("Ranks with a part of the vocabulary", 0): (False, "dapo"),
    ("Ranks with a part of the vocabulary", 1): (False, "dapo"),
    ("Ranks with a part of the vocabulary", 2): (False, "dapo"),
    ("Tokens travel to the rows", 0): (True, "dapo"),
    ("Sequences split over ranks", 0): (False, "gspo"),
}
VALUES = ("Ranks with a part of the vocabulary", 3)


def blocks(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_every_block_is_run():
    run = {*STEPS, VALUES}
    headings = {heading for heading, _ in run}
    assert run == {(h, i) for h in headings for i in range(len(blocks(h)))}
    assert len(run) + 1 == PAGE.count("```python\n")


@pytest.mark.parametrize("place", STEPS, ids=lambda place: f"{place[0]} {place[1]}")
def test_the_gradients_of_a_step(ranks, place):
    heading, number = place
    share, loss = STEPS[place]
    options = {"source": blocks(heading)[number], "share": share, "loss": loss}
    # The norms of a Qwen2 are float32 in any dtype: where parts of a sequence go back through them
    # one by one, the sum has their rounding.
    bound = 3e-6 if heading == "Sequences split over ranks" else 1e-12
    assert max(ranks(2).run("cases_distributed_docs", "run", 60, **options)) <= bound


def test_log_probs_of_sequence_shards(ranks):
    heading, number = VALUES
    source = blocks(heading)[number]
    assert max(ranks(2).run("cases_distributed_docs", "log_probs", source=source)) <= 1e-12
