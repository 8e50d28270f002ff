"""The study of what a KL trains: modes beside theory, a run, verdicts that can turn, pictures."""

import json
import math
import statistics

import pytest
import torch

from fused_rl import Divergence
from fused_rl.study import curves, findings, modes, part

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import itertools

from fused_rl.study import training
from fused_rl.study.settings import OPTIONS, Option, Run, train

WAYS = {way.name: way for way in modes.WAYS}
SEEKING = ("k2 in loss", "k3, gradient of k2", "k3 in reward and loss", "exact in loss")


@pytest.fixture(scope="module")
def ends() -> dict:
    """Of every way from every start."""
    return modes.gathered([modes.end(case) for case in modes.cases()])


def gradient(way: Option) -> torch.Tensor:
    """Of mean and log std, where the narrow start is."""
    line = modes.Line.with_two_bumps()
    mean, std = modes.STARTS["narrow"]
    leaves = torch.tensor([mean, math.log(std)], dtype=torch.float64, requires_grad=True)
    loss = modes.loss(line, line.policy(leaves[0], leaves[1].exp()), way)
    return torch.autograd.grad(loss, leaves)[0]


def test_k3_in_loss_ends_with_the_moments_of_the_reference(ends):
    """Those that minimise the forward KL among Gaussians, whatever the reference."""
    line = modes.Line.with_two_bumps()
    p = line.reference.exp()
    mean = float(p @ line.x)
    std = math.sqrt(float(p @ line.x**2) - mean**2)
    for start in modes.STARTS:
        for way in ("k3 in loss", "exact forward in loss"):
            end = ends["starts"][start][way]
            assert (end["mean"], end["std"]) == pytest.approx((mean, std), abs=2e-5)


def test_options_of_the_reverse_kl_end_in_the_nearer_mode(ends):
    """Far from the other bump the KL to one of weight w is -log w."""
    found = ends["starts"]["narrow"]
    weight, mean, std = modes.BUMPS[0]
    end = found["k1 in reward"]
    assert (end["mean"], end["std"]) == pytest.approx((mean, std), abs=0.02)
    assert end["reverse"] == pytest.approx(-math.log(weight), abs=0.01)
    for way in SEEKING:
        assert (found[way]["mean"], found[way]["std"]) == pytest.approx(
            (end["mean"], end["std"]), abs=2e-5
        )


def test_from_a_broad_start_the_reverse_kl_stays_in_a_worse_minimum(ends):
    narrow, broad = (ends["starts"][start]["k1 in reward"] for start in ("narrow", "broad"))
    assert broad["std"] > 2 * narrow["std"]
    assert broad["reverse"] > narrow["reverse"] + 0.1


def test_k1_in_loss_moves_nothing(ends):
    for start in modes.STARTS:
        found = ends["starts"][start]
        assert found["k1 in loss"] == found["start"]


def test_the_gradient_of_k3_in_reward_is_reverse_minus_forward():
    reverse, forward = (gradient(WAYS[f"exact{w} in loss"]) for w in ("", " forward"))
    found = gradient(WAYS["k3 in reward"])
    torch.testing.assert_close(found, reverse - forward, rtol=0, atol=1e-12)


def test_the_policy_is_the_gaussian_that_it_is_said_to_be():
    line = modes.Line.with_two_bumps()
    mean, std = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gaussian = (-((line.x - mean) ** 2) / (2 * std**2)).log_softmax(-1)
    hidden = line.policy(mean, std)
    torch.testing.assert_close(line.logprobs(hidden), gaussian)
    kl = float((gaussian.exp() * (gaussian - line.reference)).sum())
    assert line.divergence(hidden, Divergence.REVERSE) == pytest.approx(kl, rel=1e-12)


def small(name: str, **changes) -> dict:
    option = next(o for o in OPTIONS if o.name == name)
    return train(Run(option, 3, 3, problems=2, every=1, fresh=16, **changes))


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_starts_at_the_reference_and_repeats_itself(staleness):
    found = small("k3 in reward and loss", staleness=staleness)
    assert found == small("k3 in reward and loss", staleness=staleness)
    assert [point["step"] for point in found["curve"]] == [0, 1, 2, 3]
    assert found["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert found["curve"][-1]["kl"] > 0
    assert set(found["held_out"]) == {"3", "4", "5"}


def test_the_value_in_the_loss_trains_nothing():
    """k3 with the gradient of k2 is k2; without any KL it is something else."""
    first, second, without = map(small, ("k3, gradient of k2", "k2 in loss", "no KL"))
    last = [run["curve"][-1]["kl"] for run in (first, second, without)]
    assert last[0] == pytest.approx(last[1], abs=1e-5)
    assert last[0] != last[2]


def test_a_difference_counts_if_it_has_one_sign_and_twice_its_error():
    assert findings.differences([3.0, 4.0, 5.0], [1.0, 2.5, 2.5]) == (pytest.approx(2.0), 1)
    assert findings.differences([1.0, 2.0, 3.0], [2.0, 3.0, 4.5])[1] == -1
    # One seed against the others; and all alike, but two of them hardly.
    assert findings.differences([1.0, 2.0, 3.0], [0.0, 1.0, 3.1])[1] == 0
    assert findings.differences([1.0, 2.0, 3.0], [0.9, 1.9, 0.0])[1] == 0
    assert findings.differences([1.0], [0.0])[1] == 0


def made_up(ends: dict, better: str) -> dict:
    """Numbers of three seeds in which one option earns more than all others."""
    runs = []
    for seed in range(3):
        reference = Run(Option(findings.REFERENCE), seed, 0)
        for run in [reference, *(r for r in training.runs(part.Options()) if r.seed == seed)]:
            name = run.option.name
            if name == findings.REFERENCE and run is not reference:
                continue
            reward = 0.6 + 0.01 * seed + 0.2 * (name == better)
            record = {"reward": reward, "kl": 0.1, "kl_answer": 0.5, "entropy": 0.4}
            end = record | {"some_right": 0.8, "different": 2.5}
            curve = {key: [record[key]] * 3 for key in ("reward", "kl", "entropy")}
            held_out = {digits: end for digits in ("3", "4", "5")}
            about = {"option": name, "staleness": run.staleness, "seed": seed}
            runs.append(about | curve | {"held_out": held_out})
    return {"beta": 0.1, "seeds": 3, "steps": [0, 5, 10], "runs": runs, "modes": ends}


@pytest.mark.parametrize(
    ("better", "expected"), [("k1 in reward", "confirmed"), ("k3 in loss", "not confirmed")]
)
def test_verdicts_follow_the_numbers(ends, better, expected):
    claims = findings.tables(made_up(ends, better))[-1]
    assert claims.title == "Claims"
    judged = {row[0]: row[3] for row in claims.rows}
    assert judged["k1 in reward earns more than k3 in loss on unseen lengths"] == expected
    assert judged["on samples 10 updates old no KL collapses"] == "not confirmed"
    assert judged["k1 in reward seeks one mode"] == "depends: on the start"
    assert judged["k3 in loss covers both modes"] == "confirmed"


def test_pictures_and_numbers_are_written(ends, tmp_path):
    numbers = made_up(ends, "k1 in reward")
    paths = part.write("training", training, numbers, tmp_path)
    assert json.loads(paths[0].read_text()) == numbers
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 5


def test_names_are_pushed_apart_about_where_they_were():
    found = curves.apart({"a": 0.0, "b": 0.01, "c": 1.0, "d": 0.02}, 0.1)
    assert [found[n] for n in "abd"] == pytest.approx([-0.09, 0.01, 0.11])
    assert found["c"] == 1.0
    crowd = curves.apart({str(i): i / 100 for i in range(9)}, 0.05)
    heights = sorted(crowd.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.0499
    assert statistics.fmean(heights) == pytest.approx(0.04)
