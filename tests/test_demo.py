"""The demo: it learns, it repeats itself, and it keeps what it has when it is stopped."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fused_rl import KL, cli, gpg, linear_logprobs
from fused_rl.demo import comparison, report, train
from fused_rl.demo.distill import DistillConfig, batch_of, rate, states
from fused_rl.demo.rollout import right_answers
from fused_rl.demo.task import Problem, UnusableModel, load, reward, sample_problems, start
from fused_rl.demo.train import DemoConfig

COMPARISON = {
    "tokens": 2,
    "hidden_size": 3,
    "vocabulary": 5,
    "dtype": "bfloat16",
    "ways": {
        "fused_rl": {"loss": 0.5, "seconds": 0.25, "peak_bytes": 3 * 2**20},
        "plain torch": {"loss": 0.5, "seconds": 0.5, "peak_bytes": None},
    },
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Three steps of 12 answers; the comparison at a large vocabulary has a test of its own."""
    monkeypatch.setattr(train, "compare_loss_steps", lambda: COMPARISON)
    return DemoConfig(steps=3, prompts=3, group_size=4, out=str(tmp_path / "out"))


def log_of(config):
    with open(f"{config.out}/log.json") as file:
        return json.load(file)


def rewards_of(config):
    return [record["reward"] for record in log_of(config)["steps"]]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("1 1 3 4", 1.0),
        ("  1 1\n3 4 ", 1.0),
        ("1 1 4 3", 0.5),
        ("3 1 4 1", 0.25),
        ("1 1 3", 0.75),
        ("1 1 3 4 4", 0.8),
        ("1 1 3 4 <pad>", 0.8),
        ("1134", 0.0),
        ("", 0.0),
    ],
)
def test_reward_by_hand(completion, expected):
    assert reward(Problem((3, 1, 4, 1)), completion) == expected


def test_problem_by_hand():
    problem = Problem((3, 1, 4, 1))
    assert (problem.prompt, problem.answer) == ("Sort 3 1 4 1:", "1 1 3 4")


def test_problems_repeat_with_their_generator():
    first, second = (sample_problems(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert {digit for p in first for digit in p.digits} <= set(range(10))


def test_tokenizer_has_one_token_per_word_and_comes_back():
    _, tokenizer = start(None, 1.0)
    ids = tokenizer("Sort 3 1 4 1:").input_ids
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "Sort 3 1 4 1 :"


def test_rollout_ends_at_the_first_end_of_sequence(config):
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    problems = sample_problems(64, torch.Generator().manual_seed(0))
    rollout = train.sample(model, tokenizer, problems)
    for labels, mask, problem, r in zip(
        rollout.labels.tolist(), rollout.loss_mask.tolist(), problems, rollout.rewards, strict=True
    ):
        ends = [i for i, token in enumerate(labels) if token == tokenizer.eos_token_id]
        length = ends[0] + 1 if ends else len(labels)
        assert mask == [i < length for i in range(len(labels))]
        answer = labels[: ends[0]] if ends else labels
        assert float(r) == pytest.approx(reward(problem, tokenizer.decode(answer)))
    assert 0 < rollout.loss_mask.float().mean() < 1


def test_answer_logprobs_are_those_of_the_models_own_logits(config):
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    problems = sample_problems(16, torch.Generator().manual_seed(0))
    rollout = train.sample(model, tokenizer, problems)
    logits = model(rollout.sequences, attention_mask=rollout.attention_mask).logits[:, 5:-1]
    expected = torch.log_softmax(logits.double() / 0.7, -1)
    expected = expected.gather(-1, rollout.labels[..., None])[..., 0].where(rollout.loss_mask, 0.0)
    actual = train.answer_logprobs(model, rollout, 0.7).where(rollout.loss_mask, 0.0)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_padding_on_the_left_changes_no_logprob():
    """Prompts of different lengths: the shorter one as it would be by itself."""
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    problems = [Problem((3, 1)), Problem((3, 1, 4, 1))]
    both = train.sample(model, tokenizer, problems)
    assert both.attention_mask[0, :6].tolist() == [0, 0, 1, 1, 1, 1]
    alone = replace(both, sequences=both.sequences[:1, 2:], labels=both.labels[:1])
    alone = replace(alone, attention_mask=both.attention_mask[:1, 2:])
    torch.testing.assert_close(
        train.answer_logprobs(model, both, 1.0)[:1], train.answer_logprobs(model, alone, 1.0)
    )


def test_a_run_writes_log_and_figure(config, capsys):
    assert train.run(config) == 0
    log = log_of(config)
    assert set(log) == {"config", "versions", "interrupted", "summary", "loss_step", "steps"}
    assert [record["step"] for record in log["steps"]] == [1, 2, 3]
    assert set(log["steps"][0]) == {
        *("step", "reward", "solved", "kl", "entropy", "clip_fraction", "loss"),
        *("tokens", "seconds", "tokens_per_second"),
    }
    assert log["config"]["seed"] == 0 and log["versions"]["torch"] == torch.__version__
    assert log["loss_step"] == COMPARISON and log["interrupted"] is False
    mean = sum(rewards_of(config)) / 3
    assert log["summary"]["first_mean_reward"] == pytest.approx(mean)
    with open(f"{config.out}/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "250 ms" in printed and "3 MiB" in printed and "n/a" in printed


def test_a_seed_repeats_a_run_and_another_does_not(config):
    runs = []
    for seed in (1, 1, 2):
        train.run(replace(config, seed=seed))
        runs.append(log_of(config)["steps"])
    for record in (record for run in runs for record in run):
        del record["seconds"], record["tokens_per_second"]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_ctrl_c_keeps_what_was_logged(config, monkeypatch, capsys):
    train.run(config)
    whole = rewards_of(config)
    updates = 0

    def update(*args, original=train.update):
        nonlocal updates
        updates += 1
        if updates == 2 * config.epochs * config.minibatches + 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "update", update)
    capsys.readouterr()
    assert train.run(config) == 130
    assert rewards_of(config) == whole[:2]
    assert log_of(config)["interrupted"] is True
    assert "Interrupted after 2 of 3 steps" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step(config, monkeypatch):
    def sample(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "sample", sample)
    assert train.run(config) == 130
    assert log_of(config)["steps"] == []
    assert log_of(config)["summary"]["first_mean_reward"] is None


def test_ctrl_c_in_the_comparison_keeps_a_complete_log(config, monkeypatch):
    def compare():
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "compare_loss_steps", compare)
    assert train.run(config) == 130
    assert log_of(config)["interrupted"] is False
    assert len(rewards_of(config)) == 3


def stop_after_steps(monkeypatch, config, steps, *numbers):
    """One signal after another reaches the process, in the midst of an update."""
    updates = 0

    def update(*args, original=train.update):
        nonlocal updates
        updates += 1
        if updates == steps * config.epochs * config.minibatches + 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(train, "update", update)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_every_signal_keeps_what_was_logged(number, status, config, monkeypatch, capsys):
    stop_after_steps(monkeypatch, config, 2, number)
    assert train.run(config) == status
    assert len(rewards_of(config)) == 2 and log_of(config)["interrupted"] is True
    assert "Interrupted after 2 of 3 steps" in capsys.readouterr().out
    with open(f"{config.out}/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_second_signal_while_results_are_written_spoils_nothing(config, monkeypatch, capsys):
    stop_after_steps(monkeypatch, config, 1, signal.SIGTERM)

    def save(*args, original=train.write_figure):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(train, "write_figure", save)
    assert train.run(config) == 143
    assert len(rewards_of(config)) == 1
    assert sorted(os.listdir(config.out)) == ["curves.png", "log.json"]
    assert "Interrupted after 1 of 3 steps" in capsys.readouterr().out


def test_a_signal_while_a_whole_run_is_written_ends_it_afterwards(config, monkeypatch, capsys):
    def save(*args, original=train.write_figure):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train, "write_figure", save)
    assert train.run(config) == 143
    assert len(rewards_of(config)) == 3 and log_of(config)["interrupted"] is False
    assert "Interrupted while measuring" in capsys.readouterr().out


def test_a_failure_keeps_what_was_logged_and_is_told(config, monkeypatch):
    def record_of(step, *rest, original=train.record_of):
        if step == 3:
            raise RuntimeError("out of memory")
        return original(step, *rest)

    monkeypatch.setattr(train, "record_of", record_of)
    with pytest.raises(RuntimeError, match="out of memory"):
        train.run(config)
    assert len(rewards_of(config)) == 2 and log_of(config)["interrupted"] is True


def test_a_terminal_that_is_gone_does_not_take_the_results_with_it(config, monkeypatch):
    """SIGHUP, and whatever is printed from then on fails."""
    stop_after_steps(monkeypatch, config, 2, signal.SIGHUP)

    class Gone(train.Progress):
        def __exit__(self, *args):
            super().__exit__(*args)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(train, "Progress", Gone)
    assert train.run(config) == 129
    assert len(rewards_of(config)) == 2


def test_where_results_go_is_tried_before_anything_else(config, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "start", lambda *args: pytest.fail("the model was made"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="file"):
            train.run(replace(config, out=str(out)))


@pytest.mark.parametrize("own_model", [False, True])
def test_the_number_of_threads_comes_back(config, own_model, saved, threads):
    torch.set_num_threads(3)
    config = replace(config, steps=1, model=str(saved) if own_model else None)
    assert train.run(config) == 0
    assert log_of(config)["versions"]["threads"] == (3 if own_model else 1)
    assert torch.get_num_threads() == 3


def test_the_estimators_that_were_asked_for():
    penalty = DemoConfig(beta=0.5, kl="k1", kl_grad="k2").policy_loss().kl
    assert (penalty.beta, penalty.value, penalty.grad) == (0.5, KL.K1, KL.K2)
    penalty = DemoConfig(kl="abs").policy_loss().kl
    assert (penalty.value, penalty.grad) == (KL.ABS, None)


def test_learning_rate_by_hand():
    config = DemoConfig(warmup_steps=20)
    assert config.learning_rate_at(5) == pytest.approx(1e-4)
    assert config.learning_rate_at(20) == config.learning_rate_at(400) == 4e-4
    assert replace(config, model="a directory").learning_rate_at(20) == 1e-5


def test_a_model_of_the_users(config, saved):
    assert train.run(replace(config, model=str(saved))) == 0
    assert len(rewards_of(config)) == 3
    assert log_of(config)["config"]["model"] == str(saved)


def test_training_starts_from_the_weights_of_the_directory(saved):
    torch.manual_seed(5)
    expected, _ = start(None, 1.0)
    model, tokenizer = start(saved, 0.5)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert tokenizer.padding_side == "left" and model.generation_config.temperature == 0.5


def test_a_tokenizer_without_padding_pads_with_its_end(saved, tmp_path):
    model, tokenizer = load(saved)
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path)[1].pad_token == "<eos>"


def test_unusable_models(saved, tmp_path):
    with pytest.raises(ValueError, match=r"must be a directory, got .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UnusableModel, match="has no model"):
        load(tmp_path)
    model, tokenizer = load(saved)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match="has no tokenizer"):
        load(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnusableModel, match="no end-of-sequence token"):
        load(tmp_path)


def test_an_update_moves_only_towards_better_answers():
    """The log-probability of an answer with a positive advantage rises, of the other one falls."""
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    rollout = train.sample(model, tokenizer, [Problem((3, 1, 4, 1))] * 2)
    before = train.answer_logprobs(model, rollout, 1.0)
    batch = train.TokenBatch.padded(rollout.labels, rollout.loss_mask, torch.tensor([1.0, -1.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = DemoConfig(beta=0.0)
    train.update(model, optimizer, rollout, torch.arange(2), batch, config)
    after = train.answer_logprobs(model, rollout, 1.0)
    change = (after - before).where(rollout.loss_mask, 0.0).sum(-1)
    assert change[0] > 0 > change[1]


def test_both_ways_of_the_comparison_give_the_same_loss(monkeypatch):
    monkeypatch.setattr(comparison, "DTYPE", torch.float32)
    fused, plain = (comparison.loss_step(way, 7, 16, 33)() for way in comparison.WAYS)
    assert fused == pytest.approx(plain, abs=1e-6)


def test_running_mean_by_hand():
    assert report.running_mean([1.0, 2.0, 6.0, 0.0], 1) == pytest.approx([1.5, 3, 8 / 3, 3])
    assert report.running_mean([1.0, 2.0], 0) == [1.0, 2.0]


def test_summary_by_hand():
    records = [{"reward": float(i), "seconds": 0.5} for i in range(20)]
    assert report.summarise(records) == {
        "steps_done": 20,
        "first_mean_reward": 2.0,
        "last_mean_reward": 18.5,
        "seconds": 10.0,
    }


# Distillation


@pytest.fixture
def distil(config):
    """A run of seconds: what the teacher knows by then is not much."""
    return DistillConfig(steps=12, teacher_steps=20, answers=16, warmup_steps=5, out=config.out)


def test_a_student_comes_nearer_to_its_teacher(distil, capsys):
    assert train.run(distil) == 0
    log = log_of(distil)
    assert [record["step"] for record in log["steps"]] == list(range(1, 13))
    assert set(log["steps"][0]) == {
        *("step", "reward", "solved", "divergence", "nll", "entropy", "teacher_entropy"),
        *("loss", "tokens", "seconds", "tokens_per_second"),
    }
    assert log["interrupted"] is False and log["loss_step"] is None
    first, *_, last = log["steps"]
    assert last["divergence"] < 0.9 * first["divergence"]
    assert last["loss"] == pytest.approx(last["divergence"], rel=1e-6)
    with open(f"{distil.out}/curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert "Mean reward of the teacher: 0." in capsys.readouterr().out


def test_a_seed_repeats_a_distillation_and_another_does_not(distil):
    runs = []
    for seed in (1, 1, 2):
        train.run(replace(distil, steps=2, teacher_steps=2, seed=seed))
        runs.append([(r["loss"], r["reward"], r["entropy"]) for r in log_of(distil)["steps"]])
    assert runs[0] == runs[1] != runs[2]


def test_ctrl_c_keeps_the_steps_of_a_distillation(distil, monkeypatch):
    from fused_rl.demo import distill

    def record_of(step, *rest, original=distill.record_of):
        if step == 3:
            raise KeyboardInterrupt
        return original(step, *rest)

    monkeypatch.setattr(distill, "record_of", record_of)
    assert train.run(replace(distil, teacher_steps=1)) == 130
    assert len(log_of(distil)["steps"]) == 2 and log_of(distil)["interrupted"] is True


def test_the_teacher_is_given_right_answers():
    torch.manual_seed(0)
    model, tokenizer = start(None, 1.0)
    problems = [Problem((3, 1, 4, 1)), Problem((9, 0, 0, 2))]
    rollout = right_answers(tokenizer, problems)
    answers = [tokenizer.decode(row) for row in rollout.labels]
    assert answers == ["1 1 3 4 <eos>", "0 0 2 9 <eos>"]
    sampled = train.sample(model, tokenizer, problems)
    assert torch.equal(rollout.sequences[:, :6], sampled.sequences[:, :6])
    assert torch.equal(rollout.attention_mask, torch.ones(2, 11).long())
    head = train.LMHead.from_model(model)
    logprobs = linear_logprobs(states(model, rollout), head, rollout.labels).logprobs
    batch = batch_of(rollout, 1.0)
    loss = train.linear_policy_loss(states(model, rollout), head, batch, gpg()).loss
    torch.testing.assert_close(loss, -logprobs.mean())


def test_the_rate_of_a_distillation_by_hand():
    config = DistillConfig(learning_rate=1e-2, warmup_steps=10)
    assert [rate(step, config) for step in (1, 5, 10, 99)] == [1e-3, 5e-3, 1e-2, 1e-2]


def test_the_task_of_the_command(monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(train, "run", lambda config: configs.append(config) or 0)
    assert cli.main(["demo", "--task", "distill"]) == 0
    assert (
        cli.main(["demo", "--task", "distill", "--steps", "7", "--seed", "3", "--out", "there"])
        == 0
    )
    assert cli.main(["demo", "--task", "grpo"]) == 0
    assert configs == [DistillConfig(), DistillConfig(7, 3, "there"), DemoConfig()]
    assert cli.main(["demo", "--task", "distill", "--kl-grad", "k1"]) == 2
    assert "--kl-grad is of another task than distill" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_student_learns_what_its_teacher_knows(config, seed):
    out = DistillConfig(seed=seed, out=config.out)
    assert train.run(out) == 0
    summary = log_of(out)["summary"]
    assert summary["first_mean_reward"] < 0.1 and summary["last_mean_reward"] > 0.9
    assert log_of(out)["steps"][-1]["divergence"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mean_reward_at_least_triples(config, seed):
    out = DemoConfig(seed=seed, out=config.out)
    assert train.run(out) == 0
    summary = log_of(out)["summary"]
    assert summary["last_mean_reward"] >= 3 * summary["first_mean_reward"]
    assert summary["last_mean_reward"] >= 0.8
