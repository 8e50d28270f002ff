"""The house: imports only go down, every public name says what it is, importing is harmless."""

import ast
import inspect
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest
import torch

import fused_rl

ROOT = Path(__file__).parents[1]
FLOORS = {
    "reference": 0,
    "checks": 0,
    "log_ratios": 1,
    "derivatives": 0,
    "recipes": 0,
    "children": 0,
    "outputs": 0,
    "signals": 0,
    "watched": 0,
    "kernels": 0,
    "checkout": 0,
    "chunked": 1,
    "models": 1,
    "asked": 2,
    "ops": 2,
    "ops_cuda": 3,
    "head": 3,
    "sequences": 3,
    "kept_ops": 3,
    "filter_ops": 3,
    "kl": 3,
    "logprobs": 4,
    "layers": 5,
    "kept": 5,
    "schedules": 3,
    "overoptimisation": 3,
    "diagnosis": 4,
    "rewards": 4,
    "batch": 5,
    "surrogates": 5,
    "advantages": 5,
    "means": 6,
    "penalties": 6,
    "mismatch": 6,
    "ratios": 6,
    "trust_regions": 6,
    "policy": 7,
    "named": 8,
    "losses": 9,
    "backends": 4,
    "__init__": 10,
    "bench_clock": 10,
    "bench_records": 8,
    "bench_figures": 9,
    "bench_packages": 9,
    "bench_peers": 10,
    "bench_report": 10,
    "bench": 11,
    "bench_ops": 12,
    "bench_run": 12,
    "plan_config": 10,
    "plan": 11,
    "hub": 11,
    "demo": 11,
    "demo_task": 11,
    "demo_rollout": 11,
    "demo_report": 11,
    "cli_numbers": 12,
    "cli": 13,
}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fused_rl":
            found |= {a.name if a.name in FLOORS else "__init__" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fused_rl."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for name in (a.name for a in node.names if a.name.split(".")[0] == "fused_rl"):
                found.add(name.split(".")[1] if "." in name else "__init__")
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "fused_rl").glob("*.py")), ids=lambda p: p.stem)
def test_imports_only_go_down(path):
    assert path.stem in FLOORS, f"give {path.name} a floor"
    for name in imported_modules(path):
        same_room = path.stem.startswith("demo") and name.startswith("demo")
        assert FLOORS[name] < FLOORS[path.stem] or same_room, f"{path.stem} imports {name}"


def test_child_processes_begin_in_one_place():
    """children.py keeps the code of the current folder out of them."""
    for path in (ROOT / "fused_rl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "executable") or (
                path.stem == "children"
            ), path


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imported_modules(path), path.name


def test_kernels_is_no_package():
    """A ./kernels/__init__.py would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", fused_rl.__all__)
def test_public_names_are_documented(name):
    thing = getattr(fused_rl, name)
    documentation = inspect.getdoc(thing)
    assert documentation and len(documentation.split()) >= 5
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        keyword_only = [
            p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        assert len(keyword_only) <= 6
        assert signature.return_annotation is not inspect.Signature.empty
    elif inspect.isclass(thing) and not issubclass(thing, (Enum, tuple)):
        assert thing.__doc__


def run(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light_and_leaves_floating_point_alone():
    out = run(
        "import sys, torch\n"
        "before = (torch.tensor(1e-40) * 1).item()\n"
        "import fused_rl\n"
        "heavy = {'triton', 'transformers', 'rich', 'matplotlib', 'liger_kernel'}\n"
        "print(sorted(heavy & set(sys.modules)), before == (torch.tensor(1e-40) * 1).item() != 0)\n"
    )
    assert out.split("\n")[0] == "[] True"


def test_transformers_runs_with_the_repository_as_working_directory():
    """The folder ./kernels is on sys.path then, under a name that transformers looks for."""
    out = run(
        "import torch, transformers\n"
        "c = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=16,"
        " num_hidden_layers=1, num_attention_heads=2)\n"
        "m = transformers.AutoModelForCausalLM.from_config(c)\n"
        "print(m(torch.zeros(1, 3).long()).logits.shape)\n",
        cwd=ROOT,
    )
    assert "torch.Size([1, 3, 31])" in out


def test_no_top_level_kernels_is_installed():
    out = run(
        "import importlib.metadata as m\n"
        "files = m.files('fused-rl') or []\n"
        "print([str(f) for f in files if str(f).startswith('kernels')])\n",
        cwd=ROOT / "tests",
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_logprobs_backward", "kl"])
def test_operators_have_kernels_for_cpu_and_cuda(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_rl::{name}", key)


def test_this_installation_has_the_native_kernels():
    """`make` builds them; a suite that passed through the reference would prove nothing."""
    assert fused_rl.backends()[0].kernel == "C++", fused_rl.backends()[0].note
