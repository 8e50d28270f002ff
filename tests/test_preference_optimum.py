"""Where training on preferences ends, against closed forms: DPO at ref exp(reward / beta) / Z.

The expected loss is a sum over all pairs of sequences of a small autoregressive policy, formed from
hidden states, in float64; nothing is sampled.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from preference_world import ENDS, PreferenceWorld, distance, frontier

from fused_rl import preference, scores
from fused_rl.links import Squared
from fused_rl.preference import PreferenceLoss

BETAS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
# A gradient that is nothing but rounding; those of other policies are 1e-3 and more.
STATIONARY, MOVING = 1e-14, 1e-3


@pytest.fixture
def world() -> PreferenceWorld:
    return PreferenceWorld()


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    """docs/optimum.py."""
    pytest.importorskip("matplotlib")
    path = Path(__file__).parents[1] / "docs" / "optimum.py"
    spec = importlib.util.spec_from_file_location("optimum", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slope_at(world, loss, probability) -> float:
    return float(world.slope(world.policy(probability), loss).abs().max())


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_ends_at_the_closed_form(world, beta):
    """And its implicit reward is the reward, up to a constant."""
    found = world.trained(preference.dpo(beta))
    assert (found - world.best(beta)).abs().max() < 1e-8
    assert distance(found, world.log_ref.exp()) > 0.05
    implicit = beta * (found.log() - world.log_ref)
    assert float((implicit - world.reward).std()) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_the_closed_form_has_no_gradient(world, beta):
    """To rounding, whatever an optimiser makes of it; at a neighbouring beta there is one."""
    loss = preference.dpo(beta)
    assert slope_at(world, loss, world.best(beta)) < STATIONARY
    assert slope_at(world, loss, world.best(2 * beta)) > MOVING


def test_the_closed_form_is_the_best_of_its_trade(world):
    """reward - beta KL falls from there in every direction."""
    for beta in BETAS:
        best = world.best(beta)
        worth = world.expected_reward(best) - beta * world.kl(best)
        assert worth == pytest.approx(
            beta * float((world.log_ref + world.reward / beta).logsumexp(-1)), rel=1e-12
        )
        for _ in range(20):
            other = (best.log() + 0.1 * torch.randn(world.B, dtype=torch.float64)).softmax(-1)
            assert world.expected_reward(other) - beta * world.kl(other) < worth


def test_pairs_may_be_drawn_by_any_law(world):
    """It is DPO's optimum still, and no longer IPO's: that one asks whom an answer meets."""
    ipo, at = preference.ipo(0.3), world.best_of_ipo(0.3)
    assert slope_at(world, ipo, at) < STATIONARY
    world.drawn = torch.rand(world.B, dtype=torch.float64).softmax(-1) * 0.5 + 0.5 * world.drawn
    world.drawn = world.drawn * torch.linspace(0.2, 1.8, world.B, dtype=torch.float64)
    world.drawn = world.drawn / world.drawn.sum()
    assert slope_at(world, preference.dpo(0.5), world.best(0.5)) < STATIONARY
    assert slope_at(world, ipo, at) > MOVING
    assert slope_at(world, ipo, world.best_of_ipo(0.3)) < STATIONARY


def test_robust_dpo_forgives_judgements_that_were_turned_round(world):
    """By its share of them it is unbiased; DPO, and DPO that is smoothed, end elsewhere."""
    world.flipped = 0.2
    at = world.best(1.0)
    assert slope_at(world, preference.robust(1.0, smoothing=0.2), at) < STATIONARY
    assert slope_at(world, preference.dpo(1.0), at) > MOVING
    assert slope_at(world, preference.dpo(1.0, smoothing=0.2), at) > MOVING


DIVERGENCES = {
    "forward KL": (scores.ForwardKL(), lambda x: 1 / (1 - x), 1.0),
    "Jensen-Shannon": (scores.JensenShannon(), lambda x: x.exp() / (2 - x.exp()), 2.0),
    "alpha": (scores.Alpha(0.4), lambda x: (1 - 0.6 * x) ** (-1 / 0.6), 1 / 0.6),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_f_dpo_ends_at_the_optimum_of_its_divergence(world, name, beta):
    """ref g((reward + c) / beta), with g the inverse of f'."""
    derivative, inverse, top = DIVERGENCES[name]
    if name == "Jensen-Shannon":
        top = float(torch.tensor(top, dtype=torch.float64).log())
    at = world.best_of_divergence(inverse, beta, top)
    assert float(at.sum()) == pytest.approx(1, abs=1e-10)
    loss = preference.f_dpo(derivative, beta)
    assert slope_at(world, loss, at) < 1e-10
    assert slope_at(world, loss, world.best(beta)) > MOVING
    assert (world.trained(loss) - at).abs().max() < 1e-6


@pytest.mark.parametrize("name", ENDS)
def test_each_loss_ends_at_its_own_optimum(world, name):
    loss, _, optimum = ENDS[name]
    at = optimum(world)
    assert float(at.sum()) == pytest.approx(1, abs=1e-12)
    assert (world.trained(loss) - at).abs().max() < 1e-7
    kl, reward = world.kl(at), world.expected_reward(at)
    lost = frontier(world, kl) - reward
    if name.startswith("dpo"):
        assert abs(lost) < 1e-9
    else:
        assert lost > {"ipo": 0.01, "cpo": 0.2, "sim": 0.5}[name[:3]]


def test_no_beta_of_dpo_ends_where_the_others_do(world):
    best = [world.best(float(beta)) for beta in torch.logspace(-2, 2, 400, dtype=torch.float64)]
    nearest = {}
    for name, (_, _, optimum) in ENDS.items():
        at = optimum(world)
        nearest[name[:3]] = min(distance(at, other) for other in best)
    assert nearest["dpo"] < 0.01
    assert nearest["ipo"] > 0.05 and nearest["cpo"] > 0.1 and nearest["sim"] > 0.2


def test_simpo_does_not_know_the_reference(world):
    loss, _, optimum = ENDS["simpo(beta=2.0, gamma=0)"]
    at = optimum(world)
    world.ref = world.current
    assert slope_at(world, loss, at) < STATIONARY
    torch.testing.assert_close(optimum(world), at, rtol=1e-12, atol=0)


def test_ipo_of_sums_is_that_of_the_paper(world):
    """ref exp(P(wins) / tau) / Z (arXiv 2310.12036, eq. 7), which the one per token is not."""
    tau = 0.5
    loss = PreferenceLoss(scores.LogRatio(1.0), Squared(1 / (2 * tau)))
    at = (world.log_ref + world.wins @ world.drawn / tau).softmax(-1)
    assert slope_at(world, loss, at) < STATIONARY
    assert slope_at(world, preference.ipo(tau), at) > MOVING


def test_ipo_of_certain_preferences_stays_where_dpo_runs_away(world):
    """Log-ratios per token spread over less than 1 / tau however sure the judges are; DPO's over
    the spread of the rewards, without bound."""
    world.reward = 1000 * world.reward
    at = world.best_of_ipo(0.5)
    assert slope_at(world, preference.ipo(0.5), at) < STATIONARY
    ratios = (at.log() - world.log_ref) / world.length
    assert 1.8 < float(ratios.max() - ratios.min()) < 2.0
    assert float(world.reward.max() - world.reward.min()) > 1000


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_adam_comes_within_a_thousandth(world, picture, monkeypatch, beta):
    """As in the picture, with fewer steps."""
    monkeypatch.setattr(picture, "STEPS", 250)
    errors = picture.distances(world, beta)
    assert errors[0] > 0.1 and errors[-1] < 1e-3


def test_the_picture_is_what_its_script_draws(picture, monkeypatch, tmp_path):
    """The same bytes each time; names and places of the policies' ends as in the page's."""
    monkeypatch.setattr(picture, "STEPS", 20)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        picture.draw(tmp_path / name / picture.PICTURE.name)
    first, second = (tmp_path / n / picture.PICTURE.name for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    committed = picture.PICTURE.read_text()
    for name in ENDS:
        assert f">{name}</text>" in committed
    place = re.compile(r'x="([\d.]+)" y="([\d.]+)"[^>]*>(?:dpo|ipo|cpo|simpo)\(')
    ends = [place.findall(text) for text in (first.read_text(), committed)]
    assert len(ends[1]) == len(ENDS)
    for ours, theirs in zip(*ends, strict=True):
        assert [float(x) for x in ours] == pytest.approx([float(x) for x in theirs], abs=0.5)
