"""`make gpu`: the tests for GPUs, then bench/gpu.py, on a machine with a GPU and nothing prepared.

    python3 bench/gpu_all.py --out out/gpu --wheels FOLDER --sanitize

Needs a python3 with torch and triton; no build, no network, no virtual environment. The steps, each
with its output in STEP.txt beside the results:

    peers      the wheels of a folder, into a temporary one, each by itself
    gluon      gpu_probe.py, beside them; where it fails or does not end, nothing takes that kernel
    warm       bench/gpu.py --warm, beside the tests: what it compiles is there for the next
    tests      those marked gpu; in several processes where pytest-xdist is installed
    bench      bench/gpu.py, in what is left of --seconds
    memcheck, racecheck    compute-sanitizer on its small cases, with --sanitize, if it is here

A step that fails, or takes too long, keeps none from running: they are named at the end, and the
exit status is 1 then, unless only wheels of peers failed. Without a GPU it says so at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "bench" / "gpu.py")
SANITIZER = "compute-sanitizer"
PEER = "peers-"  # begins the name of a step that installs one
MOST_PROCESSES = 6
TEST_SECONDS = 120
PROBE_SECONDS = 60
SANITIZER_SECONDS = 180
# Of --seconds, what the benchmark keeps for its start and for what it cannot stop in.
MARGIN = 25
LEAST = 40
SHOWN = 40  # last lines of a step's output


@dataclass(frozen=True)
class Step:
    """A command with its name, and the seconds after which it is ended."""

    name: str
    command: list[str]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """fault: why a step failed, or None."""

    name: str
    seconds: float
    fault: str | None

    def __str__(self) -> str:
        said = "ok" if self.fault is None else f"FAILED: {self.fault}"
        return f"{self.name:14}{self.seconds:6.0f} s  {said}"


def main() -> int:
    args = options()
    if why := no_gpu():
        print(f"no GPU: {why}", file=sys.stderr)
        return 1
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as peers:
        runner = Runner(args.out, peers)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, runner.stop)
        outcomes = runner.together([probe(), *wheels(args.wheels, peers)])
        gluon = outcomes[0].fault is None
        outcomes += runner.together([warm(gluon), tests(gluon)])
        left = args.seconds - (time.monotonic() - began)
        outcomes += runner.one_by_one([bench(args, left, gluon), *sanitizers(args, gluon)])
    said = "\n".join(map(str, outcomes))
    if args.sanitize and not shutil.which(SANITIZER):
        said += f"\nleft out: {SANITIZER} is not installed"
    (args.out / "steps.txt").write_text(said + "\n")
    print(f"\n{said}\nlogs and results: {args.out}")
    return int(any(o.fault for o in outcomes if not o.name.startswith(PEER)))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=absolute, default="out/gpu")
    parser.add_argument("--wheels", type=absolute, help="a folder with the peers' wheels")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer at the end")
    parser.add_argument("--seconds", type=float, default=300, help="all but the sanitizer")
    for name in ("parts", "commit", "rounds"):
        parser.add_argument(f"--{name}", help="of bench/gpu.py")
    return parser.parse_args()


def absolute(text: str) -> Path:
    """The steps run in another folder than this one, perhaps."""
    return Path(text).resolve()


def no_gpu() -> str | None:
    """Why nothing can be run here, or None."""
    if missing := [name for name in ("torch", "triton") if find_spec(name) is None]:
        return f"{sys.executable} has no {' and no '.join(missing)}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def wheels(folder: Path | None, to: str) -> list[Step]:
    """One for each wheel, so that one that does not fit costs no other."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--upgrade", "--target", to]
    found = sorted(folder.glob("*.whl")) if folder else []
    return [Step(f"{PEER}{w.name.split('-')[0]}", [*pip, str(w)], 60) for w in found]


def probe() -> Step:
    return Step("gluon", [sys.executable, str(ROOT / "bench" / "gpu_probe.py")], PROBE_SECONDS)


def script(gluon: bool) -> list[str]:
    """bench/gpu.py, with the kernels that are known to end."""
    return [sys.executable, SCRIPT, *([] if gluon else ["--without-gluon"])]


def warm(gluon: bool) -> Step:
    return Step("warm", [*script(gluon), "--warm"], TEST_SECONDS)


def tests(gluon: bool) -> Step:
    """Files without such a test are not read: what they import may not be here."""
    files = [
        str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()
    ]
    if not gluon:
        files = [f for f in files if "hopper" not in f]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if not gluon:
        command += ["-p", "without_gluon"]
    if find_spec("xdist"):
        command += ["-n", str(min(MOST_PROCESSES, os.cpu_count()))]
    return Step("tests", [*command, *files], TEST_SECONDS)


def bench(args: argparse.Namespace, left: float, gluon: bool) -> Step:
    budget = max(LEAST, left - MARGIN)
    command = [*script(gluon), "--out", str(args.out / "gpu.json")]
    command += ["--budget", f"{budget:.0f}", "--rounds", args.rounds or "5"]
    for name in ("parts", "commit"):
        if value := getattr(args, name):
            command += [f"--{name}", value]
    return Step("bench", command, budget + 2 * MARGIN)


def sanitizers(args: argparse.Namespace, gluon: bool) -> list[Step]:
    tool = shutil.which(SANITIZER)
    if not args.sanitize or not tool:
        return []
    steps = []
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", *script(gluon)]
        command += ["--sanitize", "--out", str(args.out / f"{name}.json")]
        steps.append(Step(name, command, SANITIZER_SECONDS))
    return steps


class Runner:
    """Runs steps in the project's root, with the package from the checkout and the peers beside."""

    def __init__(self, out: Path, peers: str) -> None:
        self.out = out
        self.running: list[subprocess.Popen] = []
        before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), peers, *before])
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.environment["HF_HUB_OFFLINE"] = "1"

    def stop(self, number: int, _) -> None:
        """On Ctrl-C and SIGTERM: the steps have sessions of their own, and would go on."""
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(128 + number)

    def one_by_one(self, steps: list[Step]) -> list[Outcome]:
        return [self.run(step) for step in steps]

    def together(self, steps: list[Step]) -> list[Outcome]:
        with ThreadPoolExecutor(len(steps)) as pool:
            return list(pool.map(self.run, steps))

    def run(self, step: Step) -> Outcome:
        """Prints the end of what it said."""
        began = time.monotonic()
        log = self.out / f"{step.name}.txt"
        with log.open("w") as file:
            fault = self.ended(step, file)
        last = log.read_text(errors="replace").splitlines()[-SHOWN:]
        outcome = Outcome(step.name, time.monotonic() - began, fault)
        print("\n".join([f"--- {step.name}", *last, str(outcome)]), flush=True)
        return outcome

    def ended(self, step: Step, file) -> str | None:
        """Why it failed, or None. All processes of a step that takes too long are ended."""
        try:
            process = subprocess.Popen(
                step.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        self.running.append(process)
        try:
            status = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"not done after {step.seconds:.0f} s"
        return f"exit status {status}" if status else None


if __name__ == "__main__":
    sys.exit(main())
