"""docs/images/plan.svg: what docs/planned.py draws, and what the planner says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fused_rl.plan.memory import plan
from fused_rl.plan.report import readable

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    """docs/planned.py. Without Triton a card has other chunks."""
    for name in ("matplotlib", "triton"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("planned", ROOT / "docs" / "planned.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_the_same_each_time_and_says_what_the_planner_says(picture, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        picture.draw(tmp_path / name / picture.PICTURE.name)
    first, second = (tmp_path / n / picture.PICTURE.name for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    committed, drawn = picture.PICTURE.read_text(), first.read_text()
    planned = {way.name: way for way in plan(picture.HEAD, 2**16, device=picture.CARD).ways}
    for name, (label, *_) in picture.WAYS.items():
        way = planned[name]
        for text in (committed, drawn):
            assert f">{label}<" in text
            assert f"{way.nhv} NHV, {readable(way.peak)}<" in text


def test_the_words_beside_the_picture_are_true(picture):
    """docs/limits.md and its alternative text: who grows with the tokens, and who does not."""
    planned = picture.plans()
    eager, one_pass, any_loss = (
        picture.peaks(planned, name)
        for name in ("eager torch", "linear_policy_loss", "linear_logprobs")
    )
    card = picture.CARDS[picture.CARD].memory_gb * 10**9
    at = [p.tokens for p in planned].index
    assert eager[at(2**15)] < card < eager[at(2**16)]
    assert eager[at(2**16)] > 50 * eager[at(2**10)]
    for ours in (one_pass, any_loss):
        assert max(ours) < 4.2 * 2**30 and ours[at(2**16)] < 1.4 * ours[at(2**13)]
    assert picture.work(planned, "linear_policy_loss") == "6 NHV"
    assert picture.work(planned, "linear_logprobs") == "6, then 8 NHV"
