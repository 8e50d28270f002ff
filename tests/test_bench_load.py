"""Competing processes: they spin while something is measured, and none is left after it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import run as make_bench

from fused_rl import cli
from fused_rl.bench import load, rounds, tasks
from fused_rl.bench.load import competing
from fused_rl.bench.run import BenchConfig
from fused_rl.system import children, signals

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

SMALL = ["--tokens", "16", "--hidden", "8", "--vocabulary", "64", "--rounds", "1"]
NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="nobody says what a process does"
)
DEADLINE = 120  # seconds, of a machine that is busy


def state_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; of none if it is gone, or only its name is
    there still.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] == "Z" else fields


def wait_for(condition) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def started(monkeypatch):
    """All that were started, while the test runs."""
    found, start = [], load._start
    monkeypatch.setattr(load, "_start", lambda: found.append(start()) or found[-1])
    return found


def test_so_many_run_within_and_none_after(started):
    with competing(2) as processes:
        assert processes == started and len(processes) == 2
        assert [p.poll() for p in processes] == [None, None]
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2
    with competing(0) as processes:
        assert processes == []


@NEEDS_PROC
def test_each_keeps_a_core_busy():
    tick = os.sysconf("SC_CLK_TCK")
    with competing(2) as processes:
        # utime is the 14th field, the 12th from the state on.
        wait_for(lambda: all(int(state_of(p.pid)[11]) > tick // 2 for p in processes))


def test_none_is_left_after_an_error(started):
    with pytest.raises(ZeroDivisionError), competing(2):
        _ = 1 / 0
    assert len(started) == 2 and all(p.returncode is not None for p in started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_none_is_left_after_a_signal(number, started):
    with signals.stoppable(), pytest.raises(KeyboardInterrupt), competing(2):
        os.kill(os.getpid(), number)
    assert len(started) == 2 and all(p.returncode is not None for p in started)


def test_less_load_than_was_said_is_an_error(started, monkeypatch):
    with pytest.raises(RuntimeError, match="ended before"), competing(2) as processes:
        processes[1].kill()
        processes[1].wait()
    monkeypatch.setattr(load, "_COMPETITOR", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="did not begin"), competing(1):
        pytest.fail("it ran")
    assert len(started) == 3 and all(p.returncode is not None for p in started)


KILLED = """
import time
from fused_rl.bench.load import competing
with competing(2) as processes:
    print(*(p.pid for p in processes), flush=True)
    time.sleep(1000)
"""


@NEEDS_PROC
def test_none_outlives_whoever_started_it():
    """Not even after a signal that nobody can handle."""
    command = children.python("-c", KILLED)
    with subprocess.Popen(**command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(state_of(pid) for pid in pids)
        parent.kill()
    wait_for(lambda: not any(state_of(pid) for pid in pids))


def test_a_run_beside_none_and_one(tmp_path, capsys, started):
    options = [*SMALL, "--peers", "none", "--load", "0", "1", "--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["shape"]["load"] == [0, 1]
    titles = [kind.title for kind in tasks.KINDS]
    by_load = {k: [r for r in content["records"] if r["load"] == k] for k in (0, 1)}
    for k, end in ((0, ""), (1, ", beside 1 busy process")):
        assert list(dict.fromkeys(r["case"] for r in by_load[k])) == [t + end for t in titles]
    assert len(by_load[0]) == len(by_load[1])
    printed = capsys.readouterr().out
    assert printed.count(", beside 1 busy process") == len(titles)
    # One for each kind, each at an end.
    assert len(started) == len(titles) and all(p.returncode is not None for p in started)
    lines = make_bench.table(content, "x.json")
    assert f"**{titles[0]}, beside 1 busy process** (2 NHV)" in "\n".join(lines)
    assert '`make bench ARGS="--load 0 1"`' in lines[0]
    assert cli.main(["bench", "compare", *[str(tmp_path / "bench.json")] * 2]) == 0


def test_titles():
    assert rounds.beside("c", 0) == "c"
    assert rounds.beside("c", 2) == "c, beside 2 busy processes"


def test_curves_are_beside_the_first_load(tmp_path):
    options = [*SMALL, "--peers", "none", "--load", "0", "1", "--sweep", "--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert {r["load"] for r in records if "axis" in r} == {0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_none(number, tmp_path, monkeypatch, started):
    def stopped(*_):
        assert len(started) == 2 and all(p.poll() is None for p in started)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(rounds, "interleaved", stopped)
    options = [*SMALL, "--peers", "none", "--load", "2", "--out", str(tmp_path)]
    assert cli.main(["bench", *options]) == 128 + number
    assert len(started) == 2 and all(p.returncode is not None for p in started)


@pytest.mark.parametrize(
    ("loads", "complaint"),
    [
        (["-1"], "load must be from 0 to 256 processes, got -1"),
        (["0", "257"], "load must be from 0 to 256 processes, got 257"),
        (["2", "2"], "load must have each number of processes once, got 2, 2"),
    ],
)
def test_mistakes(loads, complaint, capsys):
    assert cli.main(["bench", "--load", *loads]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["two", "1.5", "", None])
def test_what_is_no_number(text, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--load", *([] if text is None else [text])])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "--load" in error
    assert text is None or f"invalid int value: {text!r}" in error


def test_pages_are_of_a_machine_that_is_idle(capsys):
    assert make_bench.main([*SMALL, "--load", "2", "0"]) == 2
    assert "pages begin with load 0, got 2" in capsys.readouterr().err


def test_the_option_is_none_by_default():
    assert BenchConfig().load == (0,)
    options = cli.bench_options(cli.build_parser().parse_args(["bench", "--load", "0", "4"]))
    assert options["load"] == (0, 4)
