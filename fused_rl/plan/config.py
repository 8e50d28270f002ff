"""H and V of the head of a model, from its config.json as it was written.

A config of several models keeps that of the language model in one of its entries, at any depth. A
size that is not there is the default of the model's type, which transformers knows: it leaves out
of a nested config what equals it (LLaVA's hidden_size, Gemma 3's vocab_size).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from fused_rl.system.outputs import one_line

NESTED = (
    "thinker_config",
    "text_config",
    "language_config",
    "llm_config",
    "decoder_config",
    "decoder",
)
# The width of the head comes first, where it is not that of the layers.
WIDTHS = (
    "word_embed_proj_dim",
    "output_embedding_size",
    "embedding_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "embed_dim",
    "emb_dim",
)
VOCABULARIES = ("vocab_size", "tgt_vocab_size")
# No head is larger, and the products of two sizes stay below 2**63.
LARGEST = 2**31 - 1


def head_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """H and V from the config.json of a transformers model, nested or not.

    Raises:
        ValueError: it is no JSON object, or a nested config is none; it has no sizes, and none that
            transformers knows for its model_type; a size is no whole number from 1 to 2**31 - 1.
    """
    levels = _levels(config, "config")
    width, vocabulary = (_found(levels, names) for names in (WIDTHS, VOCABULARIES))
    if width is None or vocabulary is None:
        keys = one_line(", ".join(list(levels[-1])[:8])) or "nothing"
        raise ValueError(f"config must have vocab_size and hidden_size, got {keys}")
    # A reversible model hands over two streams side by side.
    streams = 2 if config.get("model_type") == "reformer" else 1
    return size(*width) * streams, size(*vocabulary)


def size(name: str, value: Any) -> int:
    """The value, if it is a whole number from 1 to LARGEST; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        wanted = "a whole number"
    elif 1 <= value <= LARGEST:
        return value
    else:
        wanted = "positive" if value < 1 else f"at most {LARGEST}"
    raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(value)}")


def _found(levels: list[Mapping[str, Any]], names: tuple[str, ...]) -> tuple[str, Any] | None:
    """Name and value of the first of these entries; one that is null is as good as none."""
    found = ((n, s[n]) for s in _sources(levels) for n in names if s.get(n) is not None)
    return next(found, None)


def _sources(levels: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """From the innermost config outwards, each with the defaults of its type behind it."""
    for level in reversed(levels):
        yield level
        yield from reversed(_defaults(level.get("model_type")))


def _levels(config: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A config and the one of the language model in it, from the outermost to the innermost."""
    found: list[Mapping[str, Any]] = []
    while True:
        if not isinstance(config, Mapping):
            raise ValueError(f"{name} must be an object, got {reprlib.repr(config)}")
        found.append(config)
        name = next((n for n in NESTED if n in config), "")
        if not name:
            return found
        config = config[name]


def _defaults(model_type: Any) -> list[Mapping[str, Any]]:
    """What transformers takes where a config of this type says nothing, in levels."""
    if not isinstance(model_type, str) or find_spec("transformers") is None:
        return []
    from transformers import CONFIG_MAPPING, logging

    if model_type not in CONFIG_MAPPING:
        return []
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return _levels(CONFIG_MAPPING[model_type]().to_dict(), model_type)
    # A type whose parts must be given has no defaults.
    except ValueError:
        return []
    finally:
        logging.set_verbosity(before)
