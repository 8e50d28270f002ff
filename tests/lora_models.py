"""Small models with adapters on their heads, and what PEFT itself makes of hidden states."""

import contextlib

import pytest
import torch
from test_head import build

from fused_rl.integrations.transformers import backbone

peft = pytest.importorskip("peft", reason="peft is not installed")

V = 67
IDS = torch.arange(3, 45).reshape(3, 14)
LABELS = (IDS * 7) % V


def adapted(kind="llama", dtype=torch.float32, config=None, **options):
    """A model with LoRA on its head, whose factors are drawn; in evaluation."""
    model = build(kind).to(dtype)
    if config is None:
        given = {"r": 3, "lora_alpha": 5, "target_modules": ["lm_head"], **options}
        config = peft.LoraConfig(**given)
    model = peft.get_peft_model(model, config)
    drawn(model)
    return model.eval()


@torch.no_grad()
def drawn(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)


def hidden_of(model):
    with torch.no_grad():
        return backbone(model)(IDS).last_hidden_state


@contextlib.contextmanager
def with_states(model, hidden):
    """The model's backbone gives these states."""
    body = backbone(model)
    with torch.no_grad():
        output = body(IDS)
    output.last_hidden_state = hidden
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del body.forward


def theirs(model, hidden):
    """The model's own logits of hidden states [3, 14, 32]."""
    with with_states(model, hidden):
        return model(input_ids=IDS).logits


def of_logits(logits):
    """(log-probs of LABELS, entropies) in plain torch."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, LABELS[..., None])[..., 0], entropy


def trained(model):
    """The parameters of the model that are trained, those of its backbone apart."""
    head = model.get_base_model().get_output_embeddings()
    return [p for p in head.parameters() if p.requires_grad]
