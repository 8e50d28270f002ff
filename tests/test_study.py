"""The study's command, with a part made up here; the parts have tests of their own."""

import importlib.util
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from cases_study import doubled, drawn, refused

from fused_rl import cli
from fused_rl.study import command, part, workers
from fused_rl.system import commands

pytest.importorskip("rich")
drawing = pytest.importorskip("fused_rl.system.drawing")
pytest.importorskip("matplotlib")


def picture(numbers):
    figure = drawing.new_figure((3, 2))
    panel = figure.subplots()
    drawing.frame(panel)
    panel.plot(numbers["values"])
    return figure


def made_up(**changed) -> SimpleNamespace:
    def measure(options, tick):
        cases = [options.seed + i for i in range(2 if options.quick else 4)]
        return {"values": workers.each(drawn, cases, tick)}

    def tables(numbers):
        rows = [(f"[{i}]", f"{x:.3f}") for i, x in enumerate(numbers["values"])]
        return [part.Table("Values", ("case", "value, nats"), rows)]

    parts = {
        "NEEDS": (),
        "PICTURES": {"values": picture},
        "ticks": lambda options: 2 if options.quick else 4,
        "measure": measure,
        "tables": tables,
    }
    return SimpleNamespace(**(parts | changed))


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Runs the command with made-up parts; returns its status."""

    monkeypatch.setattr(workers, "cores", lambda: 1)

    def run(*options: str, folder="out", **changed) -> int:
        monkeypatch.setattr(command, "load", lambda name: made_up(**changed))
        return cli.main(["study", "--out", str(tmp_path / folder), *options])

    return run


def test_a_part_is_shown_and_written(study, tmp_path, capsys):
    assert study("gradients", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert "Values" in printed and "value, nats" in printed and f"{drawn(3):.3f}" in printed
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["gradients-values.png", "gradients-values.svg", "gradients.json"]
    numbers = json.loads((tmp_path / "out" / "gradients.json").read_text())
    assert numbers == {"values": [float(f"{drawn(3 + i):.10g}") for i in range(4)]}


def test_all_parts_unless_one_is_named(study, tmp_path):
    assert study("--quick") == 0
    found = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert found == set(command.NAMES)
    numbers = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(numbers["values"]) == 2


def test_the_same_seed_gives_the_same_files(study, tmp_path):
    for folder in ("a", "b"):
        assert study("training", folder=folder) == 0
    assert study("training", "--seed", "1", folder="c") == 0
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "abc")
    assert a == b and a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


def test_what_a_part_needs_is_named_before_anything_runs(study, monkeypatch, tmp_path, capsys):
    def find_spec(name, original=importlib.util.find_spec):
        return None if name in ("rich", "not_there") else original(name)

    assert study("training", NEEDS=("not_there",)) == 2
    monkeypatch.setattr(commands, "find_spec", find_spec)
    assert study("training") == 2
    errors = capsys.readouterr().err.splitlines()
    hint = 'pip install "fused-rl[demo]"'
    assert errors == [
        f"fused-rl study: needs not_there: {hint}",
        f"fused-rl study: needs rich: {hint}",
    ]
    assert not (tmp_path / "out").exists()


def test_results_need_a_folder(study, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert study("training") == 2
    error = capsys.readouterr().err
    assert error == f"fused-rl study: results need a folder, and {tmp_path}/out is none\n"


@pytest.mark.parametrize("seed", [0, -(2**63), 2**64 - 1])
def test_any_seed_of_the_command_makes_seeds_of_torch(seed):
    made = [part.derived_seed(seed, i) for i in range(5)]
    assert len(set(made)) == 5
    for one in made:
        torch.Generator().manual_seed(one)
    gradients = pytest.importorskip("fused_rl.study.gradients")
    assert [s for s, _ in gradients.cases(part.Options(seed))][:5] == made


def test_wrong_options(capsys):
    for options in (["nothing"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["study", *options])
        assert exit_.value.code == 2
        assert options[-1] in capsys.readouterr().err


def test_a_stop_leaves_what_was_done(study, tmp_path):
    """The parts before are written, nothing of the one that was stopped."""
    began = []

    def measure(options, tick):
        began.append(options)
        if len(began) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"values": [1.0]}

    assert study(measure=measure) == 130
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {command.NAMES[0]}


@pytest.mark.parametrize("cores", [1, 2])
def test_cases_come_back_in_their_order(cores, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: cores)
    ticks = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert workers.each(doubled, range(5), lambda: ticks.append(1)) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="no case 0"):
            workers.each(refused, [0, 0, 0], lambda: ticks.append(1))
    finally:
        torch.set_num_threads(before)
    assert len(ticks) == 5
    assert workers.each(doubled, [], lambda: None) == []
