"""bench/gpu_readme.py: what it makes of a result, as it lies in the repository and as it may be."""

import copy
import json
from pathlib import Path

import gpu_readme as readme
import pytest

RESULTS = Path(__file__).parents[1] / "bench" / "results"
WAY = "TMA 128x256x64, 8 warps, 3 stages"
STEP = "GRPO step, head trained"


@pytest.fixture
def content() -> dict:
    """Of code that has no proof in it: every provider is what it was."""
    found = json.loads((RESULTS / "h100-bfloat16-145b923.json").read_text())
    return {**copy.deepcopy(found), "environment": {**found["environment"], "gpu": "NVIDIA X1"}}


@pytest.fixture
def written(content, tmp_path) -> Path:
    """A folder with result, page, front page and what is written there."""
    pytest.importorskip("matplotlib")
    (tmp_path / "x1.json").write_text(json.dumps(content))
    for name in ("page.md", "README.md"):
        text = "before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n"
        (tmp_path / name).write_text(text)
    options = ["--page", str(tmp_path / "page.md"), "--front", str(tmp_path / "README.md")]
    assert readme.main([str(tmp_path / "x1.json"), *options]) == 0
    return tmp_path


def test_the_page_says_what_was_measured(content, written):
    text = (written / "page.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "NVIDIA X1" in text and "[x1.json](x1.json)" in text and "(x1.svg)" in text
    first = readme.of_first_shape(content["records"])
    ours = next(r for r in first if r["provider"] == "fused_rl")
    cells = f"| fused_rl | {ours['seconds_median'] * 1e3:.0f} | {ours['ratio_to_products']:.2f} |"
    assert cells in text


def test_the_front_page_gets_a_row(content, written):
    text = (written / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    header, row = (line.split(" | ") for line in text.splitlines()[2:5:2])
    assert header[0] == "| On an NVIDIA X1: ms, extra MiB, error"
    here = [r for r in readme.of_first_shape(content["records"]) if r["case"] == readme.SUMMARY]
    first = next(r for r in here if r["provider"] == "fused_rl linear_policy_loss")
    assert header[1:4] == ["**fused_rl**", "eager torch", "torch.compile"]
    assert header[4] == "triton_grpo_loss |"
    assert row[0] == "| GRPO step, head trained"
    assert row[1].split(", ")[0] == f"{first['seconds_median'] * 1e3:.0f}"


def test_the_picture_has_a_bar_for_each_provider(content, written):
    """Ratios as text, and nothing that is only to be seen on white or on black."""
    text = (written / "x1.svg").read_text()
    shown = [r for r in readme.of_first_shape(content["records"]) if r["verdict"] == "right"]
    for record in shown:
        if record["provider"] != "bare products":
            assert record["provider"] in text and f"{record['ratio_to_products']:.2f}" in text
    assert "time / bare products" in text and "#ffffff" not in text and "#000000" not in text
    assert len(text) < 10**5
    before = text
    readme.write_ratios(written / "x1.svg", readme.of_first_shape(content["records"]))
    assert (written / "x1.svg").read_text() == before


def test_the_ways_through_the_forward_pass_are_a_table(content):
    table = readme.ways(content["forwards"], "Qwen3-8B")
    assert table[0].endswith("| 64 | 512 | 2048 | 8192 |") and table[-1] == ""
    here = {r["tokens"]: r for r in content["forwards"] if r["way"] == WAY and r["H"] == 4096}
    (row,) = (line for line in table if line.startswith(f"| {WAY} |"))
    assert row.count("**") == 6 and f"| **{here[8192]['ratio']:.2f}** |" in row
    content["forwards"][1] = {**content["forwards"][1], "failed": "no space"}
    assert readme.ways(content["forwards"], "Qwen3-8B")[3].split(" | ")[1] == "failed"
    assert readme.ways([], "Qwen3-8B") == []


def test_the_hosts_time_has_a_column_where_it_was_taken(content):
    first = readme.of_first_shape(content["records"])
    assert readme.cases(first)[0].endswith("| error |")
    first[1]["host_ms"] = 12.34
    header, _, products, ours, *_ = readme.cases(first)
    assert header.endswith("| of the host, ms |")
    assert ours.endswith(" | 12.3 |") and products.endswith("|  |")


def test_faults_are_named(content):
    """Where the products' own error is not known, no way is judged by it."""
    (unknown,) = readme.faults(content)
    assert "up to 1e-04 nats" in unknown and "was not measured" in unknown
    of_products = {"logprob_error_of_products": 1e-4}
    for record in content["forwards"]:
        record |= of_products if "logprob_error" in record else {}
    worst = max(r.get("logprob_error", 0) for r in content["forwards"])
    wrong = worst > 1.1 * 1e-4 + 1e-6
    told = readme.faults(content)
    assert any("wrong" in line for line in told) == wrong
    for record in content["forwards"]:
        record |= {"logprob_error": 1e-4} if "logprob_error" in record else {}
    assert readme.faults(content) == ["Nothing of ours was wrong or failed in that run."]
    content["forwards"][1]["logprob_error"] = 3e-4
    assert "3.0e-04 nats from float64, the products 1.0e-04" in readme.faults(content)[0]
    content["wrong"] = {"float16, logits": "errors [nan]"}
    content["forwards"] += [{"way": "a", "failed": "no space"}, {"way": "b", "failed": "no space"}]
    content["left out"] = ["the last part"]
    told = "\n".join(readme.faults(content))
    assert "float16, logits: errors [nan]" in told and "2 of the forwards" in told
    assert "the last part" in told and "Nothing of ours" not in told


def test_what_a_result_proves_is_ours_since(written, tmp_path):
    """Ours are those that ran as unproven; what was on is "before", and in no summary."""
    name = "h100-bfloat16"
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert readme.is_proof(name) and not readme.is_proof("x1")
    (tmp_path / f"{name}.json").write_text(json.dumps(result))
    options = ["--page", str(tmp_path / "page.md"), "--front", str(tmp_path / "README.md")]
    assert readme.main([str(tmp_path / f"{name}.json"), *options]) == 0
    page, front = ((tmp_path / f).read_text() for f in ("page.md", "README.md"))
    step = {
        r["provider"]: r
        for r in result["records"]
        if (r["shape"], r["case"]) == ("Qwen3-8B", STEP) and "seconds_median" in r
    }
    one_pass = "fused_rl linear_policy_loss"
    for title, provider in ((one_pass, f"{one_pass}, unproven"), (f"{one_pass}, before", one_pass)):
        r = step[provider]
        cells = f"| {title} | {r['seconds_median'] * 1e3:.0f} | {r['ratio_to_products']:.2f} |"
        assert cells in page
    assert "unproven |" not in page and '"unproven" in the file' in page
    ms = f"{step[f'{one_pass}, unproven']['seconds_median'] * 1e3:.0f}"
    assert f"| {STEP} | {ms}, " in front and "before" not in front.split("\n", 1)[1][:-6]
    # Of another head: without gradient, then the two steps of ours.
    (row,) = (line for line in page.splitlines() if line.startswith("| Llama-3.1-8B, "))
    ratios = [
        f"{r['ratio_to_products']:.2f}"
        for r in result["records"]
        if r["shape"] == "Llama-3.1-8B" and r["provider"].endswith(", unproven")
    ]
    assert row.split(" | ")[1:] == [
        ratios[0],
        *(" / ".join(ratios[i : i + 2]) for i in (1, 3)),
        " / ".join(ratios[5:]) + " |",
    ]


def test_divergences_are_a_table_of_their_own(tmp_path):
    """Ratios of the file; what did not fit by name; no picture, and nothing on the front page."""
    result, page = RESULTS / "h100-bfloat16-divergence.json", tmp_path / "page.md"
    page.write_text("<!-- gpu-divergence:begin -->\n<!-- gpu-divergence:end -->\n")
    assert readme.main([str(result), "--page", str(page), "--front", str(tmp_path / "none")]) == 0
    text, content = page.read_text(), json.loads(result.read_text())
    for r in content["records"]:
        cells = f"| {r['seconds_median'] * 1e3:.0f} | {r['ratio_to_products']:.2f} |"
        if not r["provider"].endswith("unproven") and r["provider"] != "bare products":
            assert f"| {r['provider']} {cells}" in text
    assert "unproven" not in text
    assert all(f"did not fit into the time: {title}" in text for title in content["left out"])
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
