"""The README: short, its commands first, its example runs, its table is the result's."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import qwen2

import fused_rl

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_it_is_read_in_a_minute_and_begins_with_the_two_commands():
    assert len(TEXT.splitlines()) < 150
    commands = TEXT.split("```bash\n")[1].split("```")[0].splitlines()
    assert [line.split("  ")[0] for line in commands] == ["make demo", "make test"]
    assert TEXT.index("```") == TEXT.index("```bash\nmake demo")


@pytest.fixture
def names():
    """What the example takes for granted."""
    model = qwen2(61)
    input_ids = torch.randint(0, 61, (8, 6))
    given = {"model": model, "input_ids": input_ids, "rewards": torch.rand(8)}
    given["loss_mask"] = torch.ones(8, 5, dtype=torch.bool)
    reference = {"ref_hidden": torch.randn(8, 5, 16), "ref_head": torch.randn(61, 16)}
    return given | reference | {"ref_logprobs": torch.rand(8, 5) - 4}


def test_the_example_runs(names):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    statements = [line for line in example.splitlines() if line.strip() and line[0] != "#"]
    assert len(statements) <= 10
    exec(example, names)
    logits = names["model"](names["input_ids"]).logits[:, :-1] / 0.8
    logp = logits.log_softmax(-1)
    plain = logp.gather(-1, names["labels"][..., None])[..., 0]
    torch.testing.assert_close(names["logprobs"], plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(names["entropy"], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)
    # Of the model at temperature 1, from the reference.
    other = (names["ref_hidden"] @ names["ref_head"].T).log_softmax(-1)
    own = (logits * 0.8).log_softmax(-1)
    kl = (own.exp() * (own - other)).sum(-1)
    torch.testing.assert_close(names["exact"], kl, atol=1e-5, rtol=1e-5)
    # The step of eager torch, on-policy: r = 1, and k2's gradient is d.
    d = (plain - names["ref_logprobs"]).detach()
    advantages = fused_rl.advantages.group_zscore_advantages(names["rewards"], group_size=8)
    loss = ((0.04 * d - advantages[:, None]) * plain).mean()
    weights = (names["model"].lm_head.weight, names["model"].model.layers[0].mlp.up_proj.weight)
    for weight, expected in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=1e-4)
    for said in ("kl", "entropy", "clip_fraction_low", "ratio_mean", "zero_gradient_fraction"):
        assert said in names["output"].metrics
