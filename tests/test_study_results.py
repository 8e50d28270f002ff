"""The numbers that docs/ shows are the study's: found again here, as far as that is quick and does
not depend on the processor; its pictures are those of these numbers.

`fused-rl study all --out docs/study` writes docs/study/*.json; tests/study/ holds what
`fused-rl study PART --quick --out tests/study` writes, without its pictures.
"""

import json
import re
from pathlib import Path

import pytest

from fused_rl.study import command, modes, overoptimisation, part
from fused_rl.study.part import Options

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
SHOWN, QUICK = ROOT / "docs" / "study", ROOT / "tests" / "study"
EXACT = {"rtol": 1e-6, "atol": 1e-8}
# Keys of the estimators that depend on no option.
CLOSED = ("gaussians", "quantiles", "limits", "clamped")


def read(folder: Path, name: str) -> part.Numbers:
    return json.loads((folder / f"{name}.json").read_text())


def assert_close(found, expected, *, rtol: float, atol: float, at: str = "") -> None:
    """The same keys, words and lengths, and numbers that are near each other."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_close(found[key], expected[key], rtol=rtol, atol=atol, at=f"{at}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, rtol=rtol, atol=atol, at=f"{at}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rtol, abs=atol, nan_ok=True), at
    else:
        assert found == expected, at


@pytest.mark.parametrize("name", ["estimators", "gradients"])
def test_the_quick_numbers_are_found_again(name):
    expected = read(QUICK, name)
    found = part.rounded(command.load(name).measure(Options(quick=True), lambda: None))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        near = expected.get("tolerances", {}).get(key, EXACT)
        assert_close(found[key], value, **near, at=key)


def test_closed_forms_are_the_same_in_the_full_study():
    shown, quick = read(SHOWN, "estimators"), read(QUICK, "estimators")
    for key in CLOSED:
        assert_close(shown[key], quick[key], **shown["tolerances"][key], at=key)


def test_the_exact_curves_of_over_optimisation_are_found_again():
    found = part.rounded(overoptimisation.exact(overoptimisation.world_seed(Options())))
    assert_close(found, read(SHOWN, "overoptimisation")["worlds"][0], **EXACT)


def test_the_ends_between_two_modes_are_found_again():
    """But for that of k3 in the reward, which collapses: it has none."""
    shown = read(SHOWN, "training")["modes"]["starts"]
    cases = [case for case in modes.cases() if case.way.name != "k3 in reward"]
    assert len(cases) + 2 == len(modes.cases())
    for case in cases:
        near = {"rtol": 1e-3, "atol": 1e-3, "at": str(case)}
        assert_close(modes.end(case), shown[case.start][case.way.name], **near)


def words(path: Path) -> list[str]:
    """The texts of a picture, in the order that they are drawn."""
    return re.findall(r"<text[^>]*>(.*?)</text>", path.read_text())


@pytest.mark.parametrize("name", command.NAMES)
def test_the_pictures_are_those_of_the_numbers(name, tmp_path):
    chosen = command.load(name)
    part.write(name, chosen, read(SHOWN, name), tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert pictures == sorted(path.name for path in SHOWN.glob(f"{name}-*.svg"))
    for picture in pictures:
        assert words(tmp_path / picture) == words(SHOWN / picture), picture
        assert len((SHOWN / picture).read_bytes()) < 80_000
