"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import json
from pathlib import Path

import pytest
from interpreter import HERE, assert_passes, child

pytest.importorskip("triton", reason="triton is not installed")

TARGETS = [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]
# A few bytes of stack are the compiler's own bookkeeping.
SPILLS = 16


def test_kernels_in_the_interpreter(tmp_path):
    assert_passes("interpreted_kernels.py", tmp_path)


def test_products_by_parts_in_the_interpreter(tmp_path):
    assert_passes("interpreted_split.py", tmp_path)


def check(row: dict) -> None:
    name = f"{row['kernel']} on {row['arch']}"
    # That is the fastest of those that were measured, all the same.
    if row["kernel"] != "linear 128x256x64 tma":
        assert row["spills"] <= SPILLS, f"{name} spills {row['spills']} bytes"
    assert row["shared"] <= row["limit"], f"{name}: {row['shared']} bytes of shared memory"
    if row["kernel"].startswith("linear"):
        tensor_cores = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "gfx942": "v_mfma"}
        assert tensor_cores[row["arch"]] in row["mma"], name
    if " tma" in row["kernel"]:
        assert "UTMALDG" in row["mma"], name


def compiled(backend: str, arch: str, cache: Path, only: str = "") -> list[dict]:
    done = child(str(HERE / "aot.py"), backend, arch, only, TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


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
        "split",
    }
    for row in rows:
        check(row)
