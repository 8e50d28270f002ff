"""tests/peers/run.py: what it makes of two reports, without a peer; and the page it writes."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "peers" / "run.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("peers_run", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules["peers_run"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["peers_run"]


REPORT = """<testsuites><testsuite>
<testcase classname="a.b" name="test_one[luspo-0.1]"><failure message="x">y</failure></testcase>
<testcase classname="a.b" name="test_two"/>
<testcase classname="a.b" name="test_three"><skipped message="GPU"/></testcase>
<testcase classname="a.b" name="test_four"><error message="x"/></testcase>
</testsuite></testsuites>"""


def suite(script, **options):
    return script.Suite("verl", "ours_in_verl", ("tests/test_x.py",), **options)


def test_a_report_is_read(script):
    found = script.read(REPORT)
    assert found == {
        "a.b::test_one[luspo-0.1]": "failed",
        "a.b::test_two": "passed",
        "a.b::test_three": "skipped",
        "a.b::test_four": "failed",
    }
    assert script.counts(found) == "1 passed, 2 failed, 1 skipped"


def test_what_is_expected_is_told_from_what_is_not(script):
    expected = {r"luspo-0\.1": "another mean", "gone": "was mended"}
    failed = ["a.b::test_one[luspo-0.1]", "a.b::test_four"]
    reasons, unexpected, unused = script.explained(suite(script, expected=expected), failed)
    assert reasons == {"another mean": 1}
    assert unexpected == ["a.b::test_four"] and unused == ["gone"]


def test_a_line_of_the_table(script):
    plain, ours = {"t": "passed", "u": "passed"}, {"t": "passed", "u": "failed"}
    line = script.row("name", suite(script), plain, ours, {"reason": 1})
    version = script.version("verl")
    assert line == f"| name | verl {version} | 2 passed | 1 passed, 1 failed | 1 reason |"
    nothing = script.row("name", suite(script), {}, {}, {})
    assert nothing.endswith("| - | - | its tests are not in the released sources |")


def test_only_the_table_of_the_page_changes(script):
    page = "before\n<!-- table:begin -->\nold\n<!-- table:end -->\nafter\n"
    new = script.written(page, "| new |\n")
    assert new == "before\n<!-- table:begin -->\n| new |\n<!-- table:end -->\nafter\n"


def test_the_page_has_a_line_for_every_suite(script):
    page = (ROOT / "docs" / "peers.md").read_text()
    for name, part in script.SUITES.items():
        assert f"| {name} | {part.package} {script.version(part.package)} |" in page


def test_files_are_edited_in_copies(script, tmp_path):
    (tmp_path / "tests").mkdir()
    original = tmp_path / "tests" / "test_x.py"
    original.write_text("V = 64000\n")
    edited = script.prepared(suite(script, edits=(("64000", "1000"),)), tmp_path)
    assert edited == ["tests/test_x_small.py"]
    assert (tmp_path / edited[0]).read_text() == "V = 1000\n"
    assert original.read_text() == "V = 64000\n"
    original.unlink()
    assert script.prepared(suite(script), tmp_path) == []
