"""TRL's GRPOTrainer with any of our losses."""

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rl.integrations.trl.logprobs import in_head
from fused_rl.integrations.trl.patching import patched
from fused_rl.linear.head import LMHead
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import TokenMean
from fused_rl.losses.policy import Loss, LossOutput
from fused_rl.one_pass.policy_loss import linear_policy_loss

# TRL's names for our metrics; the others keep theirs.
_LOGGED_AS = {
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
_COUNTS = ("num_tokens", "num_sequences", "num_rollouts")


class FusedLoss:
    """Gives a GRPOTrainer class our losses: `class Mine(FusedLoss, MyGRPOTrainer)`.

    The loss is formed in the model's forward, where the head's weight is whole, and leaves it as
    the log-prob of one token, 0 at the others: what wraps the model sees it among its outputs. On
    two processes it takes the steps of TRL's own trainer under DDP, FSDP2, ZeRO-2 and ZeRO-3.

    Counts of the loss's mean that are given are those of the whole step. TokenMean(), which dapo()
    and bnpo() have, counts the tokens of TRL's optimizer step over all its micro-batches and
    processes, as TRL's "dapo" does. Every other mean is of the micro-batch, and the loss divided by
    the number of micro-batches.

    Of GRPOConfig, `loss_type`, `epsilon`, `epsilon_high`, `delta`, `importance_sampling_level`,
    `use_bias_correction_kl` and the parameters of single losses have no effect: policy_loss says
    all that. `beta` decides only whether there is a reference model. vLLM's importance ratios
    become the weights of the tokens.

    Logged are `entropy`, `kl`, `clip_ratio/low_mean`, `clip_ratio/high_mean` and
    `clip_ratio/region_mean`, TRL's extremes over sequences not; and `ratio_mean`, `ratio_max`,
    `clip_fraction_dual`, `unknown_fraction` and `zero_gradient_fraction`, which TRL has not.

    The load-balancing loss of a mixture of experts is the model's, not policy_loss's: it is added,
    and logged as `aux_loss`, as TRL does.

    Args:
        policy_loss: a PolicyLoss, or any function (TokenStats, TokenBatch) -> LossOutput.
        *args, **kwargs: as for trl.GRPOTrainer.

    Raises:
        ValueError: a KL penalty without a reference model; an option of GRPOConfig that adds to
            the loss or masks it (entropy bonus, top_entropy_quantile, off_policy_mask_threshold):
            those would be lost.
        RuntimeError: at the first step, a GRPOTrainer that does not call its fused head (TRL before
            1.15).
    """

    def __init__(self, *args: Any, policy_loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy_loss = policy_loss
        unsupported = {
            "entropy_coef": getattr(self, "_entropy_bonus_enabled", False),
            "top_entropy_quantile": self.top_entropy_quantile < 1,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
        }
        if lost := [name for name, is_set in unsupported.items() if is_set]:
            raise ValueError(f"FusedGRPOTrainer takes its loss from policy_loss, without {lost}")
        weight = getattr(getattr(policy_loss, "kl", None), "beta", 0)
        if self.beta == 0 and (isinstance(weight, Tensor) or weight != 0):
            raise ValueError(
                "policy_loss has a KL penalty, but GRPOConfig.beta is 0 and there is no reference "
                "model: set it to anything else, the weight is that of policy_loss"
            )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        with patched():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        batch = _batch(inputs)
        loss, divisor = self._of_step(inputs)
        formed: list[LossOutput] = []

        def formed_here(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
            at, rows = _scored(len(hidden), inputs["completion_mask"])
            part = batch.select(rows)
            output = linear_policy_loss(hidden[at], head, part, loss, temperature=temperature)
            formed.append(output)
            one = at[:1]
            value = output.loss.expand(len(one))
            return output.loss.new_zeros(len(hidden)).index_put((one,), value)

        reset = in_head.set(formed_here)
        try:
            carried, balance = self._logprobs_of(model, inputs)
        finally:
            in_head.reset(reset)
        if len(formed) != 1:
            import trl

            raise RuntimeError(
                f"the GRPOTrainer of TRL {trl.__version__} called its fused head {len(formed)} "
                "times in one forward, not once: FusedGRPOTrainer needs TRL 1.15 or 1.16"
            )
        self._log_metrics(formed[0].metrics, batch.num_tokens)
        return carried.sum() / divisor + self._balance(balance)

    def _balance(self, loss: Tensor | None) -> Tensor | float:
        """The load-balancing loss of a mixture of experts, as TRL adds it: a mean over the
        micro-batches.
        """
        if loss is None:
            return 0.0
        training = self.model.training
        log = self._metrics["train" if training else "eval"]
        log["aux_loss"].append(self.accelerator.gather_for_metrics(loss).mean().item())
        accumulated = self.current_gradient_accumulation_steps if training else 1
        return self.router_aux_loss_coef * loss / accumulated

    def _logprobs_of(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """[B, T]: what TRL takes for the log-probs of the completions; the load-balancing loss."""
        prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        # Pictures and what belongs to them go by the same names in the batch.
        names = inspect.signature(super()._get_per_token_logps_and_entropies).parameters
        more = {"compute_aux_loss": True} if self.aux_loss_enabled else {}
        found = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([prompt, completion], dim=1),
            mask,
            completion.shape[1],
            compute_entropy=True,
            **more,
            **{name: inputs[name] for name in names if name in inputs},
        )
        return found[0], found[2] if self.aux_loss_enabled else None

    def _of_step(self, inputs: dict[str, Any]) -> tuple[Loss, float]:
        """The loss of a micro-batch, and what it is divided by."""
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        mean = getattr(self.policy_loss, "mean", None)
        if any(getattr(mean, count, None) is not None for count in _COUNTS):
            return self.policy_loss, 1
        if not isinstance(mean, TokenMean):
            return self.policy_loss, accumulated
        # TRL counts the tokens of all that was generated, which may serve several steps.
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes
        if training:
            tokens = tokens * accumulated / self.args.steps_per_generation
        return replace(self.policy_loss, mean=TokenMean(tokens)), 1

    @torch.no_grad()
    def _log_metrics(self, metrics: dict[str, Tensor], count: Tensor) -> None:
        """Means over the tokens of all processes, with one wait for the device."""
        log = self._metrics["train" if self.model.training else "eval"]
        values = torch.stack([*metrics.values(), torch.ones_like(count)]).float() * count
        totals = self.accelerator.reduce(values, reduction="sum")
        means = dict(zip(metrics, (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True))
        # TRL's upper bound is that of gaining tokens; the losing ones have a name of their own.
        if "clip_fraction_dual" in means:
            means["clip_fraction_high"] -= means["clip_fraction_dual"]
        if "ratio_max" in means:
            means["ratio_max"] = self.accelerator.gather(metrics["ratio_max"]).max().item()
        for name, value in means.items():
            log[_LOGGED_AS.get(name, name)].append(value)
        if _LOGGED_AS.keys() <= means.keys():
            log["clip_ratio/region_mean"].append(sum(means[name] for name in _LOGGED_AS))


def _batch(inputs: dict[str, Any]) -> TokenBatch:
    """TRL's batch of completions, [B, T], as ours."""
    labels, mask = inputs["completion_ids"], inputs["completion_mask"]
    weights = inputs.get("importance_sampling_ratio")
    return TokenBatch.padded(
        labels,
        (mask * inputs.get("tool_mask", 1)).bool(),
        inputs["advantages"],
        old_logprobs=inputs.get("old_per_token_logps"),
        ref_logprobs=inputs.get("ref_per_token_logps"),
        weights=None if weights is None else weights.expand(labels.shape),
    )


def _scored(length: int, completion: Tensor) -> tuple[Tensor, Tensor]:
    """Where the completions' tokens are: among `length` rows of the head, and in [B * T].

    TRL gives the head either these tokens alone, or, where their number must not vary, all columns
    but the last of prompt and completion. A prompt may have become longer on the way.
    """
    B, T = completion.shape
    rows = completion.flatten().nonzero()[:, 0]
    if length == len(rows):
        return torch.arange(length, device=rows.device), rows
    columns, rest = divmod(length, B)
    if rest or columns < T:
        raise RuntimeError(f"TRL gave its head {length} tokens for {B} completions of {T}")
    return rows // T * columns + columns - T + rows % T, rows


@functools.cache
def fused_grpo_trainer() -> type:
    from trl import GRPOTrainer

    names = {"__module__": "fused_rl.integrations.trl", "__doc__": FusedLoss.__doc__}
    return type("FusedGRPOTrainer", (FusedLoss, GRPOTrainer), names)
