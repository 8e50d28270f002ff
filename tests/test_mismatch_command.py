"""`fused-rl mismatch`: what it reads, what it prints and draws, and what it says of other files."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_rl import cli
from fused_rl.mismatch import LogitRounding, mismatch_report
from fused_rl.study.mismatch import dumps
from fused_rl.system import commands

LENGTHS = (40, 25, 60, 33)


def records(ours="logprobs", theirs="rollout_logprobs", mask="loss_mask") -> list[dict]:
    """Four sequences of a rollout at another temperature, the last tokens masked."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        logits = 3 * torch.randn(length, 50, generator=generator)
        ids = torch.multinomial((1.3 * logits).softmax(-1), 1, generator=generator)
        both = ((z.log_softmax(-1).gather(-1, ids).squeeze(-1)) for z in (logits, 1.3 * logits))
        record = dict(zip((ours, theirs), (x.tolist() for x in both), strict=True))
        record[mask] = (length - 5) * [1] + 5 * [0]
        found.append({"prompt": "text\nof it", **record})
    return found


def expected(**options):
    """The report of records()."""
    vectors = [
        torch.tensor([x for r in records() for x in r[name]], dtype=torch.float64)
        for name in ("logprobs", "rollout_logprobs", "loss_mask")
    ]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    return mismatch_report(*vectors[:2], vectors[2].bool(), cu_seqlens=starts, **options)


def written(folder: Path, suffix: str, content: list[dict]) -> Path:
    path = folder / f"rollout{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(content))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in content))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fused_rl.cli", "mismatch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_rollout_in_a_file_is_reported(suffix, tmp_path):
    path = written(tmp_path, suffix, records())
    done = run(path)
    assert (done.returncode, done.stderr) == (0, "")
    fields, report = done.stdout.split("\n", 1)
    assert fields == "fields       logprobs, rollout_logprobs, loss_mask"
    assert report == f"{expected()}\n"
    assert "temperature" in report


def test_numbers_as_json(tmp_path):
    done = run(written(tmp_path, ".jsonl", records()), "--json", "--logit-magnitude", 30)
    found = json.loads(done.stdout)
    assert found.pop("fields") == ["logprobs", "rollout_logprobs", "loss_mask"]
    assert found == json.loads(json.dumps(expected(rounding=LogitRounding(30.0)).numbers()))


def read(path: Path, *names: str | None) -> dumps.Rollout:
    return dumps.read(path, dumps.Names(*names))


FIELDS = {
    "verl": ("old_log_probs", "rollout_log_probs", "response_mask"),
    "TRL": ("old_per_token_logps", "sampling_per_token_logps", "completion_mask"),
    "slime": ("log_probs", "rollout_log_probs", "loss_masks"),
    "NeMo-RL": ("prev_logprobs", "generation_logprobs", "token_mask"),
    "prime-rl": ("trainer_logprobs", "inference_logprobs", "loss_mask"),
    "fused_rl": ("old_logprobs", "rollout_logprobs", "loss_mask"),
}


@pytest.mark.parametrize("who", FIELDS)
def test_the_names_of_others_are_known(who, tmp_path):
    found = read(written(tmp_path, ".json", records(*FIELDS[who])))
    assert found.named == FIELDS[who]
    right = expected()
    assert torch.equal(found.logprobs[found.loss_mask], right.logprobs)
    assert torch.equal(found.rollout_logprobs[found.loss_mask], right.rollout_logprobs)
    assert found.cu_seqlens.diff().tolist() == list(LENGTHS)


def test_log_probs_before_the_step_come_first_and_names_that_are_given_before_all(tmp_path):
    content = [{**r, "old_logprobs": r["rollout_logprobs"]} for r in records()]
    path = written(tmp_path, ".json", content)
    found = read(path)
    assert found.named[0] == "old_logprobs"
    assert torch.equal(found.logprobs, found.rollout_logprobs)
    assert read(path, "logprobs", "old_logprobs").named == ("logprobs", "old_logprobs", "loss_mask")


def test_an_object_of_arrays_and_rows_of_numbers(tmp_path):
    arrays = {"step": 3, "logprobs": [[-1, None], [-2.5, math.nan]]}
    arrays["rollout_logprobs"] = [[-1, -2], [-3, -4]]
    path = tmp_path / "arrays.json"
    path.write_text(json.dumps(arrays))
    found = read(path)
    assert found.loss_mask is None and found.cu_seqlens.tolist() == [0, 2, 4]
    assert found.logprobs.isnan().tolist() == [False, True, False, True]
    flat = [{"logprobs": -1.0, "rollout_logprobs": -2.0, "loss_mask": i % 2} for i in range(4)]
    found = read(written(tmp_path, ".ndjson", flat))
    assert found.cu_seqlens is None and found.loss_mask.tolist() == [False, True, False, True]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path, folder = written(tmp_path, ".jsonl", records()), tmp_path / "new"
    pictures = [folder / f"{name}.{suffix}" for name in ("a", "b")]
    for picture in pictures:
        assert cli.main(["mismatch", str(path), "--picture", str(picture)]) == 0
    content = pictures[0].read_bytes()
    assert content.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        text = content.decode()
        for words in ("rollout mismatch: ", "rounding alone", "observed", "trainer's log-prob"):
            assert words in text
    assert sorted(p.name for p in folder.iterdir()) == [f"a.{suffix}", f"b.{suffix}"]


def test_the_pictures_shares_by_hand():
    picture = pytest.importorskip("fused_rl.study.mismatch.picture", exc_type=ImportError)
    errors = torch.tensor([0.0, 1e-9, 0.5, 1.0, 3.0, 1e9, math.nan], dtype=torch.float64)
    edges = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    assert picture.share_of(errors, edges) == pytest.approx([3 / 6, 3 / 6])


def test_identical_log_probs_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    content = [{"logprobs": [0.0, 0.0], "rollout_logprobs": [0.0, 0.0]}]
    path = written(tmp_path, ".json", content)
    assert cli.main(["mismatch", str(path), "--picture", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").exists()


def pair(ours, theirs, **more) -> str:
    return json.dumps([{"logprobs": ours, "rollout_logprobs": theirs, **more}])


MISTAKES = {
    "no file": ("x.json", None, "No such file"),
    "no suffix": ("x", "[]", "must be .json, .jsonl, .ndjson, .parquet, got no suffix"),
    "another format": ("x.pt", "[]", "got .pt"),
    "no JSON": ("x.json", "{", "is no JSON"),
    "a line that is none": ("x.jsonl", '{"logprobs": 1}\n{\n', "line 2, is no JSON"),
    "no Parquet": ("x.parquet", "PAR1 not", "Parquet"),
    "a number": ("x.json", "3", "must be a list of records, or an object of arrays"),
    "records of lists": ("x.json", "[[1]]", "record 0 must be an object, got list"),
    "nothing": ("x.json", "[]", "the trainer's log-probs are missing"),
    "none of the engine": ("x.json", '[{"logprobs": [1], "b": 2}]', "found: logprobs, b"),
    "deep": ("x.json", "[" * 100_000, "nested too deep"),
    "texts": ("x.json", pair(["a"], [1]), "logprobs must be numbers"),
    "texts in rows": ("x.json", pair("a", 1), "logprobs must be numbers"),
    "deeper lists": ("x.json", pair([[1]], [[1]]), "logprobs must be numbers"),
    "lengths": ("x.json", pair([1, 2], [1]), "record 0: logprobs has 2 tokens, and rollout_log"),
    "list and number": ("x.json", pair([1], 1), "must both be lists per sequence, or neither"),
    "a mask": ("x.json", pair([1], [1], loss_mask=[2]), "loss_mask must be 0 or 1, got 2.0"),
    "a mask's NaN": ("x.json", pair([1], [1], loss_mask=[None]), "loss_mask must be 0 or 1"),
    "a mask's length": ("x.json", pair([1], [1], loss_mask=[]), "loss_mask 0"),
    "arrays": ("x.json", '{"logprobs": [[1]], "rollout_logprobs": [[1], [2]]}', "1 sequences, and"),
    "flat arrays": ("x.json", '{"logprobs": [1], "rollout_logprobs": [1, 2]}', "1 and 2 tokens"),
    "mixed": ("x.json", '{"logprobs": [[1], 2], "rollout_logprobs": [1, 2]}', "a list in some"),
    "a huge number": (
        "x.json",
        f'{{"logprobs": [1{"0" * 400}], "rollout_logprobs": [1]}}',
        "float",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_of_another_kind_is_one_line(mistake, tmp_path, capsys):
    name, content, complaint = MISTAKES[mistake]
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert cli.main(["mismatch", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("fused-rl mismatch: ")
    assert printed.err.count("\n") == 1 and complaint in printed.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--mask", "nothing"], "there is no field nothing for the mask; found: prompt, logprobs"),
        (["--logprobs", "prompt"], "prompt and rollout_logprobs must both be lists"),
        (["--picture", "x.gif"], "--picture must be .svg or .png"),
    ],
)
def test_wrong_options(options, complaint, tmp_path, capsys):
    path = written(tmp_path, ".json", records())
    assert cli.main(["mismatch", str(path), *options]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--logit-magnitude=0", "--logit-magnitude=nan"])
def test_a_magnitude_is_above_0(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["mismatch", "x.json", option])
    assert exit_.value.code == 2


@pytest.mark.parametrize("name", ["pyarrow", "matplotlib"])
def test_what_is_not_installed_is_named(name, tmp_path, capsys, monkeypatch):
    def find_spec(wanted, original=importlib.util.find_spec):
        return None if wanted == name else original(wanted)

    monkeypatch.setattr(commands, "find_spec", find_spec)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    options = ["--picture", str(tmp_path / "x.svg")] if name == "matplotlib" else []
    assert cli.main(["mismatch", str(path), *options]) == 2
    assert f"needs {name}: pip install {name}" in capsys.readouterr().err


def test_where_nothing_counts_there_is_a_report_and_no_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    content = [{**r, "loss_mask": [0] * len(r["loss_mask"])} for r in records()]
    path = written(tmp_path, ".json", content)
    assert cli.main(["mismatch", str(path)]) == 0
    assert "there is nothing to compare" in capsys.readouterr().out
    picture = tmp_path / "x.svg"
    assert cli.main(["mismatch", str(path), "--picture", str(picture)]) == 2
    assert "is not drawn" in capsys.readouterr().err and not picture.exists()


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = written(tmp_path, ".json", records())
    (tmp_path / "x.svg").mkdir()
    assert cli.main(["mismatch", str(path), "--picture", str(tmp_path / "x.svg")]) == 2
    assert "it is a folder" in capsys.readouterr().err
