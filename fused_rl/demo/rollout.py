"""Answers that the demo's model samples, with their hidden states and log-probs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fused_rl import LMHead, linear_logprobs
from fused_rl.demo import ranks
from fused_rl.demo.task import DIGITS, Problem, UnusableModel, explained, reward


@dataclass(frozen=True)
class Rollout:
    """B sampled answers, each behind its prompt of P columns, T columns long.

    Attributes:
        sequences: [B, P + T] int64; prompts are padded on the left.
        attention_mask: [B, P + T] int64; 0 at padding and after the end of the answer.
        labels: [B, T] int64; the answers.
        loss_mask: [B, T] bool; True up to the end-of-sequence token, and there.
        rewards: [B] float32.
    """

    sequences: Tensor
    attention_mask: Tensor
    labels: Tensor
    loss_mask: Tensor
    rewards: Tensor


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> Rollout:
    """One answer per problem, and its reward."""
    encoded = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    prompts, prompt_mask = encoded.input_ids, encoded.attention_mask
    # Where the weights are sharded, a process with short answers has to help those with long ones.
    options = {"attention_mask": prompt_mask, "synced_gpus": ranks.world() > 1}
    sequences = model.generate(input_ids=prompts, **options)
    labels = sequences[:, prompts.shape[1] :]
    ended = (labels == tokenizer.eos_token_id).int()
    loss_mask = ended.cumsum(-1) - ended == 0
    text = [
        tokenizer.decode(row[keep])
        for row, keep in zip(labels, loss_mask & (ended == 0), strict=True)
    ]
    rewards = torch.tensor([reward(p, t) for p, t in zip(problems, text, strict=True)])
    attention_mask = torch.cat([prompt_mask, loss_mask.to(prompt_mask.dtype)], -1)
    return Rollout(sequences, attention_mask, labels, loss_mask, rewards)


def right_answers(tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> Rollout:
    """The answer that each problem has, as if it had been sampled."""
    encoded = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    answers = [f" {p.answer}{tokenizer.eos_token}" for p in problems]
    labels = tokenizer(answers, return_tensors="pt", add_special_tokens=False).input_ids
    sequences = torch.cat([encoded.input_ids, labels], -1)
    mask = torch.ones_like(labels)
    attention_mask = torch.cat([encoded.attention_mask, mask], -1)
    return Rollout(sequences, attention_mask, labels, mask.bool(), torch.ones(len(problems)))


def answer_states(model: PreTrainedModel, rollout: Rollout, rows: Tensor) -> Tensor:
    """Hidden states [b, T, H] that predict labels[rows]: each stands one place before its token."""
    attention_mask = rollout.attention_mask[rows]
    hidden = model.base_model(
        input_ids=rollout.sequences[rows],
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -rollout.labels.shape[1] - 1 : -1]


@torch.no_grad()
def answer_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the answers."""

    def formed() -> Tensor:
        hidden = answer_states(model, rollout, torch.arange(len(rollout.labels)))
        head = LMHead.from_model(model)
        return linear_logprobs(hidden, head, rollout.labels, temperature=temperature).logprobs

    return ranks.inside(model, formed)


def try_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    temperature: float,
) -> None:
    """Finds out before the training whether a model of the user's answers, and can be scored.

    Raises:
        UnusableModel: it does not; or its log-probabilities are not finite.
    """
    every_digit = [Problem(tuple((i + j) % 10 for j in range(DIGITS))) for i in (0, 4, 8)]
    with explained(path), torch.random.fork_rng(devices=[]):
        rollout = sample(model, tokenizer, every_digit)
        logprobs = answer_logprobs(model, rollout, temperature)
    if not logprobs[rollout.loss_mask].isfinite().all():
        raise UnusableModel(f"the log-probabilities of {path} are not finite")
