"""The demo's task, sorting digits, with a tokenizer and a small model made here.

    prompt  "Sort 3 1 4 1:"        answer  "1 1 3 4"        reward of "1 1 4 3"  0.5

Nothing is downloaded: the tokenizer has one token per digit and a few more, and the model is a
Qwen2 with random weights. `load` takes both from a directory instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fused_rl.system.outputs import one_line

DIGITS = 4


class UnusableModel(ValueError):
    """A model directory that the demo cannot train."""


@dataclass(frozen=True)
class Problem:
    """A row of digits to put into ascending order."""

    digits: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"Sort {' '.join(map(str, self.digits))}:"

    @property
    def answer(self) -> str:
        return " ".join(map(str, sorted(self.digits)))


def sample_problems(count: int, generator: torch.Generator, digits: int = DIGITS) -> list[Problem]:
    """Problems of so many digits, drawn independently and uniformly from 0 to 9."""
    rows = torch.randint(10, (count, digits), generator=generator)
    return [Problem(tuple(row)) for row in rows.tolist()]


def reward(problem: Problem, completion: str) -> float:
    """The fraction of places that hold the right digit of the sorted row; 1.0 is a correct answer.

    A place is a word. Places are counted over the longer of answer and completion: what is missing
    and what is too much both cost, so stopping in time is part of the task.
    """
    given, right = completion.split(), problem.answer.split()
    matches = sum(a == b for a, b in zip(given, right, strict=False))
    return matches / max(len(given), len(right))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and these words: the ten digits, "Sort", ":", and the special ones."""
    words = ["<pad>", "<eos>", "<unk>", "Sort", ":", *map(str, range(10))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(
    tokenizer: PreTrainedTokenizerBase, *, width: int = 64, layers: int = 2
) -> Qwen2ForCausalLM:
    """A small Qwen2; its weights come from torch's global generator."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            # The usual 0.02 is made for wide layers; at this width attention would start uniform.
            initializer_range=0.08,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """What goes wrong within, on account of a directory of the user's, becomes UnusableModel."""
    try:
        yield
    except (UnusableModel, KeyboardInterrupt, SystemExit):
        raise
    # A tokenizer that panics raises no Exception.
    except BaseException as error:
        reason = " ".join([line for line in str(error).splitlines() if line.strip()][:2])
        name = type(error).__name__
        raise UnusableModel(one_line(f"{path} cannot be used: {name}: {reason}")) from error


def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 and its tokenizer, from a directory of save_pretrained.

    Code that lies in the directory is not run.

    Raises:
        UnusableModel: no such directory; no model or no tokenizer in it, or none that transformers
            loads without code of theirs; a tokenizer without an end-of-sequence token.
    """
    path = Path(path)
    if not path.is_dir():
        raise UnusableModel(f"model must be a directory, got {path}")
    if not (path / "config.json").exists():
        raise UnusableModel(f"{path} has no model: there is no config.json")
    if not (path / "tokenizer_config.json").exists():
        raise UnusableModel(f"{path} has no tokenizer: there is no tokenizer_config.json")
    here = {"local_files_only": True, "trust_remote_code": False}
    with explained(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **here)
        if tokenizer.eos_token_id is None:
            raise UnusableModel(f"the tokenizer of {path} has no end-of-sequence token")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **here)
    return model, tokenizer


def start(
    path: str | Path | None, temperature: float
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, without dropout and set to plain sampling, and its tokenizer.

    Args:
        path: a directory to load them from; None: new ones.
        temperature: of sampling.

    Raises:
        UnusableModel: as for load.
    """
    if path is None:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
    else:
        model, tokenizer = load(path)
    tokenizer.padding_side = "left"
    return ready(model, tokenizer, temperature), tokenizer


def ready(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float,
    digits: int = DIGITS,
) -> PreTrainedModel:
    """The model without dropout, set to plain sampling of answers of up to so many digits."""
    answer = Problem((9,) * digits).answer
    length = len(tokenizer(f" {answer}", add_special_tokens=False).input_ids)
    # A generation config of its own: top-k or a repetition penalty that came with the model would
    # sample from another distribution than the one whose log-probabilities the loss takes.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length + 1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model.eval()
