"""The commands that read JSON, on JSON of any kind: a table, or one line and the status of a
mistake.
"""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import hypothesis.strategies as st
import pytest
from drawn import examples
from hypothesis import given

from fused_rl import cli
from fused_rl.bench.records import SHAPE
from fused_rl.plan.config import NESTED, WIDTHS
from fused_rl.plan.memory import DEVICES

pytest.importorskip("rich")

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 7, 4096, -1, 2**31 - 1, 2**31, 2**63, 10**400, 1e30, True]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def spoilt(**valid: st.SearchStrategy) -> st.SearchStrategy:
    """An object as it should be, or one with entries left out and one that is anything."""
    keys = st.one_of(st.sampled_from(sorted(valid)), st.text(max_size=8))
    named = st.fixed_dictionaries({}, optional=valid)
    others = st.one_of(st.just({}), st.dictionaries(keys, ANY, max_size=1))
    whole = st.fixed_dictionaries(valid)
    rarely = st.builds(dict.__or__, named, others)
    return st.sampled_from([whole] * 5 + [rarely]).flatmap(lambda chosen: chosen)


COUNTS = st.integers(1, 5000)
SIZES = {
    **{name: COUNTS for name in (WIDTHS[0], "hidden_size", "vocab_size")},
    "model_type": st.sampled_from(["llama", "llava", "reformer", "encoder-decoder", "new"]),
}
CONFIGS = st.one_of(ANY, spoilt(**SIZES), spoilt(**SIZES, **{n: spoilt(**SIZES) for n in NESTED}))

RATIOS = st.floats(0.1, 10)
RECORDS = spoilt(
    case=st.sampled_from(["[/x]", "b"]),
    provider=st.sampled_from(["fused_rl", "[red]"]),
    dtype=st.just("float32"),
    verdict=st.sampled_from(["right", "wrong", "failed"]),
    **dict.fromkeys(("ratio_to_products", "ratio_p20", "ratio_p80"), RATIOS),
    **dict.fromkeys(SHAPE[:3], st.integers(1, 3)),
)
RESULTS = st.one_of(
    ANY, spoilt(shape=st.builds(dict), records=st.lists(RECORDS, min_size=1, max_size=4))
)
LOGPROB = st.one_of(st.floats(-9, 0), st.sampled_from([0, None, -1e-9]), NUMBERS)


def vectors(size: int) -> st.SearchStrategy:
    """Two of that size, at times all but the same."""
    one = st.lists(LOGPROB, min_size=size, max_size=size)
    return st.one_of(st.tuples(one, one), one.map(lambda numbers: (numbers, numbers[::-1])))


PAIRS = st.integers(0, 60).flatmap(vectors)
ROLLOUTS = st.one_of(
    ANY,
    st.lists(spoilt(logprobs=ANY, rollout_logprobs=ANY), max_size=3),
    PAIRS.map(lambda pair: dict(zip(("logprobs", "rollout_logprobs"), pair, strict=True))),
    st.lists(PAIRS, max_size=4).map(
        lambda pairs: [{"old_log_probs": a, "rollout_log_probs": b} for a, b in pairs]
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def said(statuses: tuple[int, ...], *arguments: object) -> None:
    """The command ends with one of these, or with 2 and one printable line."""
    out, error = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        status = cli.main([str(a) for a in arguments])
    out, error = out.getvalue(), error.getvalue()
    assert "\x1b" not in out + error
    if status == 2:
        assert out == "" and error.count("\n") == 1 and error[:-1].isprintable()
    else:
        assert status in statuses and error == "" and out


@examples(120)
@given(
    config=CONFIGS,
    tokens=st.sampled_from([1, 8, 4097, 2**31 - 1, 2**40]),
    device=st.sampled_from(DEVICES),
    world=st.sampled_from([1, 2, 9, 2**31 - 1, 2**40]),
)
def test_plan_of_any_json(folder, config, tokens, device, world):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    sizes = ("--tokens", tokens, "--world", world)
    said((0,), "plan", "--model-config", path, *sizes, "--device", device)


@examples(120)
@given(before=RESULTS, after=RESULTS, same=st.booleans())
def test_comparison_of_any_json(folder, before, after, same):
    paths = folder / "a.json", folder / "b.json"
    for path, content in zip(paths, (before, before if same else after), strict=True):
        path.write_text(json.dumps(content))
    said((0, 1), "bench", "compare", *paths)


@examples(120)
@given(content=ROLLOUTS, options=st.sampled_from([(), ("--json",)]))
def test_mismatch_of_any_json(folder, content, options):
    path = folder / "rollout.json"
    path.write_text(json.dumps(content))
    said((0,), "mismatch", path, *options)


@examples(60)
@given(data=st.binary(max_size=60))
def test_any_bytes(folder, data):
    path = folder / "bytes.json"
    path.write_bytes(data)
    said((), "plan", "--model-config", path, "--tokens", 8)
    said((), "mismatch", path)
    said((), "bench", "compare", path, path)
