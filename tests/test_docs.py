"""docs/trainers.md: its blocks run, or are the examples that a module's own tests run."""

import copy
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fused_rl.integrations import liger, transformers, trl, verl

PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.M))


def blocks(section: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert found
    return found


def dedented(text: str) -> str:
    """Without the indentation that an example has in a docstring."""
    return "\n".join(line.strip() for line in textwrap.dedent(text).splitlines())


@pytest.mark.parametrize(
    ("section", "module"),
    [
        ("I use TRL", trl),
        ("I use verl", verl),
        ("I use Liger", liger),
        ("I call transformers models", transformers),
    ],
)
def test_blocks_are_those_that_the_tests_of_the_module_run(section, module):
    for block in blocks(section):
        assert dedented(block).strip() in dedented(inspect.getdoc(module))


def test_every_section_is_tested():
    assert set(SECTIONS) == {
        "I have my own loop",
        "I use TRL",
        "I use verl",
        "I use Liger",
        "I call transformers models",
        "I take kernels from the Hub",
    }


@pytest.fixture
def rollouts():
    torch.manual_seed(0)
    input_ids = torch.randint(0, 61, (8, 12))
    completion_mask = torch.ones(8, 12, dtype=torch.bool)
    completion_mask[:, :5] = False
    completion_mask[::3, 9:] = False
    return input_ids, completion_mask, torch.rand(8)


@pytest.fixture
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Qwen2ForCausalLM(config).double()


def test_the_loop_takes_the_same_step_in_micro_batches_of_any_size(model, rollouts):
    (block,) = blocks("I have my own loop")
    names = {}
    exec(block, names)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight += 0.1 * torch.randn_like(reference.lm_head.weight)
    before = model.lm_head.weight.detach().clone()
    found = []
    for micro_batch in (8, 2, 3):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), lr=1.0)
        loss = names["grpo_step"](mine, reference, optimizer, *rollouts, micro_batch)
        found.append((loss, mine.lm_head.weight.detach()))
    assert not torch.equal(found[0][1], before)
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        torch.testing.assert_close(weight, found[0][1], rtol=1e-9, atol=1e-12)


def test_the_kernel_repository_loads(tmp_path):
    pytest.importorskip("kernels")
    (block,) = blocks("I take kernels from the Hub")
    from fused_rl.integrations import hub

    hub.export(tmp_path / "DIR")
    code = (
        "import torch\n"
        "hidden, weight = torch.randn(3, 8), torch.randn(11, 8)\n"
        f"labels = torch.tensor([1, 2, 3])\n{block}\n"
        "assert stats.logprobs.shape == (3,)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
