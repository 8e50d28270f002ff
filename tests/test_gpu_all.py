"""`make gpu` where there is no GPU: that it says so, and how its steps go on after each other."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_all
import pytest
import torch

ROOT = Path(__file__).parents[1]
# What a `make test ARGS=...` above would hand down to a make of ours.
FROM_ABOVE = ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
ALONE = {name: value for name, value in os.environ.items() if name not in FROM_ABOVE}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def python(name: str, code: str, seconds: float = 60) -> gpu_all.Step:
    return gpu_all.Step(name, [sys.executable, "-c", code], seconds)


@without_gpu
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "out"
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={out}"]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ALONE}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode != 0 and "no GPU: " in done.stderr
    assert not out.exists()


def test_options_reach_the_script():
    """WHEELS and SANITIZE of make; 0 is no."""
    command = ["make", "-n", "gpu", "WHEELS=some", "OUT=there", "ARGS=--parts cases"]
    for given, expected in (("1", True), ("0", False)):
        run = [*command, f"SANITIZE={given}"]
        options = {"capture_output": True, "text": True, "cwd": ROOT, "env": ALONE}
        said = subprocess.run(run, check=True, **options).stdout
        assert "--out there --wheels some" in said and "--parts cases" in said
        assert ("--sanitize" in said) == expected


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """main() with steps of one's own, and no sanitizer but what a test puts in its place."""

    def run(tests, bench, *options, sanitizer="not-here", probe="print('right')"):
        monkeypatch.setattr(gpu_all, "no_gpu", lambda: None)
        monkeypatch.setattr(gpu_all, "SANITIZER", sanitizer)
        monkeypatch.setattr(gpu_all, "probe", lambda: python("gluon", probe))
        monkeypatch.setattr(gpu_all, "warm", lambda gluon: python("warm", "print(3)"))
        monkeypatch.setattr(gpu_all, "tests", lambda gluon: tests)
        monkeypatch.setattr(gpu_all, "bench", lambda args, left, gluon: bench)
        monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--out", str(tmp_path / "out"), *options])
        return gpu_all.main(), (tmp_path / "out" / "steps.txt").read_text()

    return run


def test_all_is_well(steps, tmp_path, capsys):
    code = "import os, sys; print(os.getcwd()); import fused_rl; print(fused_rl.__file__)"
    status, said = steps(python("tests", "print('passed')"), python("bench", code))
    assert status == 0 and "FAILED" not in said and said.count("ok") == 4
    log = (tmp_path / "out" / "bench.txt").read_text().splitlines()
    assert log == [str(ROOT), str(ROOT / "fused_rl" / "__init__.py")]
    assert "passed" in capsys.readouterr().out


def test_a_step_that_fails_stops_no_other(steps, capsys):
    fails = python("tests", "print('this is why'); raise SystemExit(3)")
    bench = python("bench", "print(1)")
    status, said = steps(fails, bench, "--sanitize", sanitizer="false")
    assert status == 1
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert lines["tests"].endswith("FAILED: exit status 3") and lines["bench"].endswith("ok")
    assert all(lines[name].endswith("status 1") for name in ("memcheck", "racecheck"))
    assert "this is why" in capsys.readouterr().out


def test_what_is_not_here_or_a_peers_is_no_fault_of_ours(steps, tmp_path):
    """A wheel that is none, and a sanitizer that is not installed: both are named."""
    (tmp_path / "bad-1-py3-none-any.whl").write_text("no wheel")
    well = python("tests", "print(1)"), python("bench", "print(1)")
    status, said = steps(*well, "--sanitize", "--wheels", str(tmp_path))
    assert status == 0 and "not-here is not installed" in said and "memcheck" not in said
    assert [line.split()[0] for line in said.splitlines() if "FAILED" in line] == ["peers-bad"]


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path):
    begins = "import subprocess, sys; "
    child = "[sys.executable, '-c', 'import time; time.sleep(3); open(\\'late\\', \\'w\\')']"
    code = f"{begins}import os; os.chdir({str(tmp_path)!r}); subprocess.run({child})"
    runner = gpu_all.Runner(tmp_path, str(tmp_path))
    outcome = runner.run(python("slow", code, seconds=1))
    assert outcome.fault == "not done after 1 s" and outcome.seconds < 3
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_signal_ends_the_steps_with_it(tmp_path):
    """SIGTERM to a run whose step would take a minute."""
    code = (
        "import sys; sys.path.insert(0, 'bench'); import gpu_all; "
        "sleeps = gpu_all.Step('s', [sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(60)'], 60); "
        "gpu_all.no_gpu = lambda: None; gpu_all.warm = gpu_all.tests = lambda gluon: sleeps; "
        "gpu_all.probe = lambda: gpu_all.Step('p', [sys.executable, '-c', '1'], 9); "
        f"sys.argv = ['gpu_all.py', '--out', {str(tmp_path)!r}]; sys.exit(gpu_all.main())"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "s.txt"
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    child = int(log.read_text().split()[0])
    run.terminate()
    assert run.wait(20) == 128 + signal.SIGTERM
    until(lambda: not Path(f"/proc/{child}").exists())


def until(said) -> None:
    """Waits for it, some seconds at most."""
    end = time.monotonic() + 20
    while not said():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_wheel_is_a_step(tmp_path):
    for name in ("b-1-py3-none-any.whl", "a_c-2-py3-none-any.whl", "notes.txt"):
        (tmp_path / name).write_text("no wheel")
    found = gpu_all.wheels(tmp_path, "there")
    assert [step.name for step in found] == ["peers-a_c", "peers-b"]
    assert {"--no-index", "--no-deps", "there"} <= set(found[0].command)
    assert gpu_all.wheels(None, "there") == []


def test_the_tests_are_those_for_gpus():
    command = gpu_all.tests(True).command
    files = {Path(part).name for part in command if part.endswith(".py")}
    assert (
        {"test_gpu.py", "test_gpu_inputs.py", "test_hub.py"}
        <= files
        < {path.name for path in (ROOT / "tests").glob("test_*.py")}
    )
    assert command[command.index("-m", 3) + 1] == "gpu"


def test_the_benchmark_has_what_is_left_of_the_time(monkeypatch):
    options = ["gpu_all.py", "--parts", "cases", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", options)
    args = gpu_all.options()
    for left, budget in ((200, 200 - gpu_all.MARGIN), (0, gpu_all.LEAST)):
        step = gpu_all.bench(args, left, True)
        command = " ".join(step.command)
        assert f"--budget {budget} " in command and command.endswith("--parts cases --commit abc")
        assert step.seconds > budget
    assert args.seconds == 300


@pytest.mark.parametrize("probe", ["raise SystemExit(1)", "import time; time.sleep(60)"])
def test_a_kernel_that_fails_or_does_not_end_is_left_out(probe, monkeypatch, tmp_path):
    """Its own tests, too; and the exit status tells."""
    seen = []

    def noted(name):
        own = getattr(gpu_all, name)

        def step(*args):
            seen.append(" ".join(own(*args).command))
            return python(name, "print(1)")

        monkeypatch.setattr(gpu_all, name, step)

    for name in ("warm", "tests", "bench"):
        noted(name)
    monkeypatch.setattr(gpu_all, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_all, "probe", lambda: python("gluon", probe, 2))
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--out", str(tmp_path)])
    assert gpu_all.main() == 1
    warm, tests, bench = seen if "--warm" in seen[0] else (seen[1], seen[0], seen[2])
    assert "--without-gluon" in warm and "--without-gluon" in bench
    assert "-p without_gluon" in tests and "hopper" not in tests
    assert "-p without_gluon" not in " ".join(gpu_all.tests(True).command)


def test_without_it_no_configuration_takes_that_kernel():
    code = (
        "from fused_rl.kernels import configs as c; before = c.configs(9)[:]; "
        "import without_gluon; after = c.configs(9); "
        "print(any(k.gluon for k in before), any(k.gluon for k in after), "
        "[k for k in before if not k.gluon] == after)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "False", "True"]


@without_gpu
def test_the_probe_has_nothing_to_say_without_a_gpu():
    command = [sys.executable, str(ROOT / "bench" / "gpu_probe.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "no GPU, or triton, that has it\n"
