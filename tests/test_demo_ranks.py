"""The demo on several processes: one training, which ends as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fused_rl import cli
from fused_rl.demo import ranks as of_demo
from fused_rl.demo.ranks import UnusableProcesses
from fused_rl.system import processes


def test_an_update_of_all_ranks_is_that_of_one_process(ranks):
    """With weights in shards and uneven shares of the answers."""
    for sharded, gap, moved in ranks(2).run("cases_demo", "update_of_all"):
        assert sharded and moved > 0.05 and gap < 1e-6


def test_a_run_of_two_ranks(ranks, tmp_path):
    first, second = ranks(2).run("cases_demo", "run", out=str(tmp_path))
    assert first["status"] == second["status"] == 0
    log = first["log"]
    assert [record["step"] for record in log["steps"]] == [1, 2, 3]
    assert log["versions"]["processes"] == 2 and log["loss_step"] is None
    assert log["interrupted"] is False
    # 16 answers of 1 to 5 tokens, on both ranks together.
    assert all(16 < record["tokens"] <= 80 for record in log["steps"])
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "log.json"]


def test_a_seed_repeats_a_run_of_two_ranks(ranks, tmp_path):
    runs = []
    for seed in (1, 1, 2):
        found = ranks(2).run("cases_demo", "run", out=str(tmp_path), steps=2, seed=seed)[0]
        steps = found["log"]["steps"]
        runs.append([(r["reward"], r["loss"], r["entropy"], r["tokens"]) for r in steps])
    assert runs[0] == runs[1] != runs[2]


def test_a_model_of_the_users_on_two_ranks(ranks, saved, tmp_path):
    options = {"out": str(tmp_path), "model": str(saved), "steps": 2}
    first, second = ranks(2).run("cases_demo", "run", **options)
    assert first["status"] == second["status"] == 0 and len(first["log"]["steps"]) == 2


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks, tmp_path):
    first, second = ranks(2).run("cases_demo", "run", out=str(tmp_path), stopped=2)
    assert first["status"] == second["status"] == 143
    assert first["steps"] == second["steps"] == [1, 2]
    assert len(first["log"]["steps"]) == 2 and first["log"]["interrupted"] is True


def test_prompts_that_cannot_be_shared_are_an_error_of_every_rank(ranks, tmp_path):
    for said in ranks(2).run("cases_demo", "uneven", out=str(tmp_path)):
        assert "3 prompts of a step cannot be shared among 2 processes" in said


def test_parts_by_hand(monkeypatch):
    monkeypatch.setattr(of_demo, "world", lambda: 3)
    monkeypatch.setattr(of_demo, "rank", lambda: 1)
    assert of_demo.part(list(range(6))) == [2, 3]
    with pytest.raises(UnusableProcesses, match="divisor of 16"):
        of_demo.can_share(16, 3)


def test_what_the_command_starts(monkeypatch, capsys, tmp_path):
    started = []
    monkeypatch.setattr(processes, "run", lambda *arguments: started.append(arguments) or 7)
    monkeypatch.chdir(tmp_path)
    options = ["--processes", "2", "--steps", "3", "--kl-grad", "k2", "--out", "here"]
    assert cli.main(["demo", *options]) == 7
    (arguments,) = started
    assert arguments[:3] == (2, "-m", "fused_rl.demo")
    assert set(arguments[3:]) == {"--steps=3", "--kl-grad=k2", f"--out={tmp_path / 'here'}"}
    assert cli.main(["demo", "--processes", "3"]) == 2
    assert "cannot be shared among 3 processes" in capsys.readouterr().err
    assert cli.main(["demo", "--task", "distill", "--processes", "2"]) == 2
    assert "the task distill runs in one process" in capsys.readouterr().err
    assert len(started) == 1


def test_one_process_is_the_usual_run(monkeypatch):
    configs = []
    monkeypatch.setattr("fused_rl.demo.train.run", lambda config: configs.append(config) or 0)
    assert cli.main(["demo", "--processes", "1", "--steps", "5"]) == 0
    assert [config.steps for config in configs] == [5]


# As users start it.


def demo(*options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    arguments = launcher or ("-m", "fused_rl.demo", "--processes", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(out: Path) -> list[dict]:
    return json.loads((out / "log.json").read_text())["steps"]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TORCHRUN += ("-m", "fused_rl.demo")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["processes", "torchrun"])
def test_both_launchers_give_the_same_run(tmp_path, launcher):
    """Rank 0 alone prints and writes."""
    process = demo("--steps", "3", "--out", str(tmp_path), launcher=launcher)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("Mean reward") == said.count("Wrote ") == 1
    steps = steps_of(tmp_path)
    assert len(steps) == 3 and sorted(os.listdir(tmp_path)) == ["curves.png", "log.json"]


def until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children_of(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from Linux")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_processes_end_together(tmp_path, number):
    """Ctrl-C and SIGTERM to the command; a rank that is killed."""
    process = demo("--steps", "100000", "--out", str(tmp_path))
    until(lambda: len(children_of(process)) == 2)
    ranks = children_of(process)
    # Every rank is at work once the second has connected and time has passed.
    time.sleep(25)
    assert all(map(is_there, ranks))
    if number == signal.SIGKILL:
        os.kill(ranks[1], number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, 137), said
    assert not any(map(is_there, ranks))
    steps = steps_of(tmp_path)
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1)) and steps
    assert json.loads((tmp_path / "log.json").read_text())["interrupted"] is True


@pytest.mark.slow
def test_two_processes_reach_the_reward_of_one(tmp_path):
    process = demo("--out", str(tmp_path))
    said, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, said
    summary = json.loads((tmp_path / "log.json").read_text())["summary"]
    assert summary["last_mean_reward"] >= 3 * summary["first_mean_reward"]
    assert summary["last_mean_reward"] >= 0.8
