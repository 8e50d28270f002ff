"""bench/gpu.py without a GPU: on the Triton kernels, interpreted. The whole script is slow."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import decisions
import pytest
import torch
from gpu_peers import SUM
from gpu_session import PARTS
from interpreter import child

from fused_rl.bench.tasks import KINDS
from fused_rl.bench.two_heads import TWO_HEAD_KINDS

BENCH = Path(__file__).parents[1] / "bench"


def script(*options: str) -> subprocess.CompletedProcess:
    return child(str(BENCH / "gpu.py"), *options, HF_HUB_OFFLINE="1")


def result(folder: Path, *options: str) -> tuple[dict, str]:
    """What a run of the script writes and prints."""
    pytest.importorskip("triton", reason="triton is not installed")
    path = folder / "gpu.json"
    done = script(*options, "--out", str(path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> dict:
    """The small cases alone: every kernel runs, and nothing is timed."""
    content, _ = result(tmp_path_factory.mktemp("core"), "--sanitize")
    return content


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict, str]:
    """The whole script."""
    return result(tmp_path_factory.mktemp("gpu"), "--small")


@pytest.fixture(params=["core", pytest.param("small", marks=pytest.mark.slow)])
def run(request, core) -> dict:
    """What a run found."""
    return core if request.param == "core" else request.getfixturevalue("small")[0]


def assert_small_cases_are_right(content: dict) -> None:
    assert {r["verdict"] for r in content["small cases"]} == {"right"}
    assert {r["dtype"] for r in content["small cases"]} == {"float32", "float16", "bfloat16"}
    assert content["correctness"].keys() == {"float32", "float16", "bfloat16"}
    assert content["wrong"] == {}


def test_the_kernels_that_ran_are_tritons(run):
    expected = "Triton" if torch.cuda.is_available() else "Triton, interpreted"
    assert run["kernels"] == expected
    names = {name.split("._")[0] for name in run["launches"]}
    assert {"divergences", "kl", "linear_logprobs", "logprobs"} <= names
    assert min(run["launches"].values()) > 0
    assert run["never launched"] == []


def test_the_small_cases_are_right_and_nothing_else_ran(core):
    assert_small_cases_are_right(core)
    assert not core["records"] and not core["forwards"]


@pytest.mark.slow
def test_every_case_is_there_and_ours_are_right(small):
    content, out = small
    assert content["failed"] == {} and content["left out"] == []
    kinds = (*KINDS, SUM, *TWO_HEAD_KINDS)
    assert {r["case"] for r in content["records"]} == {kind.title for kind in kinds}
    assert content["parts"] == list(PARTS)
    for kind in KINDS:
        here = {r["provider"]: r for r in content["records"] if r["case"] == kind.title}
        ours = {name: r for name, r in here.items() if name.startswith("fused_rl")}
        proven = {name for name in ours if not name.endswith(decisions.UNPROVEN)}
        assert len(proven) == (1 if kind == KINDS[0] else 2) and len(ours) == 2 * len(proven)
        assert {r["verdict"] for r in ours.values()} == {"right"}
        assert here["eager torch"]["verdict"] == "right"
        assert all(r["seconds_median"] > 0 for r in here.values() if r["verdict"] == "right")
        assert kind.title in out
    errors = {r["provider"]: r.get("logprob_error") for r in content["records"]}
    assert errors["fused_rl"] < 1e-5
    assert_small_cases_are_right(content)


@pytest.mark.slow
def test_every_way_of_the_forward_is_right(small):
    content, _ = small
    ways = [r for r in content["forwards"] if r["way"] != "bare products"]
    assert not [r for r in ways if "failed" in r]
    for name in ("pointers", "TMA", "L2 tiles", "stores"):
        assert {r["tokens"] for r in ways if name in r["way"]} == {8, 16}
    assert max(r["logprob_error"] for r in ways) < 1e-5
    assert max(r["entropy_error"] for r in ways) < 1e-5


@pytest.mark.slow
def test_chunks_rows_products_and_the_graph(small):
    content, _ = small
    tried = (*content["chunks"], *content["row kernels"], *content["products"])
    assert not [r for r in tried if "failed" in r]
    assert all(r["TFLOP_per_s"] > 0 for r in content["products"])
    one_pass = [r for r in content["chunks"] if r["way"].startswith("one pass")]
    assert {r["frozen"] for r in one_pass} == {True, False}
    assert max(r["difference"] for r in content["chunks"]) < 1e-2
    assert all(r["GB_per_s"] > 0 for r in content["row kernels"])
    (graph,) = content["graph"]
    assert graph["within_an_ulp"] and graph["captured"] == torch.cuda.is_available()


@pytest.mark.slow
def test_peers_that_are_missing_are_named(small):
    content, out = small
    for name in ("cut-cross-entropy", "QuACK", "Liger native", "verl", "TRL selective"):
        assert any(reason.startswith(name) for reason in content["missing"])
        assert name in out


@pytest.mark.slow
def test_every_time_has_the_hosts_beside_it(small):
    content, out = small
    timed = [r for r in content["records"] if "seconds_median" in r]
    assert all(r["host_ms"] > 0 for r in timed)
    kinds = ("forwards", "products", "row kernels", "chunks")
    assert all(r["host_ms"] > 0 for name in kinds for r in content[name])
    assert "host" in out


@pytest.mark.slow
def test_the_writer_takes_what_the_script_wrote(small, tmp_path):
    pytest.importorskip("matplotlib")
    import gpu_readme

    (tmp_path / "small.json").write_text(json.dumps(small[0]))
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    options = ["--page", str(page), "--front", str(page)]
    assert gpu_readme.main([str(tmp_path / "small.json"), *options]) == 0
    assert (tmp_path / "small.svg").exists() and "small's head" in page.read_text()


def test_some_parts_alone(tmp_path):
    """And what they need nobody else for: no kernel is missed then."""
    content, _ = result(tmp_path, "--small", "--parts", "graph,ceilings")
    assert list(content["seconds"]) == ["ceilings", "small: graph"]
    assert content["graph"] and content["ceilings"] and not content["records"]
    assert content["never launched"] == [] and content["wrong"] == {}
    done = script("--small", "--parts", "ceiling")
    assert done.returncode == 2 and "there are correctness, ceilings" in done.stderr
    assert all(f"  {name} " in script("--help").stdout for name in PARTS)


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_left_out_and_named(tmp_path):
    content, out = result(tmp_path, "--small", "--budget", "0")
    pieces = 2 * len(KINDS) + len(TWO_HEAD_KINDS) + 8
    assert content["records"] == [] and len(content["left out"]) == pieces
    assert_small_cases_are_right(content)
    assert "small: forwards" in out


@pytest.fixture
def errors(monkeypatch) -> ModuleType:
    import errors

    return errors


def test_correctness_goes_on_after_what_is_wrong(errors, monkeypatch):
    """A case over its budget, one that raises, NaN: each is named, and the others are measured."""
    found, wrong = errors.correctness(torch.device("cpu"))
    assert wrong == {} and [len(of) for of in found.values()] == [4, 6, 8]
    own = errors.head_errors

    def broken(dtypes, device, N, H, V):
        if torch.float16 in dtypes:
            raise RuntimeError("no kernel image")
        nan = float("nan")
        return own(dtypes, device, N, H, V) if N > 100 else [1e-6, 1e-6, nan, 0.0, 0.0]

    monkeypatch.setattr(errors, "head_errors", broken)
    found, wrong = errors.correctness(torch.device("cpu"))
    few, many = errors.CHECKED
    assert set(wrong) == {
        f"float16, {few}",
        f"float16, {few}, unproven",
        f"float16, {many}",
        f"float16, {many}, unproven",
        f"float32, {few}",
        f"bfloat16, {few}",
        f"bfloat16, {few}, unproven",
    }
    assert "no kernel image" in wrong[f"float16, {few}"]
    assert list(found["float16"]) == ["two heads", "logits"] and len(found["float32"]) == 4


@pytest.mark.parametrize("part", ["wrong", "failed", "never launched"])
def test_the_script_fails_at_its_end(run, part, monkeypatch):
    import gpu

    assert not gpu.failed(run)
    assert gpu.failed({**run, part: {"float32, logits": "errors [nan]"}})
    graphs = run["graph"] or [{"way": "a graph", "within_an_ulp": True}]
    assert not gpu.failed({**run, "graph": graphs})
    assert gpu.failed({**run, "graph": [{**r, "within_an_ulp": False} for r in graphs]})
    of_products = {"way": "a", "logprob_error_of_products": 1e-4}
    assert not gpu.failed({**run, "forwards": [{**of_products, "logprob_error": 1.1e-4}]})
    for error in (1.2e-4, math.nan):
        assert gpu.failed({**run, "forwards": [{**of_products, "logprob_error": error}]})


def test_a_peers_failure_is_none_of_ours(run):
    import gpu

    peer = {"provider": "a peer", "verdict": "wrong", "shape": "a", "case": "b"}
    with_faults = {**run, "records": [*run["records"], peer], "peers failed": {"a": "b"}}
    assert not gpu.failed(with_faults)
    assert gpu.failed({**run, "records": [{**peer, "provider": "fused_rl"}]})


def test_a_plain_checkout_has_the_kernels(tmp_path):
    """No build, no installation: the package beside its kernels, and whatever else there is."""
    root = BENCH.parent
    for name in ("fused_rl", "kernels"):
        (tmp_path / name).symlink_to(root / name, target_is_directory=True)
    code = (
        "import sys, importlib.util as u, fused_rl, fused_rl.kernels; "
        "assert 'triton' not in sys.modules; print(fused_rl.__file__, "
        "u.find_spec('fused_rl.kernels.kl').origin, u.find_spec('fused_rl.tests'))"
    )
    # Without the site module an editable installation is not seen; the packages are.
    plain = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command, quiet = [sys.executable, "-S", "-c", code], {"capture_output": True, "text": True}
    done = subprocess.run(command, **quiet, check=True, env=plain, cwd=tmp_path)
    package, kernel, other = done.stdout.split()
    assert package.startswith(str(tmp_path)) and kernel.startswith(str(tmp_path))
    assert other == "None"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_large_shapes_want_a_gpu():
    for options in (("--out", "/nowhere"), ("--warm",)):
        done = script(*options)
        assert done.returncode != 0 and "no CUDA device" in done.stderr


def test_the_interpreter_comes_before_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    with pytest.raises(RuntimeError, match="before TRITON_INTERPRET"):
        import interpreted

        interpreted.start()


def test_launches_by_hand():
    hooks = {}
    kernels = {
        name: SimpleNamespace(add_pre_run_hook=lambda hook, name=name: hooks.update({name: hook}))
        for name in ("_a_kernel", "_b_kernel")
    }
    fake = SimpleNamespace(__name__="package.rows", no_kernel=3, helper=lambda: None, **kernels)
    from interpreted import Launches

    launches = Launches(fake)
    assert launches.idle() == ["rows._a_kernel", "rows._b_kernel"]
    hooks["_b_kernel"](1, 2, BLOCK=3)
    assert launches.count == {"rows._a_kernel": 0, "rows._b_kernel": 1}
    assert launches.idle() == ["rows._a_kernel"]
