"""The demo of preferences: what is chosen over what, what is trained on it, and that it helps."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from fused_rl import cli, diagnose, preference
from fused_rl.demo import preference as demo
from fused_rl.demo import train
from fused_rl.demo.preference import PreferenceConfig, batches, formed, ranked_pairs
from fused_rl.demo.report import Panel, write_figure
from fused_rl.demo.rollout import answer_logprobs, sample
from fused_rl.demo.task import sample_problems, start


@pytest.fixture
def config(tmp_path):
    """A run of seconds."""
    sizes = {"steps": 4, "first_steps": 5, "problems": 32, "pairs": 8, "fresh": 8}
    return PreferenceConfig(**sizes, out=str(tmp_path / "out"))


def log_of(config):
    with open(f"{config.out}/log.json") as file:
        return json.load(file)


def test_ranked_pairs_by_hand():
    rewards = torch.tensor([0.2, 0.9, 0.5, 0.3, 0.3, 0.3, 1.0, 0.0, 1.0])
    chosen, rejected = ranked_pairs(rewards, 3)
    assert (chosen.tolist(), rejected.tolist()) == ([1, 6], [0, 7])


def test_batches_pass_over_all_pairs_in_a_new_order():
    some = batches(7, 2, torch.Generator().manual_seed(0))
    first, second = ([i for _ in range(3) for i in next(some).tolist()] for _ in range(2))
    assert all(len(set(one)) == 6 and set(one) <= set(range(7)) for one in (first, second))
    assert first != second
    assert sorted(next(batches(3, 64, torch.Generator())).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_loss_of_a_step_by_its_formula(loss):
    """From the model's own logits."""
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    rollout = sample(model, tokenizer, sample_problems(6, torch.Generator().manual_seed(0)))
    reference = answer_logprobs(model, rollout, 1.0) - torch.rand(6, 5)
    rows, config = torch.tensor([4, 0, 2, 5]), PreferenceConfig(loss=loss, beta=0.7)
    output = formed(model, rollout, rows, reference, config)
    logits = model(rollout.sequences, attention_mask=rollout.attention_mask).logits[:, 5:-1]
    logprobs = torch.log_softmax(logits.double(), -1).gather(-1, rollout.labels[..., None])[..., 0]
    mask = rollout.loss_mask
    if loss == "dpo":
        scores = (logprobs - reference).where(mask, 0.0).sum(-1)
        margin = 0.7 * (scores[[4, 0]] - scores[[2, 5]])
        shift = 0.0
    else:
        scores = logprobs.where(mask, 0.0).sum(-1) / mask.sum(-1)
        margin, shift = 0.7 * (scores[[4, 0]] - scores[[2, 5]]), 1.0
    expected = (1 + (shift - margin).exp()).log().mean()
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.metrics["margin"].double(), margin.mean(), atol=1e-5, rtol=0)


def test_a_run_writes_log_and_figure(config, capsys):
    assert train.run(config) == 0
    log = log_of(config)
    assert [record["step"] for record in log["steps"]] == [1, 2, 3, 4]
    assert set(log["steps"][0]) == {
        *("step", "reward", "solved", "reward_chosen", "reward_rejected", "margin", "accuracy"),
        *("log_ratio", "logprobs_chosen", "logprobs_rejected", "length_chosen", "length_rejected"),
        *("length_bias", "nll", "entropy", "empty_fraction", "unknown_fraction", "loss", "tokens"),
        *("seconds", "tokens_per_second"),
    }
    assert log["interrupted"] is False and log["loss_step"] is None
    assert log["config"]["loss"] == "dpo"
    with open(f"{config.out}/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert " pairs; mean reward of the chosen 0." in printed and "Mean reward: 0." in printed


def test_the_first_step_of_each_loss(config):
    """Nothing has moved: DPO's margin is 0, and its loss log 2; SimPO's is not."""
    assert train.run(config) == 0
    first = log_of(config)["steps"][0]
    assert first["margin"] == pytest.approx(0, abs=1e-6) == first["log_ratio"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert train.run(replace(config, loss="simpo")) == 0
    first = log_of(config)["steps"][0]
    assert first["log_ratio"] == pytest.approx(0, abs=1e-5) and abs(first["margin"]) > 0.01


def test_a_seed_repeats_a_run_and_another_does_not(config):
    runs = []
    for seed in (1, 1, 2):
        assert train.run(replace(config, seed=seed)) == 0
        steps = log_of(config)["steps"]
        runs.append([(r["loss"], r["reward"], r["logprobs_chosen"], r["tokens"]) for r in steps])
    assert runs[0] == runs[1] != runs[2]


def test_ctrl_c_keeps_what_was_logged(config, monkeypatch):
    def record_of(step, *rest, original=demo.record_of):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, *rest)

    monkeypatch.setattr(demo, "record_of", record_of)
    assert train.run(config) == 130
    assert len(log_of(config)["steps"]) == 2 and log_of(config)["interrupted"] is True


def rise(config) -> float:
    """In reward of fresh answers, from the first five steps to the last tenth."""
    assert train.run(config) == 0
    summary = log_of(config)["summary"]
    return summary["last_mean_reward"] - summary["first_mean_reward"]


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_fresh_answers_get_better_and_with_pairs_turned_around_worse(config, monkeypatch, loss):
    config = PreferenceConfig(steps=60, problems=1024, loss=loss, out=config.out)
    assert rise(config) > 0.1
    steps = log_of(config)["steps"]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and steps[-1]["accuracy"] > 0.8
    monkeypatch.setattr(demo, "ranked_pairs", lambda *given: ranked_pairs(*given)[::-1])
    assert rise(replace(config, steps=30)) < -0.1


def test_the_loss_that_was_asked_for():
    assert PreferenceConfig().preference_loss() == preference.dpo(0.1)
    assert PreferenceConfig(beta=0.3).preference_loss() == preference.dpo(0.3)
    assert PreferenceConfig(loss="simpo").preference_loss() == preference.simpo(2.0)
    assert PreferenceConfig(loss="simpo", beta=5.0).preference_loss() == preference.simpo(5.0)


def test_the_command(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(train, "run", lambda config: configs.append(config) or 0)
    task = ["demo", "--task", "preference"]
    options = ["--loss", "simpo", "--beta", "2.5", "--steps", "7", "--seed", "3", "--out", "there"]
    assert cli.main(task) == cli.main([*task, *options]) == cli.main([*task, "--processes=1"]) == 0
    asked = PreferenceConfig(7, 3, "there", "simpo", 2.5)
    assert configs == [PreferenceConfig(), asked, PreferenceConfig()]
    for given, said in {
        ("--kl", "k1"): "--kl is of another task than preference",
        ("--model", "here"): "--model is of another task than preference",
        ("--processes", "2"): "the task preference runs in one process",
        ("--beta", "0"): "--beta must be above 0 in the task preference",
        ("--loss", "ipo"): "invalid choice: 'ipo'",
    }.items():
        try:
            assert cli.main([*task, *given]) == 2
        except SystemExit as left:
            assert left.code == 2
        assert said in capsys.readouterr().err
    assert cli.main(["demo", "--loss", "dpo"]) == 2
    assert "--loss is of another task than grpo" in capsys.readouterr().err
    assert len(configs) == 3


def test_a_panel_of_two_curves(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr("fused_rl.system.outputs.replacing", lambda path: _Nothing())
    records = [{"step": i, "a_up": float(i), "a_down": -2.0 * i} for i in range(5)]
    panels = (Panel("a_up", "Up", "nats", "red"), Panel("a_up", "Both", "nats", "red", "a_down"))
    write_figure(tmp_path / "curves.png", records, panels)
    one, two = drawn[0].axes
    assert [len(axes.lines) for axes in (one, two)] == [2, 4]
    assert one.get_legend() is None and one.get_ylim()[0] == 0.0
    assert [text.get_text() for text in two.get_legend().get_texts()] == ["up", "down"]
    assert two.get_ylim()[0] == -8.0
    assert two.lines[3].get_ydata().tolist() == [0.0, -2.0, -4.0, -6.0, -8.0]


class _Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_rewards_rise_and_the_chosen_become_less_likely_all_the_same(config, loss, seed):
    config = PreferenceConfig(seed=seed, loss=loss, out=config.out)
    assert rise(config) > 0.25
    steps = log_of(config)["steps"]
    assert [f.name for f in diagnose(steps)] == ["likelihood displacement"]
    assert sum(record["accuracy"] for record in steps[-20:]) / 20 > 0.9
