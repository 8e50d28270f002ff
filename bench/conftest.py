"""Each op and whole GRPO steps through pytest-benchmark: `make bench-pytest`, or `pytest bench`.

A file names its TASKS (name -> maker of a fused_rl.bench.tasks.Task), SHAPES, the QUICK one,
PROVIDERS and the PEERS that they are found in. Here a provider is judged first, and fails if it is
wrong; then it is timed. extra_info has the median ratio to interleaved bare work (products of the
same shape; for ops without one, a copy), the peak of extra memory, the error and the versions.
"""

import pytest
import torch

from fused_rl.bench.clock import Clock, interleaved, peak_extra_bytes
from fused_rl.bench.peers import Missing
from fused_rl.bench.records import PRODUCTS
from fused_rl.bench.tasks import Task, environment, judged, times

ROUNDS, QUICK_ROUNDS = 7, 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one tiny shape: does everything run?")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")


def pytest_collect_file(file_path, parent):
    """bench_*.py, which pytest looks into only where they are named."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    """One task at a time, so that its exact results are formed once for all providers."""
    module = metafunc.module
    shapes = [module.QUICK] if metafunc.config.getoption("quick") else module.SHAPES
    pairs = [(name, shape) for name in module.TASKS for shape in shapes]
    ids = ["-".join([name, *map(str, shape)]) for name, shape in pairs]
    metafunc.parametrize("task", pairs, indirect=True, scope="module", ids=ids)
    metafunc.parametrize("provider", module.PROVIDERS)


@pytest.fixture(scope="module")
def device(request):
    return request.config.getoption("device")


@pytest.fixture(scope="module")
def task(request, device):
    name, shape = request.param
    return request.module.TASKS[name](*shape, device)


@pytest.fixture
def call(request, task, provider, device):
    """The provider's call; skips where there is none."""
    if (ours := task.ways(())).get(provider):
        return ours[provider]
    peer = request.module.PEERS[provider]
    try:
        peer.check(device)
        found = task.ways((provider,))
    except Missing as missing:
        pytest.skip(str(missing))
    if peer.title not in found:
        pytest.skip(f"{peer.title} has no gradient")
    return found[peer.title]


@pytest.fixture
def gate_and_time(request, benchmark, task, provider, call, device):
    """A function that judges and times the provider."""
    rounds = QUICK_ROUNDS if request.config.getoption("quick") else ROUNDS

    def run():
        verdict = judged(task, call)
        if verdict["verdict"] != "right":
            pytest.fail(f"{provider} is {verdict.pop('verdict')}: {verdict}")
        benchmark.group = request.node.callspec.id.removesuffix(f"-{provider}")
        benchmark.extra_info.update(extra_info(task, call, rounds), error=verdict[task.error])
        benchmark.extra_info["environment"] = environment(device)
        benchmark.pedantic(lambda: finished(call, device), rounds=rounds, warmup_rounds=1)

    return run


def extra_info(task: Task, call, rounds: int) -> dict:
    """The shape, the ratio and its spread, and memory."""
    seconds = interleaved({PRODUCTS: task.bare[PRODUCTS], "call": call}, rounds, Clock(task.device))
    found = times(seconds["call"], seconds[PRODUCTS])
    ratios = {name: value for name, value in found.items() if name.startswith("ratio")}
    return {**task.fields, **ratios, "peak_extra_bytes": peak_extra_bytes(call, task.device)}


def finished(call, device: str) -> None:
    call()
    if device == "cuda":
        torch.cuda.synchronize()
