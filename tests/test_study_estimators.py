"""The study's estimators: closed forms against integrals, samples against both, rounding."""

import json
import math
from functools import partial

import pytest
import torch

from fused_rl import KL
from fused_rl.study import estimator_tables, estimators, gaussians, part, vocabulary
from fused_rl.study.gaussians import ESTIMATORS, Pair, pair
from fused_rl.study.part import Options
from fused_rl.study.vocabulary import Case, Policies
from fused_rl.system.drawing import save

KLS = (0.001, 0.05, 0.5)
SMALL = 8


def normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


@pytest.fixture(scope="module")
def numbers():
    """A small run, in one process."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "cases", few)
        patch.setattr(estimators, "each", lambda f, cases, tick: [tick() or f(c) for c in cases])
        found = estimators.measure(Options(), lambda: seen.append(1))
        assert len(seen) == estimators.ticks(Options())
    return part.rounded(found)


def few(options):
    case = partial(Case, options.seed, prefixes=SMALL, tokens=16)
    return [
        *(
            ("sampled", partial(gaussians.sampled, options.seed, family, kl, 20))
            for family, kl in (("shifted", 0.1), ("shifted", 10.0), ("sharper", 0.5))
        ),
        ("vocabulary", partial(vocabulary.compared, case("open", "noise", 0.1))),
        ("vocabulary", partial(vocabulary.compared, case("peaked", "temperature", 0.8))),
        *(
            ("rounding", partial(vocabulary.rounded, case("peaked", "noise", size)))
            for size in (0.0, 0.001, 0.03)
        ),
    ]


@pytest.mark.parametrize("family", gaussians.FAMILIES)
@pytest.mark.parametrize("kl", KLS)
def test_closed_forms_are_the_integrals_of_what_the_library_computes(family, kl):
    chosen = pair(family, kl)
    assert chosen.kl == pytest.approx(kl, rel=1e-9)
    x = torch.linspace(-38, 38, 400_001, dtype=torch.float64)
    density = (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
    for kind in ESTIMATORS:
        k = chosen.estimates(x, kind)
        mean = torch.trapezoid(density * k, x).item()
        variance = torch.trapezoid(density * (k - mean) ** 2, x).item()
        moments = chosen.moments(kind)
        if kind is KL.K3 and chosen.sigma**2 >= 2:
            # The library's clamp is all that is finite: it holds exp(-d) at exp(20).
            assert moments.variance == math.inf
            assert variance > 100
            continue
        assert moments.mean == pytest.approx(mean, rel=1e-6)
        assert moments.variance == pytest.approx(variance, rel=1e-5)
    below = torch.trapezoid(density * (chosen.estimates(x, KL.K1) < 0), x).item()
    assert chosen.negative == pytest.approx(below, abs=2e-4)


@pytest.mark.parametrize("kl", [1e-4, 0.005, 0.125, 3.0])
def test_shifted_gaussians_have_the_known_variances(kl):
    k1, k2, k3 = (pair("shifted", kl).moments(kind) for kind in ESTIMATORS)
    assert k1 == pytest.approx((kl, 2 * kl), rel=1e-9)
    assert k2 == pytest.approx((kl + kl**2 / 2, 2 * kl**2 + 2 * kl**3), rel=1e-9)
    assert k3 == pytest.approx((kl, math.exp(2 * kl) - 1 - 2 * kl), rel=1e-7)


def test_limits_solve_their_equations():
    limits = gaussians.limits()
    crossing = limits["k3 over k1"]["shifted"]
    assert math.exp(2 * crossing) == pytest.approx(1 + 4 * crossing, rel=1e-9)
    assert limits["k2 over k1"]["shifted"] == pytest.approx((math.sqrt(5) - 1) / 2, rel=1e-9)
    assert limits["k2 biased"]["shifted"] == pytest.approx(0.2, rel=1e-9)
    assert limits["k3 without variance"]["sharper"] == pytest.approx(math.log(2) / 2 - 0.25)
    assert limits["k3 over k1"]["sharper"] < 0.05
    assert limits["k3 over k1"]["flatter"] is None


def test_a_wider_reference_takes_the_variance_of_k3():
    below, above = (Pair(sigma=math.sqrt(2) * x).moments(KL.K3) for x in (0.999, 1.001))
    assert below.variance > 20 * Pair(sigma=1.3).moments(KL.K3).variance
    assert above.variance == math.inf
    assert gaussians.row("sharper", 0.5)["k3"]["samples"] is None


def test_means_of_samples_are_near_until_they_cannot_be():
    near = gaussians.sampled(3, "shifted", 0.1, 40)
    exact = gaussians.row("shifted", 0.1)
    for name in ("k1", "k3"):
        error = exact[name]["std"] / math.sqrt(gaussians.BATCH)
        assert near[name]["median"] == pytest.approx(1, abs=4 * error)
        assert near[name]["std"] == pytest.approx(exact[name]["std"], rel=0.02)
    far = gaussians.sampled(3, "shifted", 10.0, 40)
    assert far["k3"]["std"] < gaussians.row("shifted", 10.0)["k3"]["std"] / 5
    # What is not seen is E[e^-d] = 1 at most, 0.1 of this KL.
    assert 0.89 < far["k3"]["median"] < 0.97
    assert gaussians.sampled(3, "sharper", 0.5, 40)["k3"]["near"] < 0.6


def test_clamps_cut_what_the_log_normal_says():
    kl, s = 10.0, math.sqrt(20.0)
    bias = gaussians.clamped("shifted", kl)["bias"]
    # Of e^-d, beyond d = -20: its expectation there, for which d has the mean -kl, less e^20.
    lost = normal((kl - 20) / s) - math.exp(20) * normal((-20 - kl) / s)
    assert bias["exponent held at 20"] == pytest.approx(-lost / kl, rel=1e-4)
    value = gaussians.clamped("sharper", 1.0)["bias"]
    assert value["value within 10"] < -0.4 < value["exponent held at 20"] < -0.1


@pytest.mark.parametrize(
    ("change", "size"), [("noise", 0.03), ("noise", 0.3), ("temperature", 0.8)]
)
def test_tokens_of_a_vocabulary_estimate_its_exact_kl(change, size):
    found = vocabulary.compared(Case(1, "open", change, size, SMALL, tokens=256))
    assert abs(found["k1"]["bias"]) < 1e-7
    assert abs(found["k3"]["bias"]) < 1e-7
    # The spread of prefixes is the same number of nats in k1 as in the exact KL.
    assert found["k1"]["prefixes"] * found["k1"]["std"] ** 2 == pytest.approx(
        found["exact"]["std"] ** 2, rel=1e-6
    )
    for name in ("k1", "k2", "k3"):
        row = found[name]
        noise = row["std"] * math.sqrt((1 - row["prefixes"]) / (256 * SMALL))
        assert row["sampled"] == pytest.approx(1 + row["bias"], abs=5 * noise)
    assert found["exact"]["samples"] < found["k3"]["samples"] < found["k1"]["samples"]


def test_the_floor_of_bf16_logits_is_that_of_uniform_rounding():
    case = Case(1, "open", "noise", 0.0, SMALL)
    logits, _ = Policies.of(case).logits()
    p = logits.softmax(-1)
    # Errors are even over a spacing of 2^-7 of the logit's power of two; of a prefix's own mean
    # error nothing is left, and the KL is half of the variance.
    spacing = 2.0 ** (logits.abs().log2().floor() - 7)
    one = (p * spacing**2).sum(-1) / 24 * (1 - (p**2).sum(-1))
    means = vocabulary.rounded(case)["rounding"]
    floor = means["reference's logits bf16"]
    assert floor["k3"] == pytest.approx(one.mean().item(), rel=0.3)
    assert floor["k1"] == pytest.approx(floor["k3"], rel=0.01)
    assert means["bf16 logits"]["k3"] == means["float32"]["k3"] == 0
    assert 0 < means["reference's logits float32"]["k3"] < 1e-11


def test_rounding_reaches_into_the_usual_kl(numbers):
    row = next(row for row in numbers["rounding"] if row["size"] == 0.001)
    k3 = {name: means["k3"] / row["kl"] for name, means in row["rounding"].items()}
    assert k3["float32"] == pytest.approx(1, abs=1e-3)
    assert k3["exp in float32"] == pytest.approx(1, abs=1e-2)
    assert k3["reference's logits bf16"] > 3
    assert k3["bf16 logits"] > 3
    assert row["rounding"]["exp in bf16"]["negative"] > 0.01


def test_the_same_seed_gives_the_same_numbers(numbers):
    case = Case(0, "open", "noise", 0.1, SMALL, tokens=16)
    again = part.rounded(vocabulary.compared(case))
    assert again == numbers["vocabulary"][0]
    other = vocabulary.compared(Case(1, "open", "noise", 0.1, SMALL, tokens=16))
    assert other["k1"]["sampled"] != again["k1"]["sampled"]
    assert gaussians.sampled(0, "shifted", 0.1, 2) != gaussians.sampled(1, "shifted", 0.1, 2)


def test_numbers_are_json_and_small(numbers):
    text = json.dumps(numbers, allow_nan=False)
    assert json.loads(text) == numbers
    assert len(text) < 150_000
    assert {"tolerances", *numbers["tolerances"]} == set(numbers)


def test_tables_say_what_the_numbers_do(numbers):
    tables = {
        table.title.split(":")[0].split(",")[0]: table for table in estimators.tables(numbers)
    }
    for table in tables.values():
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows), table.title
    first = estimators.tables(numbers)[0]
    row = dict(zip(first.header, next(r for r in first.rows if r[0] == "0.005"), strict=True))
    assert (row["k1 std"], row["k2 std"], row["k3 std"]) == ("20", "1.42", "1.42")
    assert (row["k1 tokens"], row["k2 bias"]) == ("40,000", "0.25 %")
    last = dict(zip(first.header, first.rows[-1], strict=True))
    assert (last["KL, nats"], last["k2 tokens"], last["k1 tokens"]) == ("10", "never", "20")


def test_verdicts_follow_from_the_numbers(numbers):
    def verdict(numbers, text):
        return next(v for claim, _, _, v in estimator_tables.claims(numbers) if text in claim)

    assert verdict(numbers, "std / KL is 20") == "confirmed"
    assert "up to 0.628 nats, with a sharper policy up to 0.041" in verdict(numbers, "than k1")
    changed = json.loads(json.dumps(numbers))
    changed["limits"]["k3 over k1"] = dict.fromkeys(gaussians.FAMILIES)
    assert verdict(changed, "less variance than k1") == "confirmed"
    for row in changed["gaussians"]["shifted"]:
        row["k2"]["std"] *= 2
    assert verdict(changed, "std / KL is 20") == "not confirmed"


def test_pictures_are_written_small_and_the_same_twice(numbers, tmp_path):
    pytest.importorskip("matplotlib")
    written = part.write("estimators", estimators, numbers, tmp_path)
    assert {path.stem for path in written if path.suffix == ".svg"} == {
        f"estimators-{picture}" for picture in ("spread", "samples", "rounding", "clamp")
    }
    assert all(path.stat().st_size < 80_000 for path in written if path.suffix == ".svg")
    first = tmp_path / "estimators-samples.svg"
    once = first.read_bytes()
    save(estimators.PICTURES["samples"](numbers), first)
    assert first.read_bytes() == once
    assert b"k1 and k3 cross" in once
