"""The export for Hugging Face's kernels: loaded by `kernels` itself, in processes of their own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import oracle
import pytest
import torch

import fused_rl
from fused_rl import cli
from fused_rl.integrations import hub, layers
from fused_rl.reference import acc_dtype

resolve_variants = pytest.importorskip("kernels.variants").resolve_variants

# fused_rl is not to be found; as on a machine where it is not installed.
WITHOUT_FUSED_RL = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fused_rl":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""

# What a variant makes of the case that the parent saved.
SCORE = """
import torch
from pathlib import Path
from kernels import get_kernel, get_local_kernel

def score(kernel, case, device):
    hidden, weight, bias, labels, temperature, up = case
    leaves = [t.to(device).requires_grad_() for t in (hidden, weight, bias)]
    head = kernel.LMHead(leaves[1], leaves[2], 0.7, 3.0)
    labels, temperature = labels.to(device), temperature.to(device)
    stats = kernel.linear_logprobs(leaves[0], head, labels, temperature=temperature)
    grads = torch.autograd.grad(tuple(stats), leaves, [g.to(device) for g in up])
    batch = kernel.TokenBatch.padded(
        labels[None], (labels != -100)[None], -torch.ones(1, device=device),
        ref_logprobs=torch.full(labels[None].shape, -4.0, device=device),
    )
    output = kernel.linear_policy_loss(leaves[0][None], head, batch, kernel.grpo(beta=0.1))
    dloss = torch.autograd.grad(output.loss, leaves)
    return [t.detach().cpu() for t in (*stats, *grads, output.loss, *dloss)]
"""

ALONE = (
    WITHOUT_FUSED_RL
    + SCORE
    + """
path, device, *cases = Path(sys.argv[1]), *sys.argv[2:]
# A torch for CPUs alone chooses by itself; one for a GPU is told when it is to be the CPU.
backend = device if torch.version.cuda or torch.version.hip else None
loaded = {"chosen": get_local_kernel(path, backend=backend)}
assert get_local_kernel(path, backend=backend) is loaded["chosen"]
loaded["plain"] = get_local_kernel(path / "build" / "torch-cpu")
for case in cases:
    found = {
        name: (tuple(k.backends()[0]), score(k, torch.load(case), device))
        for name, k in loaded.items()
    }
    torch.save(found, "of " + case)
# As from the Hub, with the folder in the place of the download.
kernel = get_kernel("someone/fused-rl", version=1)
print(kernel.__version__, kernel.layers.LinearLogProbs.__name__)
assert not [name for name in sys.modules if name.split(".")[0] == "fused_rl"]
assert not hasattr(torch.ops.fused_rl, "linear_logprobs")
"""
)


def child(code: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """What a process without a network prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def save_case(file: Path, dtype: torch.dtype) -> tuple[oracle.Case, tuple]:
    """A case and gradients of its results, as SCORE reads them."""
    torch.manual_seed(0)
    case = oracle.random_case(37, 33, 300, dtype, ignored=3, **oracle.EVERYTHING)
    case = oracle.replace(case, scale=0.7, softcap=3.0)
    up = tuple(g.to(acc_dtype(case.hidden)) for g in oracle.random_upstream(37))
    tensors = (case.hidden, case.weight, case.bias, case.labels, case.temperature)
    torch.save((*tensors, up), file)
    return case, up


def alone(exported: Path, folder: Path, device: str, *cases: str) -> str:
    """What ALONE prints."""
    named = f"someone/fused-rl={exported}"
    return child(ALONE, exported, device, *cases, cwd=folder, LOCAL_KERNELS=named)


@pytest.fixture(scope="module")
def scored(exported, tmp_path_factory) -> tuple[dict, str]:
    """dtype -> case, upstream, what the variants make of it without fused_rl; what is printed."""
    folder, dtypes = tmp_path_factory.mktemp("scores"), (torch.float32, torch.bfloat16)
    saved = {dtype: save_case(folder / f"{dtype}.pt", dtype) for dtype in dtypes}
    printed = alone(exported, folder, "cpu", *(f"{dtype}.pt" for dtype in dtypes))
    return {d: (*saved[d], torch.load(folder / f"of {d}.pt")) for d in dtypes}, printed


def score_here(case: oracle.Case, up: tuple) -> list[torch.Tensor]:
    """SCORE through the installed package."""
    scope = {}
    exec(SCORE, scope)
    tensors = (case.hidden, case.weight, case.bias, case.labels, case.temperature)
    return scope["score"](fused_rl, ([t.detach() for t in tensors] + [up]), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fused_rl_it_scores_as_fused_rl_does(scored, dtype):
    case, up, out = scored[0][dtype]
    eager, exact = oracle.eager(case, *up), oracle.exact(case, *up)
    for _, got in out.values():
        oracle.assert_result_no_worse(oracle.Result(*got[:5]), eager, exact, roundings=2)
    backend, got = out["chosen"]
    assert backend == tuple(fused_rl.backends()[0]) and backend[1] == "C++"
    for mine, installed in zip(got, score_here(case, up), strict=True):
        oracle.assert_same_bits(mine, installed)
    backend, plain = out["plain"]
    assert backend[1] == "reference (plain torch)"
    assert oracle.relative_error(plain[5], got[5]) < 1e-6
    for mine, other in zip(plain[6:], got[6:], strict=True):
        assert oracle.relative_error(mine, other) < {torch.float32: 1e-5}.get(dtype, 2**-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_triton_variant_is_chosen(exported, tmp_path):
    case, up = save_case(tmp_path / "case.pt", torch.float32)
    alone(exported, tmp_path, "cuda", "case.pt")
    _, got = torch.load(tmp_path / "of case.pt")["chosen"]
    for mine, exact in zip(got[:5], oracle.exact(case, *up), strict=True):
        assert oracle.relative_error(mine, exact) < 1e-5


def test_the_triton_kernels_run_from_the_export(exported, tmp_path):
    """In the interpreter: their sources are found, and no module reaches for fused_rl."""
    code = (
        WITHOUT_FUSED_RL
        + """
import importlib, torch
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path(sys.argv[1]) / "build" / "torch-cuda")
ops, on_cuda, triton = (
    importlib.import_module(f"{kernel.__name__}.{name}")
    for name in ("ops", "ops.triton", "kernels.linear_logprobs")
)
device = triton.Device(multiprocessors=2, major=0, interpreted=True)
logits, labels = torch.randn(6, 70), torch.tensor([0, 69, -100, 3, 4, 5])
temperature = torch.full((6,), 0.7)
rows = ops.Rows(logits, labels, temperature, -100)
logprobs, entropy, lse = on_cuda.logits_logprobs(rows, device)
stats = kernel.logprobs_from_logits(logits, labels, temperature=0.7)
torch.testing.assert_close((logprobs, entropy), tuple(stats))
hidden, weight = torch.randn(6, 16), torch.randn(70, 16)
head = ops.Head(hidden, weight, None, labels, temperature, 1.0, 0.0)
got = on_cuda.linear_logprobs(head, ops.Limits(-100, 2**20), device)
stats = kernel.linear_logprobs(hidden, weight, labels, temperature=0.7)
torch.testing.assert_close(got[:2], tuple(stats), atol=1e-4, rtol=1e-4)
print(next(b.kernel for b in kernel.backends() if b.device == "cuda"))
"""
    )
    cache = str(tmp_path / "cache")
    out = child(code, exported, cwd=tmp_path, TRITON_INTERPRET="1", TRITON_CACHE_DIR=cache)
    assert out == "Triton\n"


def test_beside_fused_rl_in_either_order_and_twice(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    code = """
import importlib, sys, torch
from pathlib import Path
from kernels import get_local_kernel

backend = "cpu" if torch.version.cuda or torch.version.hip else None
load = [
    lambda: importlib.import_module("fused_rl"),
    lambda: get_local_kernel(Path(sys.argv[1]), backend=backend),
    lambda: get_local_kernel(Path("copy"), backend=backend),
]
modules = [load[int(i)]() for i in sys.argv[2]]
h, w, y = torch.randn(5, 8), torch.randn(30, 8), torch.randint(30, (5,))
h.requires_grad_()
results = []
for module in modules:
    assert module.backends()[0].kernel == "C++"
    stats = module.linear_logprobs(h, w, y)
    results.append((*stats, *torch.autograd.grad(stats.logprobs.sum(), h)))
for result in results:
    for a, b in zip(result, results[0]):
        assert torch.equal(a, b)
"""
    for order in ("012", "210"):
        assert child(code, exported, order, cwd=tmp_path) == ""


def snippets(exported: Path) -> str:
    """The Python of the model card."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S))


def test_the_model_card_and_the_layer(exported):
    checks = """
leaves = (hidden, head.weight, head.bias)
stack = (hidden, labels, 0.8)
ours = head(*stack)
assert type(ours).__name__ == "TokenStats", "kernelize left the forward as it was"
theirs = Head.forward(head, *stack)
torch.testing.assert_close(tuple(ours), theirs, atol=2e-6, rtol=2e-6)
up = torch.randn(2, *labels.shape)
torch.testing.assert_close(
    *(torch.autograd.grad(tuple(stats), leaves, tuple(up)) for stats in (ours, theirs)),
    atol=2e-5, rtol=2e-5,
)
compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(*stack)
torch.testing.assert_close(tuple(compiled), tuple(ours), atol=0, rtol=0)
torch.autograd.grad(tuple(compiled), leaves, tuple(up))
assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
"""
    child(WITHOUT_FUSED_RL + snippets(exported) + checks, cwd=exported)


def test_by_the_name_of_a_repository(scored):
    assert scored[1] == f"{fused_rl.__version__} LinearLogProbs\n"


def test_kernels_takes_every_folder_for_a_variant(exported):
    from kernels.variants import get_variants_local

    folders = {path.name for path in (exported / "build").iterdir()}
    found = get_variants_local(exported / "build")
    assert {variant.variant_str for variant in found} == folders
    assert folders == {"torch-cuda", "torch-rocm", "torch-cpu", hub.cpu_variant()}
    resolved, _ = resolve_variants(found, backend="cpu")
    assert [v.variant_str for v in resolved] == [hub.cpu_variant(), "torch-cpu"]


def test_nothing_but_what_a_user_calls_is_in_it(exported):
    folder = exported / "build" / "torch-cpu"
    left_out = {"cli", "demo", "bench", "plan", "system", "trl", "hub"}
    assert not left_out & {path.stem for path in folder.iterdir()}
    layers = {path.stem for path in (folder / "integrations").glob("*.py")}
    assert layers == {"__init__", "layers"}
    assert not list(folder.rglob("*.so")) and not list(folder.rglob("*.pyc"))
    assert (exported / "LICENSE").read_text() == (
        Path(hub.__file__).parents[2] / "LICENSE"
    ).read_text()


def test_the_same_installation_gives_the_same_bytes(exported, tmp_path):
    hub.export(tmp_path)
    paths = [p.relative_to(exported) for p in exported.rglob("*") if "__pycache__" not in p.parts]
    for path in paths:
        if (exported / path).is_file():
            assert (exported / path).read_bytes() == (tmp_path / path).read_bytes(), path
    namespaces = [hub.namespace_of(v, hub.package_sources()) for v in hub.variants()]
    assert len(set(namespaces)) == 4
    other = {**hub.package_sources(), "kl.py": "changed = True\n"}
    assert hub.namespace_of(hub.variants()[0], other) not in namespaces


def test_without_the_library_there_is_no_cpu_variant_for_one_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "files", lambda package: tmp_path)
    assert [v.name for v in hub.variants()] == ["torch-cuda", "torch-rocm", "torch-cpu"]


def test_imports_and_operators_are_rewritten_and_nothing_else():
    source = (
        '"""Use: from fused_rl import kl; fused_rl::kl."""\n'
        "from fused_rl import checks, ops\n"
        "from fused_rl.linear.head import (\n    LMHead,\n)\n"
        "def f():\n"
        "    'é'; from fused_rl.kernels import kl as kernel\n"
        '    """\n    from fused_rl import this_is_text\n    """\n'
        'op = custom_op("fused_rl::kl", mutates_args=())\n'
        'x = torch.ops.fused_rl.kl(files("fused_rl"), "fused_rl: text")\n'
    )
    assert hub.rewritten(source, "frlabcde") == (
        '"""Use: from fused_rl import kl; fused_rl::kl."""\n'
        "from . import checks, ops\n"
        "from .linear.head import (\n    LMHead,\n)\n"
        "def f():\n"
        "    'é'; from .kernels import kl as kernel\n"
        '    """\n    from fused_rl import this_is_text\n    """\n'
        'op = custom_op("frlabcde::kl", mutates_args=())\n'
        'x = torch.ops.frlabcde.kl(files(__package__), "fused_rl: text")\n'
    )


def test_a_module_in_a_folder_climbs_out_of_it():
    source = "from fused_rl import kl\nfrom fused_rl.ops.kl import kl\nfiles('fused_rl')\n"
    source = source.replace("'", '"')
    assert hub.rewritten(source, "frlabcde", depth=1) == (
        'from .. import kl\nfrom ..ops.kl import kl\nfiles(__package__.rsplit(".", 1)[0])\n'
    )
    assert hub.imported(ast.parse(source)) == {"kl", "ops/kl", "ops/kl/kl"}


def test_a_library_whose_namespace_is_not_found_is_refused():
    library = (hub.files("fused_rl") / hub.LIBRARY).read_bytes()
    elsewhere = library.replace(b"fused_rl", b"fused_zz")
    with pytest.raises(ValueError, match="did not change from fused_rl to frlabcde"):
        hub.renamed(elsewhere, "frlabcde")


def test_a_library_that_does_not_load_is_refused_and_nothing_written(tmp_path, monkeypatch):
    here = [hub.Variant("torch-cpu", "cpu"), hub.Variant(hub.cpu_variant(), "cpu", b"no library")]
    monkeypatch.setattr(hub, "variants", lambda: here)
    with pytest.raises(ValueError, match="the C\\+\\+ library does not load"):
        hub.export(tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        assert cli.main(["export-hub", str(taken)]) == 2
        assert capsys.readouterr().err == (
            f"fused-rl export-hub: DIR must be new or empty, and {taken} is not\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_behind(tmp_path, monkeypatch, there, failure):
    folder = tmp_path / "parent" / "export"
    if there == "an empty folder":
        folder.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    plain = [hub.Variant(f"torch-{name}", name) for name in ("cuda", "rocm")]
    monkeypatch.setattr(hub, "variants", lambda: plain)
    written = []

    def write_bytes(path, data, original=Path.write_bytes):
        written.append(path)
        if "torch-rocm" in path.parts:
            raise failure
        return original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(type(failure)):
            hub.export(folder)
    assert len(written) > 10 and sorted(tmp_path.rglob("*")) == before
    assert hub.export(folder)


def test_the_layer_beside_a_plain_formula():
    """The layer itself, on a module that merely has a weight and a bias."""
    case = oracle.random_case(11, 9, 40, bias=True, temperature=True, ignored=2)
    module = types.SimpleNamespace(weight=case.weight, bias=case.bias)
    stats = layers.LinearLogProbs.forward(module, case.hidden, case.labels, case.temperature)
    up = oracle.random_upstream(11)
    eager, exact = oracle.eager(case, *up), oracle.exact(case, *up)
    for mine, theirs, right in zip(stats, eager, exact, strict=False):
        oracle.assert_no_worse(mine, theirs, right)
