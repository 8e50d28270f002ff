"""A command in several processes, which end together."""

import os
import signal
import threading
import time

import pytest

from fused_rl.system import processes, signals

# One write each: print makes several, and those of two processes may mix.
JOINS = (
    "import os, torch.distributed as dist; dist.init_process_group('gloo');"
    "os.write(1, f'{dist.get_rank()} {dist.get_world_size()}\\n'.encode());"
    "dist.destroy_process_group()"
)


def run(code: str) -> tuple[int, float]:
    """The status of two processes that run this code, and the seconds that it took."""
    began = time.monotonic()
    return processes.run(2, "-c", code), time.monotonic() - began


def test_both_ran():
    status, seconds = run("import os; assert os.environ['WORLD_SIZE'] == '2'")
    assert status == 0 and seconds < 30


def test_they_find_each_other(capfd):
    assert run(JOINS)[0] == 0
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "0 2", "1 2"]


@pytest.mark.parametrize(
    ("end", "status"), [("raise SystemExit(3)", 3), ("os.kill(os.getpid(), 9)", 137)]
)
def test_one_that_fails_ends_the_other(monkeypatch, end, status):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    code = f"import os, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(100)"
    found, seconds = run(code)
    assert found == status and seconds < 60


@pytest.mark.parametrize("heard", [True, False])
def test_a_signal_is_handed_on_and_waited_for(monkeypatch, tmp_path, heard):
    """Until they have saved what they have, or for some time."""
    monkeypatch.setattr(processes, "PATIENCE", 30.0 if heard else 0.5)
    there = tmp_path.as_posix()
    handler = "saved" if heard else "signal.SIG_IGN"
    code = (
        "import os, signal, sys, time\n"
        "def saved(*_): open(path + '.saved', 'w'); sys.exit(143)\n"
        f"path = {there!r} + '/' + os.environ['RANK']\n"
        f"signal.signal(signal.SIGTERM, {handler})\n"
        "open(path, 'w')\n"
        "time.sleep(100)"
    )

    def when_ready() -> None:
        while len(os.listdir(there)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=when_ready, daemon=True).start()
    with signals.stoppable():
        status, seconds = run(code)
    assert status == 143 and seconds < 60
    saved = ["0", "0.saved", "1", "1.saved"] if heard else ["0", "1"]
    assert sorted(os.listdir(there)) == saved
