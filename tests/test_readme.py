"""The README: its examples run, its tables are what the code says."""

import re
from pathlib import Path

import pytest
import torch
from enumeration import World, markdown

import fused_rl

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def names():
    """What the examples take for granted."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    input_ids = torch.randint(0, 61, (8, 6))
    return {"model": model, "input_ids": input_ids, "fused_rl": fused_rl}


def test_the_examples_run_one_after_the_other(names):
    assert len(EXAMPLES) == 3
    exec(EXAMPLES[0], names)
    stats = names["stats"]
    assert stats.logprobs.shape == (8, 5) and stats.entropy.requires_grad
    old = stats.logprobs.detach()
    names |= {
        "labels": names["input_ids"][:, 1:],
        "hidden": names["hidden"][:, :-1],
        "loss_mask": torch.ones(8, 5, dtype=torch.bool),
        "rewards": torch.rand(8),
        "old_logprobs": old,
        "ref_logprobs": old - 0.1,
    }
    exec(EXAMPLES[1], names)
    assert names["model"].lm_head.weight.grad.isfinite().all()
    for said in ("kl", "entropy", "clip_fraction_low", "ratio_mean", "zero_gradient_fraction"):
        assert said in names["output"].metrics
    exec(EXAMPLES[2], names)
    assert names["mine"](stats, names["batch"]).loss.isfinite()


def test_the_table_of_kl_gradients_is_the_one_that_the_enumeration_prints():
    table = TEXT.split("<!-- kl:begin -->\n")[1].split("<!-- kl:end -->")[0]
    assert table.strip() == markdown(World()).strip()


def test_every_named_loss_is_listed():
    for name in fused_rl.losses.named.NAMES:
        assert f"`{name}`" in TEXT, name
