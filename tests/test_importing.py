"""What an import leaves behind: one fresh process that imports everything, one step after another.

A step is judged by what it adds: an import by the modules that came with it, a call by the settings
that are other than before.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What takes seconds to import, or starts threads, or patches others.
HEAVY = {
    *("triton", "transformers", "tokenizers", "trl", "verl", "liger_kernel", "kernels"),
    *("rich", "matplotlib"),
}
MODULES = (
    "fused_rl.cli",
    "fused_rl.integrations.liger",
    "fused_rl.integrations.transformers",
    "fused_rl.integrations.trl",
    "fused_rl.integrations.verl",
)
# The smallest number comes from outside: in the code a compiler might fold it.
CHILD = """
import importlib, json, os, sys, warnings

warnings.simplefilter("error", UserWarning)
import torch

def settings():
    number, tiny = float(sys.argv[1]), torch.full((100_000,), 1e-40)
    tinier = torch.full((100_000,), number, dtype=torch.float64)
    return {
        "float": number * 1.0 == 1e-310 and number / 2 > 0.0,
        "float32": bool((tiny * 1 != 0).all() and (tiny / 2 != 0).all()),
        "float64": bool((tinier * 1 != 0).all()),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

found = {"settings": {"before": settings()}, "modules": {}}

def step(name, run):
    before = set(sys.modules)
    result = run()
    found["modules"][name] = sorted(set(sys.modules) - before)
    found["settings"][name] = settings()
    return result

fused_rl = step("fused_rl", lambda: importlib.import_module("fused_rl"))
step("backends", fused_rl.backends)
hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (80, 700))
labels = torch.zeros(80, dtype=torch.int64)
step("call", lambda: fused_rl.linear_logprobs(hidden, weight, labels).logprobs.sum().backward())
for name in sys.argv[2:]:
    step(name, lambda: importlib.import_module(name))
step("doctor", lambda: sys.modules["fused_rl.cli"].main(["doctor"]))
trl = sys.modules["fused_rl.integrations.trl"]
step("what is not there", lambda: found.update(nothing=hasattr(trl, "nothing")))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    command = [sys.executable, "-c", CHILD, "1e-310", *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", ["fused_rl", "backends", *MODULES, "doctor"])
def test_importing_is_light(found, step):
    assert not HEAVY & {name.partition(".")[0] for name in found["modules"][step]}


@pytest.mark.parametrize("step", ["fused_rl", "fused_rl.cli", "doctor"])
def test_a_command_pays_for_itself_alone(found, step):
    """Not for the benchmark, nor for the demo."""
    others = ("fused_rl.bench", "fused_rl.demo")
    assert not [name for name in found["modules"][step] if name.startswith(others)]


def test_the_command_line_does_not_import_the_demo(found):
    assert "fused_rl.demo.train" not in found["modules"]["fused_rl.cli"]


def test_asking_trls_door_for_what_it_has_not_imports_no_trl(found):
    assert found["nothing"] is False
    assert found["modules"]["what is not there"] == []


@pytest.mark.parametrize("step", ["fused_rl", "call", *MODULES])
def test_floating_point_and_settings_stay_as_they_were(found, step):
    before, after = found["settings"]["before"], found["settings"][step]
    assert after == before
    assert after["float"] and after["float32"] and after["float64"]
    assert after["default dtype"] == "torch.float32" and not after["deterministic"]
