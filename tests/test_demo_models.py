"""Directories that `fused-rl demo --model` is given: what cannot be trained is a mistake, told in
one line; what lies in them is not run.
"""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file, save_file

from fused_rl import cli
from fused_rl.demo import task, train
from fused_rl.demo.task import UnusableModel, explained, start

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer_config.json", "model.safetensors"


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil; code in it leaves a mark."""
    path = tmp_path / "model"
    shutil.copytree(saved, path)
    (path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    return path


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def edited(name: str, **changes):
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return spoil


def weights(content: bytes):
    return lambda folder: (folder / WEIGHTS).write_bytes(content)


def half_of_the_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:50000])


def not_a_number(folder: Path) -> None:
    tensors = {name: t * torch.nan for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder.parent / 'mark'}",)

    (folder / WEIGHTS).unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


def words_beyond_the_vocabulary(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["9"] = 10**5
    (folder / "tokenizer.json").write_text(json.dumps(content))


AUTO = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}

UNUSABLE = {
    "no JSON": text(CONFIG, "no"),
    "a list": text(CONFIG, "[]"),
    "null": text(CONFIG, "null"),
    "empty": text(CONFIG, "{}"),
    "deep": text(CONFIG, "[" * 10**5),
    "an unknown type": edited(CONFIG, model_type="\x1b[31mnew"),
    "code of its own": edited(CONFIG, model_type="new", auto_map=AUTO),
    "no language model": text(CONFIG, '{"model_type": "vit"}'),
    "an encoder and a decoder": text(CONFIG, '{"model_type": "t5"}'),
    "layers below 0": edited(CONFIG, num_hidden_layers=-1),
    "no heads": edited(CONFIG, num_attention_heads=0),
    "a width in words": edited(CONFIG, hidden_size="64"),
    "a width beyond counting": edited(CONFIG, hidden_size=2**40),
    "other shapes": edited(CONFIG, hidden_size=32),
    "a tokenizer's list": text(TOKENIZER, "[]"),
    "a tokenizer that is none": text("tokenizer.json", "{}"),
    "a tokenizer with other words": words_beyond_the_vocabulary,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "half the weights": half_of_the_weights,
    "weights with a long header": weights(struct.pack("<Q", 2**62) + b"{}"),
    "pickled code": pickled,
    "not a number": not_a_number,
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_directories_are_told_in_one_line(spoil, folder, tmp_path, capsys):
    spoil(folder)
    out = tmp_path / "out"
    assert cli.main(["demo", "--steps", "1", "--out", str(out), "--model", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fused-rl demo: {folder} cannot be used: ")
    assert error.isprintable() and len(error) < 500
    assert list(out.iterdir()) == [] and not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
def test_code_beside_a_known_type_is_left_alone(name, folder, tmp_path):
    edited(name, auto_map=AUTO)(folder)
    model, tokenizer = start(folder, 1.0)
    train.try_out(model, tokenizer, folder, 1.0)
    assert not (tmp_path / "mark").exists()


def test_code_is_refused_in_so_many_words(saved, monkeypatch):
    """Without them transformers asks, on a terminal, and takes yes for an answer."""
    asked = []
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(task, name)

        def from_pretrained(*args, original=kind.from_pretrained, **options):
            asked.append((options["trust_remote_code"], options["local_files_only"]))
            return original(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    start(saved, 1.0)
    assert asked == [(False, True)] * 2


def test_trying_a_model_out_draws_no_number(saved):
    model, tokenizer = start(saved, 1.0)
    before = torch.get_rng_state()
    train.try_out(model, tokenizer, saved, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_panic_is_told_and_a_stop_goes_through():
    class PanicException(BaseException):
        """What a tokenizer in Rust raises."""

    with pytest.raises(UnusableModel, match=r"here .* PanicException: no"), explained("here"):
        raise PanicException("no")
    with pytest.raises(KeyboardInterrupt), explained("here"):
        raise KeyboardInterrupt
