"""The house: imports only go down, every public name says what it is, importing is harmless."""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from by_name import public

import fused_rl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_rl"
MOST_FLOORS = 10
MOST_ROOMS = 21
# What the cheap half may hear of. kl works on vectors [N], by the number of its estimator.
CHEAP = {"losses", "rollouts"}
OPEN_TO_THE_CHEAP_HALF = {"reference", "checks", "stats", "derivatives", "kl"} | CHEAP


def name_of(path: Path) -> str:
    """losses/batch for fused_rl/losses/batch.py; a folder's __init__ is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts}
FOLDERS = sorted({name.split("/")[0] for name in FILES if "/" in name})


def imported_files(path: Path) -> set[str]:
    """Files of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fused_rl":
            folder = node.module.split(".")[1:]
            found |= {file_of([*folder, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {file_of(parts[1:]) for parts in names if parts[0] == "fused_rl"}
    return found


def file_of(parts: list[str]) -> str:
    """The file that holds what is imported by that path."""
    if parts[:1] == ["kernels"]:
        return "kernels"
    while parts and "/".join(parts) not in FILES:
        parts = parts[:-1]
    return "/".join(parts) or "__init__"


def room_of(name: str) -> str:
    return name.split("/")[0]


def rooms() -> dict[str, set[str]]:
    """Each room, a file or a folder of the package, and the rooms that it imports."""
    graph = {"kernels": set()}
    for name, path in FILES.items():
        graph.setdefault(room_of(name), set()).update(map(room_of, imported_files(path)))
    return {room: below - {room} for room, below in graph.items()}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """0 for what imports nothing, else one above the highest import; CycleError at a circle."""
    heights: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        heights[name] = 1 + max((heights[below] for below in graph.get(name, ())), default=-1)
    return heights


def test_imports_only_go_down():
    """Rooms stand on floors, and there are few of either: a newcomer can know them all."""
    heights = floors(rooms())
    assert len(heights) <= MOST_ROOMS, sorted(heights)
    assert 1 + max(heights.values()) <= MOST_FLOORS, sorted(heights.items(), key=lambda i: i[1])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_of_a_folder_import_each_other_without_circles(folder):
    inside = {name: imported_files(FILES[name]) for name in FILES if room_of(name) == folder}
    floors({name: {b for b in below if b in inside} - {name} for name, below in inside.items()})


@pytest.mark.parametrize("name", sorted(name for name in FILES if room_of(name) in CHEAP))
def test_the_cheap_half_hears_nothing_of_the_vocabulary(name):
    below = imported_files(FILES[name])
    assert not {b for b in below if room_of(b) not in OPEN_TO_THE_CHEAP_HALF}


def test_the_expensive_half_hears_nothing_of_a_loss():
    for name in (n for n in FILES if room_of(n) in ("ops", "linear", "kl")):
        assert not {b for b in imported_files(FILES[name]) if room_of(b) in CHEAP}, name


def test_three_files_with_one_prefix_are_a_folder():
    for folder in {path.parent for path in FILES.values()}:
        stems = [p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")]
        prefixes = Counter(stem.split("_")[0] for stem in stems)
        assert max(prefixes.values()) < 3, f"{folder}: {prefixes.most_common(1)}"


def test_folders_say_what_is_in_them():
    for path in PACKAGE.rglob("__init__.py"):
        documentation = ast.get_docstring(ast.parse(path.read_text()))
        assert documentation and len(documentation.split()) >= 5, path


def test_the_operators_stand_on_the_ground():
    """They hear of reference.py's formulas, of derivatives, and of nothing above."""
    for name in (n for n in FILES if room_of(n) == "ops"):
        below = {room_of(b) for b in imported_files(FILES[name])}
        assert below <= {"ops", "reference", "derivatives", "kernels"}, name


def test_child_processes_begin_in_one_place():
    """children.py keeps the code of the current folder out of them."""
    for path in (ROOT / "fused_rl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Attribute) and node.attr == "executable") or (
                path.stem == "children"
            ), path


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imported_files(path), path.name


def test_kernels_is_no_package():
    """A ./kernels/__init__.py would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_public_names_can_be_learned():
    """About 40 at the top, none beside another that differs only in case, the rest by modules."""
    assert len(fused_rl.__all__) <= 48
    names = [*fused_rl.__all__, *(m.__name__.rpartition(".")[2] for m in fused_rl.MODULES)]
    for space in (names, *(m.__all__ for m in fused_rl.MODULES)):
        assert len({name.lower() for name in space}) == len(space), space


@pytest.mark.parametrize("module", fused_rl.MODULES, ids=lambda m: m.__name__)
def test_public_modules_are_imported_by_the_path_that_users_write(module):
    name = module.__name__.rpartition(".")[2]
    assert getattr(fused_rl, name) is module is importlib.import_module(f"fused_rl.{name}")


@pytest.mark.parametrize("level", fused_rl.Level)
def test_each_level_has_the_ratio_of_its_name(level):
    batch = fused_rl.TokenBatch.padded(
        torch.zeros(2, 3).long(), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.ones(2)
    )
    d = torch.tensor([0.1, 0.3, 9.0, 0.1, 0.2, 0.6])
    ratio = getattr(fused_rl.ratios, f"{level.name.title()}Ratio")()
    assert ratio(d, batch).tolist() == batch.at_level(d, level).tolist()


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name):
    thing = public()[name]
    documentation = inspect.getdoc(thing)
    assert documentation and len(documentation.split()) >= 5
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        keyword_only = [
            p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        assert len(keyword_only) <= 6
        assert signature.return_annotation is not inspect.Signature.empty
    elif inspect.isclass(thing):
        # Of its own, not an ancestor's; and not the signature that a dataclass or a named tuple
        # without a docstring is given for one.
        own = vars(thing).get("__doc__")
        assert own and own != "An enumeration." and not own.startswith(f"{name}(")


def run(code: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    files = [str(file) for file in importlib.metadata.files("fused-rl")]
    assert files and not [file for file in files if file.startswith("kernels")]


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_logprobs_backward", "kl"])
def test_operators_have_kernels_for_cpu_and_cuda(name):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_rl::{name}", key)


def test_this_installation_has_the_native_kernels():
    """`make` builds them; a suite that passed through the reference would prove nothing."""
    assert fused_rl.backends()[0].kernel == "C++", fused_rl.backends()[0].note
