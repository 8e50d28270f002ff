"""How far a proxy may be followed: exact distributions against theory, runs against both."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fused_rl import KL, kl_penalty, linear_logprobs
from fused_rl.overoptimisation import RewardCurve, RewardForm
from fused_rl.schedules import AdaptiveBeta, FixedBeta
from fused_rl.study import overoptimisation, part, peaks, workers
from fused_rl.study.flawed import FLATTERY, T, V, World
from fused_rl.study.part import Options
from fused_rl.study.proxy_claims import HEADER
from fused_rl.study.pursuit import Case, run


@pytest.fixture(scope="module")
def world():
    return World(0)


def test_the_list_of_all_sequences_is_that_of_the_policy(world):
    assert world.tokens.shape == (V**T, T)
    assert world.ref_logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    tokens = world.reference.sampled(50, torch.Generator().manual_seed(0))
    hidden, head = world.reference.hidden(tokens), world.reference.head
    got = linear_logprobs(hidden, head, tokens).logprobs.sum(-1)
    torch.testing.assert_close(world.ref_logprobs[world.index(tokens)], got, atol=1e-10, rtol=0)
    assert torch.equal(world.tokens[world.index(tokens)], tokens)


def test_rewards_are_above_the_reference_and_disagree_about_flattery(world):
    p = world.ref_logprobs.exp()
    assert abs((p @ world.proxy).item()) < 1e-12 and abs((p @ world.gold).item()) < 1e-12
    flattery = (world.tokens == FLATTERY).sum(-1)
    for reward, sign in ((world.proxy, 1), (world.gold, -1)):
        means = [reward[flattery == k].mean().item() for k in range(T + 1)]
        assert all(sign * b > sign * a for a, b in pairwise(means[1:]))


@pytest.mark.parametrize("beta", [3.0, 0.5, 0.1])
def test_the_closed_form_is_the_optimum(world, beta):
    """Its objective is beta log Z, and no mixture of it with another policy has more."""
    best = world.tilted(beta)
    point = world.point(best)
    log_z = torch.logsumexp(world.ref_logprobs + world.proxy / beta, 0).item()
    assert point.proxy - beta * point.kl == pytest.approx(beta * log_z, rel=1e-9)
    for other in (world.ref_logprobs, world.tilted(2 * beta), world.tilted(beta / 2)):
        near = world.point(torch.log(0.9 * best.exp() + 0.1 * other.exp()))
        assert near.proxy - beta * near.kl < point.proxy - beta * point.kl


def test_proxy_and_kl_grow_along_the_frontier_at_the_rate_beta(world):
    """d proxy / d KL = beta: what the next nat is worth."""
    points = [world.point(world.tilted(0.5 * x)) for x in (1.001, 0.999)]
    slope = (points[1].proxy - points[0].proxy) / (points[1].kl - points[0].kl)
    assert slope == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("n", [2, 9, 64])
def test_the_best_of_n_is_what_sampling_gives(world, n):
    (point,) = world.best_of([n])
    generator = torch.Generator().manual_seed(n)
    index = world.index(world.reference.sampled(2000 * n, generator)).reshape(-1, n)
    chosen = index.gather(1, world.proxy[index].argmax(1, keepdim=True))[:, 0]
    for name in ("proxy", "gold"):
        seen = getattr(world, name)[chosen]
        error = seen.std().item() / math.sqrt(len(seen))
        assert abs(seen.mean().item() - getattr(point, name)) < 5 * error
    bound = math.log(n) - (n - 1) / n
    assert bound - 1e-3 < point.kl <= bound + 1e-12


def test_the_best_of_one_is_the_reference(world):
    (point,) = world.best_of([1])
    assert point == pytest.approx((0, 0, 0), abs=1e-10)


def test_gold_peaks_along_exact_curves_and_the_proxy_does_not():
    found = overoptimisation.exact(1)
    for kind in ("frontier", "best of n"):
        curve, top = found[kind]["curve"], found[kind]["peak"]
        assert all(b > a for a, b in pairwise(curve["proxy"]))
        assert 1 < top["kl"] < 0.9 * curve["kl"][-1]
        assert curve["gold"][-1] < 0.9 * top["gold"]
        assert 0.6 < top["kept_quarter"] < top["kept_half"] < 0.95


@pytest.mark.parametrize("form", list(RewardForm))
def test_what_is_said_of_a_known_curve(form):
    true = RewardCurve(form, 2.0, 1.0)
    kls = [(0.002 * k) ** 2 for k in range(2000)]
    curve = {"kl": kls, "gold": [true.reward(kl) for kl in kls]}
    top = peaks.highest(curve)
    assert top["kl"] == pytest.approx(true.kl_peak, rel=5e-3)
    assert top["kept_half"] == pytest.approx(
        true.reward(true.kl_budget()) / true.reward_peak, rel=1e-3
    )
    name = {form: name for name, form in peaks.FORMS.items()}[form]
    for fit in peaks.foreseen(curve)[name].values():
        assert fit["kl_peak"] == pytest.approx(true.kl_peak, rel=1e-6) and fit["rms"] < 1e-9


def test_a_curve_without_a_peak_has_none():
    curve = {"kl": [0.0, 1.0, 4.0, 9.0], "gold": [0.0, 1.0, 2.5, 5.0]}
    assert peaks.fitted(curve, RewardForm.BEST_OF_N)["kl_peak"] is None


def test_values_between_points_are_on_lines():
    assert peaks.between(1.5, [0, 1, 2], [0.0, 4.0, 8.0]) == 6.0
    assert peaks.between(9.0, [0, 1, 2], [0.0, 4.0, 8.0]) == 8.0
    assert peaks.between(1.5, [0, 1, 0.5, 2], [0.0, 4.0, 5.0, 8.0]) == 6.5


def drifting(gold):
    """A run whose KL rises by 0.6 nats a checkpoint, whose samples say the truth."""
    n = len(gold)
    kl = [0.6 * i for i in range(n)]
    found = {"kl": kl, "seen_kl": [x / T for x in kl], "gold": gold, "seen_gold": gold}
    return found | {"seen_proxy": [float(i) for i in range(n)], "entropy": [1.0] * n}


def test_monitors_stop_where_they_say():
    gold = [0.1 * i for i in range(12)] + [1.1 - 0.1 * i for i in range(1, 12)]
    pilot = RewardCurve(RewardForm.BEST_OF_N, 2.0, 0.5)
    stops = peaks.stops(drifting(gold), pilot)
    # The highest is the 12th; it and four that are lower are five in a row.
    assert stops["five falls"] == 15
    # Its peak is at 4 nats, half of which the 5th checkpoint is the first to pass.
    assert pilot.kl_peak == 4.0 and stops["pilot's budget"] == 4
    assert stops["diagnose"] <= stops["five falls"]
    never = peaks.stops(drifting([0.1 * i for i in range(20)]), RewardCurve(*pilot[:2], -1.0))
    assert never["five falls"] is None and never["pilot's budget"] is None


def test_runs_on_one_curve_lie_together_at_equal_kl_alone():
    runs = [
        {"step": list(range(30)), "kl": kl, "gold": [math.sqrt(x) for x in kl]}
        for kl in ([(0.1 * pace * i) ** 2 for i in range(30)] for pace in (1, 2))
    ]
    assert peaks.spread(runs, "kl") < 1e-12
    assert peaks.spread(runs, "step") > 0.5


def test_a_run_is_that_of_its_seed_and_follows_the_proxy():
    first, again, other = (run(Case(world=0, seed=s, steps=8, every=4)) for s in (3, 3, 4))
    assert first == again
    assert first["seen_gold"] != other["seen_gold"]
    longer = run(Case(world=0, seed=3, steps=40, every=20))
    assert longer["kl"][0] == pytest.approx(0, abs=1e-12)
    assert longer["proxy"][-1] > 0.8 and longer["kl"][-1] > 0.3


def test_what_samples_say_of_a_checkpoint_is_near_the_truth():
    found = run(Case(world=0, seed=5, steps=30, every=30))
    kl, seen = found["kl"][-1], T * found["seen_kl"][-1]
    assert seen == pytest.approx(kl, rel=0.25)
    assert found["seen_gold"][-1] == pytest.approx(found["gold"][-1], abs=0.5)


def test_a_large_beta_leaves_the_policy_near_the_closed_form(world):
    beta = 8.0
    found = run(Case(world=0, seed=0, steps=60, every=20, schedule=FixedBeta(beta)))
    best = world.point(world.tilted(beta))
    assert found["kl"][-1] < 2 * best.kl
    objective = found["proxy"][-1] - beta * found["kl"][-1]
    assert 0.5 * (best.proxy - beta * best.kl) < objective < best.proxy - beta * best.kl


def test_an_adaptive_beta_hears_of_the_kl_of_sequences():
    schedule = AdaptiveBeta(0.5, target=1.0, horizon=10)
    found = run(Case(world=0, seed=0, steps=2, every=1, schedule=schedule))
    assert found["beta"][0] == 0.5
    assert found["beta"][1:] == pytest.approx([0.5 * 0.98, 0.5 * 0.98**2])
    assert schedule.beta == 0.5


def test_the_measured_kl_is_the_mean_log_ratio_of_sequences(world):
    """The divergences of tokens that samples pass add up to the KL of sequences."""
    policy = world.tilted(0.7)
    generator = torch.Generator().manual_seed(0)
    index = torch.multinomial(policy.exp(), 20_000, True, generator=generator)
    k1 = kl_penalty(policy[index], world.ref_logprobs[index], value=KL.K1)
    error = k1.std().item() / math.sqrt(len(index))
    assert abs(k1.mean().item() - world.point(policy).kl) < 5 * error


@pytest.mark.parametrize("seed", [0, 7, -(2**63), 2**64 - 1])
def test_every_run_samples_on_its_own(seed):
    """Runs at other rates or scales share seeds with those that they are compared with."""
    options = Options(seed)
    free, held = overoptimisation.free_cases(options), overoptimisation.held_cases(options, 1, 1)
    assert len(free) + len(held) + 5 == overoptimisation.ticks(options)
    seeds = {case.seed for case in [*free.values(), *held.values()]}
    assert len(seeds) == 9
    for case in (*free.values(), *held.values()):
        torch.Generator().manual_seed(case.seed)
        torch.Generator().manual_seed(case.world)


@pytest.fixture(scope="module")
def small():
    """The part with short runs, which are too short to bear out its claims."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overoptimisation, "size", lambda _: overoptimisation.Size(2, 2, 1, 1, 20))
        patch.setattr(overoptimisation, "STEPS", 48)
        patch.setattr(overoptimisation, "COUNTS", [1, 2, 8, 64, 512, 4096])
        patch.setattr(overoptimisation, "BETAS", overoptimisation.BETAS[::8])
        patch.setattr(workers, "cores", lambda: 1)
        ticked = []
        numbers = overoptimisation.measure(Options(), lambda: ticked.append(1))
        assert len(ticked) == overoptimisation.ticks(Options())
    return numbers


def test_tables_say_what_a_stranger_can_read(small):
    found = overoptimisation.tables(small)
    assert found[-1].title == "Claims" and found[-1].header == HEADER
    for table in found:
        assert all(len(row) == len(table.header) for row in table.rows), table.title
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    verdicts = {row[3].split(":")[0] for row in found[-1].rows}
    assert verdicts <= {"confirmed", "not confirmed", "depends"} and len(verdicts) > 1


def test_pictures_and_numbers_are_written_the_same_twice(small, tmp_path: Path):
    pytest.importorskip("matplotlib")
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        written.append(part.write("overoptimisation", overoptimisation, small, folder))
    assert [path.name for path in written[0]] == [
        "overoptimisation.json",
        *(
            f"overoptimisation-{picture}.{suffix}"
            for picture in ("gold", "beta", "frontier")
            for suffix in ("svg", "png")
        ),
    ]
    for one, other in zip(*written, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.slow
def test_the_quick_study_bears_out_what_the_docs_say_of_it():
    numbers = overoptimisation.measure(Options(quick=True), lambda: None)
    claims = {row[0]: row[3] for row in overoptimisation.tables(numbers)[-1].rows}
    for said, verdict in (
        ("trained on a proxy", "confirmed"),
        ("KL is the axis", "confirmed"),
        ("RL spends more KL", "confirmed"),
        ("for best of n", "confirmed"),
        ("the KL of best of n", "confirmed"),
        ("five gold rewards", "not confirmed"),
        ("at the same KL a penalty", "confirmed"),
        ("a beta too large", "confirmed"),
        ("an adaptive beta is more robust", "confirmed"),
        ("beta is in the unit", "confirmed"),
    ):
        assert [v for claim, v in claims.items() if claim.startswith(said)] == [verdict], said
