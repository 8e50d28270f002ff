"""Child processes run no code from the folder that one happens to stand in."""

import json
import subprocess

import pytest

from fused_rl import cli
from fused_rl.bench.load import competing
from fused_rl.demo import comparison
from fused_rl.integrations import hub
from fused_rl.system import children

# Modules that a child needs, or that what it needs imports.
INNOCENT = ("torch", "random", "json", "threading", "fused_rl", "sitecustomize")


@pytest.fixture(params=[True, False], ids=["-P", "neutral folder"])
def evil(tmp_path, monkeypatch, request):
    """A current folder whose modules leave a mark; under both ways to keep out of it."""
    if request.param and not children.HAS_SAFE_PATH:
        pytest.skip("python -P came with 3.11")
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in INNOCENT:
        code = f"open({str(folder / 'mark')!r}, 'a').write({name!r})\nraise SystemExit(3)\n"
        (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(children, "HAS_SAFE_PATH", request.param)
    return folder


def test_a_child_finds_the_real_modules(evil):
    code = "import sys, json, random; print(json.dumps([sys.argv[1], random.__file__]))"
    done = subprocess.run(
        **children.python("-c", code, "x"), capture_output=True, text=True, check=True
    )
    argument, origin = json.loads(done.stdout)
    assert argument == "x" and str(evil) not in origin
    assert not (evil / "mark").exists()


def test_competitors_of_the_benchmark_do_not_run_the_current_folder(evil):
    with competing(1) as (process,):
        assert process.poll() is None
    assert not (evil / "mark").exists()


def test_the_export_does_not_run_the_current_folder(evil, tmp_path):
    assert cli.main(["export-hub", str(tmp_path / "export")]) == 0
    assert (tmp_path / "export" / "build" / hub.cpu_variant() / hub.LIBRARY).exists()
    assert not (evil / "mark").exists()


@pytest.mark.parametrize("evil", [children.HAS_SAFE_PATH], indirect=True, ids=["here"])
def test_the_measurement_of_the_demo_is_right_and_does_not_run_the_current_folder(evil):
    measured = comparison.compare_loss_steps(16, 8, 1000)
    assert set(measured["ways"]) == set(comparison.WAYS)
    fused, plain = (measured["ways"][way] for way in ("fused_rl", "plain torch"))
    assert measured["vocabulary"] == 1000
    assert fused["loss"] == pytest.approx(plain["loss"], abs=0.02)
    assert fused["seconds"] > 0 and plain["seconds"] > 0
    assert not (evil / "mark").exists()
