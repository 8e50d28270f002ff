"""The study's part on gradients: its moments against closed forms, its ways, files and claims."""

import json

import pytest
import torch

from fused_rl import KL, Divergence, Level
from fused_rl.study import bias_pictures, gradient_claims, gradients, ways
from fused_rl.study.enumeration import Credit, Setup, Target
from fused_rl.study.exact_enumeration import MISSING, ExactWorld, Use
from fused_rl.study.moments import (
    Way,
    batch_error,
    behind,
    crossing,
    drawn,
    kl,
    on_line,
    run_to,
    trained,
)
from fused_rl.study.part import Options, write
from fused_rl.system.drawing import save

F64 = {"dtype": torch.float64}
K1_REWARD = ways.ON_PATH["k1 in reward"]


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


@pytest.fixture(scope="module")
def one_token() -> ExactWorld:
    """Sequences of one token of three, none of which needs an end."""
    return ExactWorld(3, V=3, T=1)


@pytest.fixture(scope="module")
def numbers() -> dict:
    """Of one small world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "cases", lambda options: [(5, True)])
        return gradients.measure(Options(quick=True), lambda: None)


def by_hand(world: ExactWorld, weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [V] and variance, of weight(d) * score, written out for one categorical variable."""
    p, q = world.current[0].softmax(-1), world.ref[0].softmax(-1)
    score = torch.eye(len(p), **F64) - p
    g = weight((p / q).log())[:, None] * score
    mean = p @ g
    return mean, p @ g.square().sum(-1) - mean.square().sum()


@pytest.mark.parametrize(
    ("where", "kind", "weight"),
    [
        (Setup(Level.TOKEN), KL.K1, torch.ones_like),
        (Setup(Level.TOKEN), KL.K2, lambda d: d),
        (Setup(Level.TOKEN), KL.K3, lambda d: 1 - torch.exp(-d)),
        (Setup(reward=Credit.TO_GO), KL.K1, lambda d: d),
        (Setup(reward=Credit.TO_GO), KL.K3, lambda d: torch.exp(-d) - 1 + d),
        (Setup(Level.TOKEN, reward=Credit.TO_GO), KL.K3, lambda d: d),
        (Setup(Level.TOKEN, grad=KL.K2), KL.K3, lambda d: d),
    ],
)
def test_moments_of_one_token_are_those_written_out(one_token, where, kind, weight):
    assert one_token.B == 3
    mean, variance = by_hand(one_token, weight)
    truth = by_hand(one_token, lambda d: d)[0]
    found = Way(where, kind).moments(one_token, one_token.current)
    assert found["bias"] == pytest.approx(((mean - truth).norm() / truth.norm()).item(), abs=1e-9)
    assert found["noise"] == pytest.approx((variance.sqrt() / truth.norm()).item(), rel=1e-10)


def test_the_exact_kl_of_one_token_has_no_noise(one_token):
    found = Way(Use(True), Divergence.REVERSE).moments(one_token, one_token.current)
    assert found["bias"] == 0 and found["noise"] < 1e-7
    assert found["cosine"] == pytest.approx(1, abs=1e-12)


def test_the_gradient_of_a_sequence_is_that_of_a_batch_of_it_alone(world):
    """Each sequence by itself, through autograd of the table [S, V]."""
    setup = Setup(Level.PRODUCT, Level.PRODUCT, True)
    own = world.gradients(setup, KL.K3, world.old)
    for b in (0, 4, 14):
        alone = torch.zeros(world.B, **F64)
        alone[b] = 1
        got = torch.zeros_like(world.current).index_add(0, world.state[b], own[b])
        leaf = world.current.clone().requires_grad_()
        d = (world.logprobs(leaf) - world.logprobs(world.ref)).sum(-1)[b]
        ratio = (world.logprobs(leaf) - world.logprobs(world.old)).sum(-1)[b].exp()
        (expected,) = torch.autograd.grad(ratio * (torch.exp(-d) - 1 + d), leaf)
        torch.testing.assert_close(got, expected, atol=1e-13, rtol=0)


def test_variance_is_what_samples_have(world):
    """A hundred thousand sampled sequences: within 2% of the exact noise of one."""
    for sampler in (world.current, world.old):
        g = K1_REWARD.gradients(world, sampler)
        flat = torch.stack(
            [
                world.mean(g * (torch.arange(world.B) == b)[:, None, None], sampler)
                for b in range(world.B)
            ]
        ).flatten(1)
        p = world.probability(sampler)
        each = flat / p[:, None]
        drawn_ = torch.multinomial(
            p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0)
        )
        spread = each[drawn_].var(0).sum().sqrt() / world.truth[Target.REVERSE].norm()
        noise = K1_REWARD.moments(world, sampler)["noise"]
        assert noise == pytest.approx(spread.item(), rel=0.02)


@pytest.mark.parametrize("off_policy", [False, True])
def test_targets_are_the_verdicts_of_the_enumeration(world, off_policy):
    """In another world too, of longer sequences."""
    sampler = "old" if off_policy else "current"
    other = ExactWorld(1, V=3, T=4)
    for way in [w for w in ways.every() if isinstance(w.where, Setup) and w.where.grad is None]:
        verdict = world.verdict(way.where, way.kind, off_policy=off_policy)
        expected = "biased" if verdict is None else verdict.value
        assert way.moments(other, getattr(other, sampler))["target"] == expected, way


def test_a_kl_in_the_reward_alone_is_the_missing_term(world):
    way = Way(Use(reward="exact", credit="to go"), Divergence.REVERSE)
    assert way.moments(world, world.current)["target"] == MISSING


def test_credit_for_earlier_tokens_is_noise_alone(world):
    """k1 to go and k1 of the whole sequence have the same mean."""
    whole = Way(Setup(reward=Credit.TOTAL), KL.K1).moments(world, world.current)
    to_go = K1_REWARD.moments(world, world.current)
    assert whole["bias"] == to_go["bias"] == 0
    assert whole["noise"] > 1.05 * to_go["noise"]


def test_ways_name_every_choice_once():
    every = [ways.columns(way) for way in ways.every()]
    assert len(set(every)) == len(every) == len(ways.every())
    assert ("loss, token", "token attached", "k3, grad k2") in every
    assert set(ways.USED) <= set(ways.NAMED)
    assert set(ways.NAMED) == set(ways.USED) | set(ways.ON_PATH) | set(ways.STALE)


def test_policies_are_as_far_away_as_asked():
    world = ExactWorld(2, V=3, T=4)
    direction, reward = drawn(world, torch.Generator().manual_seed(2), 2.0)
    for distance in (1e-3, 0.5, 2.0):
        far = on_line(world, direction, distance)
        assert kl(world, far, world.ref) == pytest.approx(distance, rel=1e-9)
        here = world.at(current=far)
        assert kl(here, far, behind(here, direction, distance)) == pytest.approx(distance, rel=1e-9)
    policies = run_to(world, reward, 0.5, steps=6)
    distances = [kl(world, policy, world.ref) for policy in policies]
    assert len(policies) == 7 and distances[0] == 0 < distances[1]
    assert distances[-1] == pytest.approx(0.5, rel=1e-9)
    with pytest.raises(ValueError, match="100 nats"):
        crossing(lambda x: 1 - 1 / (1 + x), 100)


def test_training_ends_at_the_policy_that_is_known():
    """Without end, gradient ascent comes to reference * exp(reward / beta), normalised."""
    world = ExactWorld(4, V=3, T=2)
    reward = torch.randn(world.B, generator=torch.Generator().manual_seed(4), **F64)
    last = trained(world, reward, 1.0, steps=1500, beta=1.0)[-1]
    expected = (world.logprobs(world.ref).sum(-1) + reward).softmax(-1)
    torch.testing.assert_close(world.probability(last), expected, atol=1e-9, rtol=0)


def test_at_moves_policies_and_truth(world):
    moved = world.at(current=world.ref)
    assert moved.truth[Target.REVERSE].abs().max() < 1e-15
    assert world.truth[Target.REVERSE].abs().max() > 0.1
    assert torch.equal(moved.old, world.old)


def test_error_of_a_batch():
    assert batch_error(0.3, 4.0, 100) == pytest.approx(0.5)


def test_same_seed_same_numbers(numbers):
    """The path is measured again, and nothing in the numbers is more than JSON holds."""
    world = ExactWorld(5, V=3, T=4)
    direction, _ = drawn(world, torch.Generator().manual_seed(5), gradients.FARTHEST)
    again = gradients.on_path(world, direction, gradients.path_of(True))
    assert gradients.lines([again["path"]]) == numbers["path"]["lines"]
    assert json.loads(json.dumps(numbers)) == numbers


def test_known_slopes(numbers):
    """Near the reference the bias of k3 grows as the log-ratio, the noise of k1 as its inverse."""
    distance, lines = numbers["path"]["distance"], numbers["path"]["lines"]
    d = [x**0.5 for x in distance]
    for name, quantity, power in (
        ("k3 in loss", "bias_token", 1),
        ("k1 in loss", "noise", -1),
        ("k3 in reward", "noise", 1),
        ("k1 in reward", "noise", 0),
    ):
        slope = gradient_claims.slope(d, lines[name][quantity], below=0.1)
        assert slope == pytest.approx(power, abs=0.1), name
    assert gradient_claims.slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0], 9) == pytest.approx(2)


def test_what_the_study_finds(numbers):
    """The claims that do not hang on a world, and the ranking's ends."""
    claims = {row[0]: row[3] for row in gradient_claims.claims(numbers).rows}
    assert len(claims) == 13
    for claim, verdict in claims.items():
        if "huge variance" in claim:
            assert verdict.startswith("depends: beyond")
        elif "open question" in claim:
            assert verdict == "answered: 4 ways have it"
        elif "stays good" in claim:
            assert verdict.startswith("depends: ")
        else:
            assert verdict == "confirmed", claim
    used, ranking, _ = gradients.tables(numbers)
    assert len(used.rows) == len(ranking.rows) == len(ways.USED)
    assert {len(row) for row in used.rows} == {len(used.header)}
    assert {len(row) for row in ranking.rows} == {len(ranking.header)}
    assert ranking.rows[0][0] == "exact in loss, later in reward, product ratio"
    every = gradients.everything(numbers)
    assert len(every.rows) == len(ways.every())
    assert {len(row) for row in every.rows} == {len(every.header)}
    row = next(r for r in every.rows if r[:3] == ("loss, product", "product detached", "k2"))
    assert row[3:5] == row[6:8] == ("reverse", "0")


def test_a_claim_fails_where_its_numbers_say_so(numbers):
    other = json.loads(json.dumps(numbers))
    other["path"]["lines"]["k1 in reward"]["bias_most"][0] = 0.2
    other["staleness"]["lines"]["k1 in loss"]["cosine"][-1] = 0.9
    other["same"]["sum"] = 0.1
    verdicts = [row[3] for row in gradient_claims.claims(other).rows]
    before = [row[3] for row in gradient_claims.claims(numbers).rows]
    changed = [i for i, pair in enumerate(zip(verdicts, before, strict=True)) if len({*pair}) == 2]
    assert changed == [0, 6, 11]
    assert {verdicts[i] for i in changed} == {"not confirmed"}


def test_files(numbers, tmp_path):
    pytest.importorskip("matplotlib")
    paths = write("gradients", gradients, numbers, tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    assert len(paths) == 1 + 2 * len(gradients.PICTURES)
    for path in paths:
        assert path.stat().st_size < (150_000 if path.suffix == ".json" else 100_000)
    assert json.loads(paths[0].read_text()) == numbers
    again = tmp_path / "gradients-bias.svg"
    first = again.read_bytes()
    save(gradients.PICTURES["bias"](numbers), again)
    assert again.read_bytes() == first
    assert b"k3 in reward" in first


def test_labels_do_not_overlap():
    heights, sizes = [0.5, 0.51, 0.1, 0.52, 0.9], [0.06] * 5
    found = bias_pictures.places(heights, sizes)
    assert found[2] == pytest.approx(0.1) and found[4] == pytest.approx(0.9)
    assert [found[i] for i in (0, 1, 3)] == pytest.approx([0.45, 0.51, 0.57])


def test_rounding():
    assert gradients.sequences(2.0) == "400"
    assert gradients.rounded(1.23456789e-3) == 1.234568e-3
    assert gradients.rounded(1e-12) == 0
    assert [gradients.percent(x) for x in (0.0, 0.0123, 0.0996, 0.5, 2.34)] == [
        "0", "1.2", "10", "50", "234",
    ]  # fmt: skip
