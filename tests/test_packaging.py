"""Wheels: with and without a compiler, and what they put where."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory) -> Path:
    """A wheel of the repository, built where no compiler is to be found, unpacked."""
    out = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "CXX": "/nonexistent/c++"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "-C", f"build-dir={out / 'build'}", "-w", str(out)]
    done = subprocess.run(
        [*command, str(ROOT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_the_wheel_installs_one_top_level_package(wheel_without_compiler):
    names = {p.name for p in wheel_without_compiler.iterdir() if p.suffix != ".dist-info"}
    assert names == {"fused_rl"}
    assert (wheel_without_compiler / "fused_rl" / "kernels").is_dir()
    assert (wheel_without_compiler / "fused_rl" / "py.typed").is_file()
    # What hub.export writes as the model card.
    assert list((wheel_without_compiler / "fused_rl").rglob("hub.md"))


def test_without_a_compiler_it_works_through_the_reference_and_says_so(wheel_without_compiler):
    code = (
        "import torch, fused_rl\n"
        "print(fused_rl.__file__)\n"
        "h = torch.randn(5, 4, requires_grad=True); w = torch.randn(9, 4, requires_grad=True)\n"
        "y = torch.tensor([0, 3, 8, -100, 2])\n"
        "s = fused_rl.linear_logprobs(h, w, y)\n"
        "e = torch.log_softmax(h @ w.T, -1)[torch.arange(5), y.clamp(min=0)] * (y >= 0)\n"
        "torch.testing.assert_close(s.logprobs, e)\n"
        "grad = torch.autograd.grad\n"
        "a, b = grad(s.logprobs.sum(), (h, w)), grad(e.sum(), (h, w))\n"
        "torch.testing.assert_close(a, b)\n"
        "print(fused_rl.backends()[0])\n"
    )
    # The unpacked wheel, not the editable installation that the tests run on.
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]\n"
        f"sys.path.insert(0, {str(wheel_without_compiler)!r})\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr
    assert str(wheel_without_compiler) in done.stdout
    assert "reference (plain torch)" in done.stdout
    assert "was not built with this installation" in done.stdout


def test_versions_agree():
    import fused_rl

    assert f'version = "{fused_rl.__version__}"' in (ROOT / "pyproject.toml").read_text()
