"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
TARGETS = [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]
# A few bytes of stack are the compiler's own bookkeeping.
SPILLS = 16


def child(command: list[str], cache: Path, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**inherited, "TRITON_CACHE_DIR": str(cache), **environment},
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_in_the_interpreter(tmp_path):
    command = ["-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    command += ["-q", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py")]
    out = child(command, tmp_path, TRITON_INTERPRET="1")
    assert " passed" in out
    assert "skipped" not in out


def check(row: dict) -> None:
    name = f"{row['kernel']} on {row['arch']}"
    assert row["spills"] <= SPILLS, f"{name} spills {row['spills']} bytes"
    assert row["shared"] <= row["limit"], f"{name}: {row['shared']} bytes of shared memory"
    if row["kernel"].startswith("linear"):
        tensor_cores = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "gfx942": "v_mfma"}
        assert tensor_cores[row["arch"]] in row["mma"], name
    if " tma" in row["kernel"]:
        assert "UTMALDG" in row["mma"], name


def compiled(backend: str, arch: str, cache: Path, only: str = "") -> list[dict]:
    out = child([str(HERE / "aot.py"), backend, arch, only], cache)
    return [json.loads(line) for line in out.splitlines()]


def test_the_fused_forward_compiles_for_sm_90_with_tensor_cores_and_without_spills(tmp_path):
    rows = compiled("cuda", "90", tmp_path, "linear")
    assert len(rows) >= 2
    for row in rows:
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "arch"), TARGETS)
def test_every_configuration_compiles_ahead_of_time(backend, arch, tmp_path, capsys):
    rows = compiled(backend, arch, tmp_path)
    with capsys.disabled():
        print(f"\n{'kernel':44}{'registers':>10}{'spills':>8}{'shared':>9}  instructions ({arch})")
        for row in rows:
            print(
                f"{row['kernel']:44}{row['registers']:>10}{row['spills']:>8}{row['shared']:>9}"
                f"  {' '.join(row['mma'])}"
            )
    assert {r["kernel"].split()[0] for r in rows} == {
        "statistics",
        "gradient",
        "merge",
        "kl",
        "linear",
    }
    for row in rows:
        check(row)
