"""The model of the time: its ceilings' sources, its formulas by hand, and its error at every
measurement that there is.
"""

import math

import predictions
import predictions_fit
import pytest
import torch
from predictions import cases, deviation

from fused_rl.plan import steps
from fused_rl.plan import time as model
from fused_rl.plan.devices import CARDS

pytest.importorskip("triton", reason="triton is not installed")
H200 = CARDS["h200"]
# kind -> the median and the largest |log(measured / predicted)|. The largest of the forwards are
# tiles in L2 of few tokens, whose host took up to 1.6 times as long in one result as in the other.
BOUNDS = {
    "records": (0.05, 0.17),
    "forwards": (0.07, 0.48),
    "products": (0.10, 0.18),
    "row_kernels": (0.04, 0.06),
    "chunks": (0.04, 0.19),
}


def by_kind() -> dict[str, list]:
    found: dict[str, list] = {}
    for case in cases():
        found.setdefault(case.kind, []).append(case)
    return found


@pytest.mark.parametrize("name", predictions.MEASURED_CARDS)
def test_ceilings_are_those_of_the_result_that_they_name(name):
    title, _ = predictions.FITTED[name]
    content, ceilings = predictions.result(title), CARDS[name].measured
    assert f"/{title}.json" in ceilings.source
    (product,) = (
        r["TFLOP_per_s"]
        for r in content["products"]
        if (r["way"], r["tokens"]) == ("logits, half", 8192)
    )
    found = content["ceilings"]
    assert ceilings.alone == pytest.approx(found["product_TFLOP_per_s"], abs=0.05)
    assert ceilings.copy == pytest.approx(found["copy_GB_per_s"], abs=0.5)
    assert ceilings.sustained == pytest.approx(product, abs=0.05)
    assert content["environment"]["multiprocessors"] == CARDS[name].multiprocessors


def test_what_is_not_measured_is_assumed_in_words():
    for name, card in CARDS.items():
        c = card.ceilings
        assert c.sustained < c.alone < card.sheet_tflops and c.copy < card.sheet_gb_per_s
        assert c.source.startswith("measured" if name in predictions.MEASURED_CARDS else "assumed")
        assert "data sheet" in card.source
    assert CARDS["b200"].ceilings.alone == pytest.approx(2250 * 784.8 / 989.4)


def test_the_clock_is_that_of_the_data_sheet():
    """NVIDIA's boost clocks of an A100 and AMD's of an MI300X."""
    assert CARDS["a100"].clock == pytest.approx(1.41e9, rel=1e-2)
    assert CARDS["mi300x"].clock == pytest.approx(2.1e9, rel=1e-2)


def test_overlapped_lies_between_the_longest_and_the_sum():
    assert model.overlapped(3.0, 0.0) == pytest.approx(3.0)
    assert 3.0 < model.overlapped(3.0, 1.0) < 4.0
    assert model.overlapped(2.0, 2.0) == pytest.approx(2 * 2 ** (1 / model.POWER))


def test_waves_by_hand():
    assert model.waves(H200, 132) == 1
    assert model.waves(H200, 133) == pytest.approx(264 / 133)
    assert model.cut(10, 4) == [(4, 2), (2, 1)] and model.cut(8, 4) == [(4, 2)]
    assert model.cut(3, 4) == [(3, 1)]


def test_the_product_that_the_rate_is_from_is_predicted_exactly():
    """But for its bytes, which take a tenth of its time beside it."""
    part = model.product(H200, "", 8192, 8192, 8192, width=2)
    assert part.flop / part.seconds == pytest.approx(H200.measured.alone * 1e12, rel=5e-3)


def test_a_product_that_adds_is_bound_by_what_it_reads_and_writes():
    """dweight of 256 tokens: 8 bytes per element, at a share of the bandwidth."""
    V, H = 151936, 4096
    part = model.product(H200, "", V, H, 256, width=4, added=True)
    bytes_alone = 8 * V * H / (H200.measured.copy * 1e9 * model.ADDED)
    assert bytes_alone < part.seconds < 1.2 * bytes_alone


def test_times_by_hand():
    """A product at the peak is energy-bound at the limit; what has no product is not."""
    flop = 1e13
    parts = [model.Part("a", flop, flop / (H200.measured.alone * 1e12))]
    low, high = model.times(H200, parts)
    assert low == pytest.approx(flop / (H200.measured.alone * 1e9))
    assert high == pytest.approx(flop / (H200.measured.sustained * 1e9))
    assert model.times(H200, [model.Part("b", 0, 1e-3)]) == (1.0, 1.0)
    assert str(model.Times(1.0, 1.0)) == "1.0" and str(model.Times(9.04, 120.2)) == "9.0..120"


def test_shared_memory_by_hand():
    """128 x 256, two groups: each reads 64 + 256 rows of 2 bytes, 384 are written: 2048 bytes."""
    assert model.shared_memory(model.LIBRARY) == pytest.approx((2 * 320 + 384) * 2 / 128 / 16)
    half = model.LIBRARY._replace(block_n=128)
    assert model.shared_memory(half) > model.shared_memory(model.LIBRARY)


def test_the_model_counts_what_the_kernels_do():
    """Blocks, tiles and the choice of a forward are those of kernels/."""
    from fused_rl.kernels import configs, linear_gradients, linear_logprobs, logprobs

    assert model.ROW_BLOCK == logprobs.BLOCK_V
    assert logprobs.MERGE_TILE[0] == model.MERGED
    assert model.PRODUCT_TILE == linear_gradients.PRODUCT_TILE
    for N in (1, 512, 513, 2048, 4200, 8192):
        assert steps.tile_sides(N) == linear_logprobs.tile_sides(N)
        for card in CARDS.values():
            device = configs.Device(card.multiprocessors, card.major)
            number = torch.zeros((), dtype=torch.bfloat16)
            call = (
                number.expand(N, 64).contiguous(),
                torch.zeros(8, 64).bfloat16(),
                None,
                0,
                0,
                1.0,
                0.0,
                0,
            )
            for stores in (False, True):
                ours = configs.chosen(call, device, stores=stores)
                assert steps.chosen(card, N, stores=stores) == ours


@pytest.mark.parametrize("kind", BOUNDS)
def test_the_model_is_as_near_to_the_measurements_as_it_says(kind):
    median, largest = deviation(by_kind()[kind])
    assert median <= BOUNDS[kind][0] and largest <= BOUNDS[kind][1], (median, largest)


def test_every_measurement_of_ours_is_compared():
    found = by_kind()
    for name in predictions.MEASURED_CARDS:
        content = predictions.result(predictions.FITTED[name][0])
        ours = [
            r
            for r in content["records"]
            if r["provider"].startswith("fused_rl") and "seconds_median" in r
        ]
        here = [c for c in found["records"] if c.card == name and ": fused_rl" in c.name]
        assert len(here) == len(ours) > 20
        for kind in ("forwards", "products"):
            timed = [r for r in content[kind] if "ms_median" in r]
            assert len([c for c in found[kind] if c.card == name]) == len(timed)


# Of a result that nothing is fitted to, of code that no GPU had run: the median of |log(ratio)|.
UNSEEN = {"records": 0.10, "forwards": 0.11, "products": 0.08, "row_kernels": 0.05, "chunks": 0.06}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_result_that_nothing_is_fitted_to_is_as_near_as_the_page_says(kind):
    found = cases(tuple(predictions.UNSEEN), predictions.UNSEEN)
    assert deviation([c for c in found if c.kind == kind])[0] <= UNSEEN[kind]


def test_forwards_that_no_gpu_had_run_are_predicted_within_a_sixth():
    """Those by exp2, by Gluon and with exponentials, of 2048 tokens and more."""
    found = cases(tuple(predictions.UNSEEN), predictions.UNSEEN)
    new = [c for c in found if c.kind == "forwards" and c.name.endswith((", exp2", ", stores"))]
    new = [c for c in new if c.tokens >= 2048 and c.name.split()[0] != "pointers"]
    assert len(new) >= 48
    assert deviation(new)[0] < math.log(7 / 6)


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize(
    ("owner", "name", "kind"),
    [
        (model, "ISSUE", "row_kernels"),
        (model, "TILE", "products"),
        (model, "ADDED", "products"),
        (model, "LATENCY", "forwards"),
        (model, "START", "forwards"),
        (model, "TILE_HOST", "forwards"),
        (model, "TILE_GAP", "forwards"),
        (model, "MERGE", "forwards"),
        (steps, "CHUNK_HOST", "chunks"),
        (steps, "CHUNK_GAP", "chunks"),
        (steps, "EAGER_FORWARD", "records"),
        (steps, "EAGER_BACKWARD", "records"),
        (predictions, "NATURAL", "forwards"),
    ],
)
def test_with_another_constant_the_model_is_worse(owner, name, kind, factor, monkeypatch):

    def squares() -> float:
        return sum(math.log(case.ratio) ** 2 for case in by_kind()[kind])

    before = squares()
    monkeypatch.setattr(owner, name, factor * getattr(owner, name))
    assert squares() > before


@pytest.mark.parametrize("share", [0.5, 2])
@pytest.mark.parametrize("tma", [True, False])
def test_main_loops_are_as_fast_as_measured(tma, share, monkeypatch):
    before = deviation(by_kind()["forwards"])[0]
    monkeypatch.setitem(model.MAIN_LOOP, tma, model.MAIN_LOOP[tma] * share)
    assert deviation(by_kind()["forwards"])[0] > before


@pytest.fixture
def constants():
    """As they were, afterwards."""
    before = [(owner, name, owner[name]) for owner, name, _ in predictions_fit.CONSTANTS]
    yield
    for owner, name, value in before:
        owner[name] = value


def test_the_fit_finds_its_way(constants):
    """From values that are far off, a few steps lower the deviation."""
    cards = ("h100",)
    predictions_fit.fit(cards, 0)
    begin = predictions_fit.total(cards)
    predictions_fit.fit(cards, 40)
    assert predictions_fit.total(cards) < 0.8 * begin


@pytest.mark.slow
@pytest.mark.parametrize(("fitted", "other"), [("h100", "h200"), ("h200", "h100")])
def test_what_is_fitted_on_one_card_predicts_the_other(constants, fitted, other):
    """As docs/predictions.md says: medians of 4 to 7 %."""
    predictions_fit.fit((fitted,), 700)
    found = predictions_fit.by_kind((other,))
    for kind in ("records", "forwards", "chunks"):
        assert math.expm1(deviation(found[kind])[0]) < 0.075, kind


def test_every_constant_that_is_called_fitted_is_found_anew():
    names = {name for owner, name, _ in predictions_fit.CONSTANTS if isinstance(name, str)}
    assert names == {
        *("POWER", "ISSUE", "TILE", "ADDED", "OTHERS", "LATENCY"),
        *("START", "TILE_HOST", "TILE_GAP", "MERGE", "CHUNK_HOST", "CHUNK_GAP"),
    }
