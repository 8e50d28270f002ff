"""H and V of a head, from configs as they lie beside real models, and from what is none."""

import json
from pathlib import Path

import pytest
import torch

from fused_rl import cli
from fused_rl.plan import config
from fused_rl.plan.config import NESTED, head_shape
from fused_rl.plan.memory import plan

# Abridged; what matters is what is left out of the nested ones.
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-05},
    "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model", "vocab_size": 32000},
}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {"hidden_size": 2560, "model_type": "gemma3_text"},
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
OMNI = {
    "architectures": ["Qwen2_5OmniModel"],
    "model_type": "qwen2_5_omni",
    "talker_config": {"hidden_size": 896, "vocab_size": 8448},
    "thinker_config": {
        "audio_config": {"d_model": 1280},
        "text_config": {"hidden_size": 3584, "vocab_size": 152064},
        "vision_config": {"hidden_size": 3584, "embed_dim": 1280},
    },
    "token2wav_config": {"dit_config": {"hidden_size": 1024}},
}
OPT_350M = {
    "model_type": "opt",
    "hidden_size": 1024,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (LLAVA, (4096, 32064)),
        (GEMMA3, (2560, 262208)),
        (OMNI, (3584, 152064)),
        ({"model_type": "qwen2_5_omni"}, (3584, 152064)),
        (OPT_350M, (512, 50272)),
        ({"model_type": "gpt2"}, (768, 50257)),
        ({"model_type": "kosmos-2", "text_config": {"embed_dim": 64}}, (64, 65037)),
        (
            {"vocab_size": 99, "decoder": {"hidden_size": 64}, "encoder": {"hidden_size": 1}},
            (64, 99),
        ),
        ({"hidden_size": 64, "vocab_size": 99, "embedding_size": None}, (64, 99)),
        ({"hidden_size": 64, "vocab_size": 99, "model_type": ["llama"]}, (64, 99)),
        ({"hidden_size": 64, "tgt_vocab_size": 99, "src_vocab_size": 1}, (64, 99)),
    ],
)
def test_head_shape_of_real_configs(config, shape):
    pytest.importorskip("transformers")
    assert head_shape(config) == shape


def test_what_is_in_the_file_needs_no_transformers(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert head_shape(OMNI) == (3584, 152064) and head_shape(OPT_350M) == (512, 50272)
    with pytest.raises(ValueError, match="must have vocab_size and hidden_size, got model_type"):
        head_shape(LLAVA)


def test_defaults_are_asked_for_in_silence(capfd):
    pytest.importorskip("transformers")
    assert head_shape({"model_type": "nemotron_h"})[0] > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "size", [[64], {"a": 1}, -5, 1e30, 2**63 - 1, 0, 4.7, True, float("inf"), "64", "\x1b[31m" * 99]
)
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_sizes_that_are_none(name, size):
    with pytest.raises(ValueError, match=f"{name} must be .*, got ") as error:
        head_shape({"hidden_size": 64, "vocab_size": 99, name: size})
    assert len(str(error.value)) < 120 and str(error.value).isprintable()


@pytest.mark.parametrize("config", [[], "x", 7, None, True, 1.5])
def test_configs_that_are_none(config):
    with pytest.raises(ValueError, match="config must be an object, got "):
        head_shape(config)
    for name in NESTED:
        with pytest.raises(ValueError, match=f"{name} must be an object, got "):
            head_shape({"hidden_size": 64, "vocab_size": 99, name: config})


def test_errors_do_not_repeat_the_file():
    with pytest.raises(ValueError, match="got k0, k1") as error:
        head_shape({f"k{i}": "\x1b[31m" for i in range(20000)})
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match="must have vocab_size") as error:
        head_shape({"\x1b[31m" + "k" * 10**5: 1})
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tokens": 10**18}, "tokens must be at most 2147483647, got 1000000000000000000"),
        ({"tokens": 2**31 - 1, "chunk_bytes": 1}, "chunks of more than 1 of 2147483647 tokens"),
        ({"chunk_bytes": 2**63}, "chunk_bytes must be positive and less than"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive and less than"),
        ({"chunk_bytes": -1}, "chunk_bytes must be positive and less than"),
    ],
)
def test_plans_that_nobody_can_count(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        plan({"hidden_size": 64, "vocab_size": 99}, **{"tokens": 8, **options})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5 + "]" * 10**5,
        '{"text_config":' * 900 + "1" + "}" * 900,
        "null",
        '{"text_config": null}',
        '{"hidden_size": Infinity, "vocab_size": 9}',
    ],
    ids=["deep lists", "deep objects", "null", "null inside", "infinity"],
)
def test_the_command_says_one_line(text, tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["plan", "--model-config", str(path), "--tokens", "8"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("fused-rl plan: ")


@pytest.mark.slow
def test_every_model_of_transformers_is_read_rightly(tmp_path):
    """Each type that can be made as it is by default, on no device: as its config is saved."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    tried = wrong = 0
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM"):
        for name, made in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            made = made if isinstance(made, str) else made[0]
            try:
                config = transformers.CONFIG_MAPPING[name]()
                with torch.device("meta"):
                    head = getattr(transformers, made)(config).get_output_embeddings()
                shape = head.weight.shape[::-1]
            # Types whose defaults make no model, or none with a head.
            except Exception:
                continue
            config.save_pretrained(tmp_path)
            saved = json.loads(Path(tmp_path, "config.json").read_text())
            tried, wrong = tried + 1, wrong + (head_shape(saved) != tuple(shape))
    assert tried > 200 and wrong == 0
