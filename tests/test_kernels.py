"""The Triton kernels without a GPU: interpreted, and compiled ahead of time."""

import json
import re
from collections.abc import Iterable, Iterator

import compiled
import pytest
from interpreter import assert_passes

pytest.importorskip("triton", reason="triton is not installed")

# A few bytes of stack are the compiler's own bookkeeping.
SPILLS = 16
# More than that: what forms a tile of exponentials again, which is rare.
KNOWN = {"fused TMA 128x256x64, 8 warps, 3 stages, stores, again": 24}
TENSOR_CORES = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "gfx942": "v_mfma"}


@pytest.fixture(params=["installed", "older"])
def triton(request) -> str:
    """The folder of a triton, as `compiled.lines` takes it."""
    installed, *others = compiled.tritons().values()
    if request.param == "installed":
        return installed
    if not others:
        pytest.skip("no older triton in the environment: `make test-all` puts one there")
    return others[0]


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return json.loads(compiled.TABLE.read_text())


def test_kernels_in_the_interpreter(tmp_path):
    assert_passes("interpreted_kernels.py", tmp_path)


def test_two_heads_in_the_interpreter(tmp_path):
    assert_passes("interpreted_divergences.py", tmp_path)


def test_products_by_parts_in_the_interpreter(tmp_path):
    assert_passes("interpreted_split.py", tmp_path)


def check(row: dict) -> None:
    name = f"{row['kernel']}, {row['variant']}, on {row['arch']} by triton {row['triton']}"
    counts = row["counts"]
    assert row["shared"] <= row["limit"], f"{name}: {row['shared']} bytes of shared memory"
    if row["variant"] != "scalar":
        allowed = KNOWN.get(row["kernel"], SPILLS)
        assert row["stack"] <= allowed, f"{name}: {row['stack']} bytes of stack"
    if row["kernel"].startswith("fused"):
        assert counts.get(TENSOR_CORES[row["arch"]], 0) > 0, name
        assert ("UTMALDG" in counts) == ("pointers" not in row["kernel"]), name
    if row["kernel"].split()[0] in ("statistics", "gradient", "divergence"):
        vectors = {"LDG.128", "load.128"} & counts.keys()
        assert len(vectors) == (row["variant"] == "vector"), name


def test_a_fused_forward_compiles_for_sm_90(triton, table, tmp_path):
    """The first by tensor descriptors: with tensor cores, and without any stack."""
    first = next(row["kernel"] for row in table if row["kernel"].startswith("fused TMA"))
    rows = compiled.lines("cuda", "90", first, folder=triton, cache=str(tmp_path))
    assert [row["variant"] for row in rows if row["kernel"] == first] == ["vector", "padded"]
    for row in rows:
        check(row)
        assert row["stack"] == 0 or row["kernel"] != first, row


def named(rows: Iterable[dict]) -> Iterator[tuple[str, str, str]]:
    return ((row["arch"], row["kernel"], row["variant"]) for row in rows)


def test_the_table_has_a_row_for_every_configuration_in_the_code(table, tmp_path):
    lines = compiled.lines("--names", folder="", cache=str(tmp_path))
    expected = sorted(tuple(line[:3]) for line in lines)
    assert len({*expected}) == len(expected)
    versions = {row["triton"] for row in table}
    assert len(versions) >= 2
    for version in versions:
        found = sorted(named(row for row in table if row["triton"] == version))
        assert found == expected, f"{compiled.HOW}: {version}"
    sources = "".join(path.read_text() for path in (compiled.ROOT / "kernels").glob("*.py"))
    assert {line[3] for line in lines} == {*re.findall(r"def (_\w+_kernel)\(", sources)}


def test_the_page_shows_the_table(table):
    text = (compiled.ROOT / compiled.PAGE).read_text()
    block = text.split("<!-- aot:begin -->\n")[1].split("\n<!-- aot:end -->")[0]
    link = "../bench/results/compiled.json"
    assert block == "\n".join(compiled.page(table, link)), f"{compiled.HOW} --readme"


@pytest.mark.slow
@pytest.mark.parametrize("target", compiled.TARGETS, ids=lambda target: target[1])
def test_what_is_compiled_today_is_what_the_table_says(triton, target, table, tmp_path):
    rows = compiled.lines(*target, folder=triton, cache=str(tmp_path))
    for row in rows:
        check(row)
    same = {"triton": rows[0]["triton"], "arch": target[1]}
    expected = [row for row in table if same.items() <= row.items()]
    assert {*named(rows)} == {*named(expected)}
    changed = [pair for pair in zip(rows, expected, strict=True) if pair[0] != pair[1]]
    assert not changed, f"{len(changed)} rows; {compiled.HOW} writes them anew: {changed[:3]}"
