"""TRL's GRPOTrainer and RLOOTrainer with their own loss, or any of ours, formed in the head."""

import functools
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_rl.integrations.trl import logged, options
from fused_rl.integrations.trl.forming import (
    Forming,
    StepLoss,
    batch_of,
    counted,
    for_theirs,
    rows_of,
)
from fused_rl.integrations.trl.logprobs import in_head
from fused_rl.integrations.trl.patching import patched
from fused_rl.integrations.trl.replay import KEY, Replay, Scoring, with_kept_sets
from fused_rl.losses.means import TokenMean
from fused_rl.losses.policy import Loss

_COUNTS = ("num_tokens", "num_sequences", "num_rollouts")
_NEEDED = ("completion_ids", "completion_mask", "advantages")
# How far a gradient may be from TRL's, of the same log-probs, as a share of it.
_SAME = 1e-3


class FusedLoss:
    """Gives a GRPOTrainer class our losses: `class Mine(FusedLoss, MyGRPOTrainer)`.

    The loss is formed in the model's forward, where the head's weight is whole, and leaves it as
    the log-prob of one token, 0 at the others: what wraps the model sees it among its outputs. On
    two processes it takes the steps of TRL's own trainer under DDP, FSDP2, ZeRO-2 and ZeRO-3.
    TRL's own _compute_loss is then called with the log-probs and entropies, without gradient, for
    what it logs and keeps.

    Without policy_loss the loss is the one that GRPOConfig describes, and the steps are TRL's:
    loss_type, epsilon, epsilon_high, delta, importance_sampling_level, beta,
    use_bias_correction_kl, the temperatures of sapo and the k and lambda of vespo. At the first
    step its gradient with respect to log-probs and entropies is compared with TRL's own.

    With policy_loss those have no effect; `beta` decides whether there is a reference model. Counts
    of the loss's mean that are given are those of the whole step. TokenMean(), which dapo() and
    bnpo() have, counts the tokens of TRL's optimizer step over all its micro-batches and processes,
    as TRL's "dapo" does. Every other mean is of the micro-batch, and the loss divided by the number
    of micro-batches.

    Of either are these options of GRPOConfig, as TRL has them:

        top_entropy_quantile         which surrogates count, by TRL's own methods; the KL of all
        off_policy_mask_threshold    tokens does. A policy_loss that is a function finds them as
                                     weights of 0
        entropy_coef, adaptive       a bonus of the mean entropy, beside the policy loss's own
        vLLM's importance ratios     weights of the tokens; part of the ratio in TRL's vespo
        router_aux_loss_coef         added, and logged as `aux_loss`

    A rollout_func may return "sampling_mask", the kept sets of an engine's top-k and top-p
    (integrations/trl/replay.py): log-probs of the policy, the old policy and the reference are then
    over these sets, as the logprobs that it returns must be.

    Cost in multiples of N H V: 6 where the loss is a sum over tokens; 8 where ratios are of
    sequences (importance_sampling_level="sequence", vespo, RLOO). With either mask 2, and 6 for the
    tokens that keep a gradient: with top_entropy_quantile=0.2 and no KL 3.2. With a frozen head 4.

    Without policy_loss TRL's metrics are TRL's. With one, `kl`, `clip_ratio/low_mean`, `high_mean`,
    `region_mean` and the extremes over sequences `low_min` and `high_max` are those of policy_loss;
    means count tokens, where TRL's count sequences if ratios are theirs. Beside them are
    `ratio_mean`, `ratio_max`, `clip_fraction_dual`, `unknown_fraction` and
    `zero_gradient_fraction`, which TRL has not.

    RLOOTrainer has batches with the old policy's log-probs of whole completions, and its KL in the
    reward: a policy_loss has ratio=ProductRatio() or GeometricRatio(), or is gpg(), and no KL; the
    number of tokens of the step is not known, and TokenMean() is of the micro-batch.

    Args:
        policy_loss: a PolicyLoss, or any function (TokenStats, TokenBatch) -> LossOutput; None: the
            loss of the trainer's config.
        *args, **kwargs: as for trl.GRPOTrainer.

    Raises:
        ValueError: a loss_type that is not known; no policy_loss for a trainer with a loss of its
            own (GMPOTrainer); a KL penalty without a reference model; a policy_loss that needs what
            RLOOTrainer has not.
        RuntimeError: a TRL whose trainer does not form its loss in the known way: what has moved is
            named. At the first step: one that does not call its fused head (TRL before 1.15); one
            whose loss, of the same config, has another gradient than ours.
    """

    _forming: Forming | None = None
    # Of the generation that is being scored.
    _replay: Replay | None = None

    def __init__(self, *args: Any, policy_loss: Loss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kind, its_own = options.kind_of(self, FusedLoss)
        takes = tuple(inspect.signature(super()._compute_loss).parameters)
        if takes != ("model", "inputs"):
            raise options.moved(f"_compute_loss takes {', '.join(takes)}")
        if policy_loss is None and not its_own:
            raise ValueError(
                f"{type(self).__name__} has a loss of its own, which its config does not say: give "
                "policy_loss"
            )
        self._of_config = self._kind.loss(self) if policy_loss is None else None
        # Whether its gradient was found to be TRL's.
        self._proved = False
        self.policy_loss = self._of_config if policy_loss is None else policy_loss
        options.is_possible(self.policy_loss, self, self._kind)

    def _generate(self, *args: Any, **kwargs: Any) -> tuple:
        found = super()._generate(*args, **kwargs)
        self._replay = Replay.taken_from(found)
        return found

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            output = super()._generate_and_score_completions(*args, **kwargs)
            if self._replay is not None:
                output[KEY] = list(self._replay.masks)
            return output
        finally:
            self._replay = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        theirs, forming = super()._get_per_token_logps_and_entropies, self._forming
        asked = inspect.signature(theirs).bind(*args, **kwargs).arguments
        in_place = forming or (self._replay and self._scoring(asked))
        with patched():
            reset = in_head.set(in_place.in_head if in_place else None)
            try:
                found = theirs(*args, **kwargs)
            finally:
                in_head.reset(reset)
        if forming is None:
            return found
        if forming.calls != 1:
            raise _called("its fused head", forming.calls, "in one forward")
        forming.carried, forming.rest = found[0], found[2:]
        values = forming.values()
        if self._is_trls and not self._proved and torch.is_grad_enabled():
            values = tuple(value.requires_grad_() for value in values)
        forming.given = values
        return (*values, *found[2:])

    def _scoring(self, asked: dict[str, Any]) -> Scoring:
        names = ("input_ids", "attention_mask", "logits_to_keep")
        if lacking := [name for name in names if name not in asked]:
            raise options.moved(f"_get_per_token_logps_and_entropies takes no {', '.join(lacking)}")
        return self._replay.scoring(*(asked[name] for name in names), asked.get("batch_size"))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if lacking := [name for name in _NEEDED if name not in inputs]:
            raise options.moved(f"batches have no {', '.join(lacking)}")
        batch = batch_of(inputs, with_old=not options.without_ratio(self.policy_loss))
        loss, batch = self._of_step(inputs, with_kept_sets(batch, inputs))
        log = logged.log_of(self)
        before = logged.lengths(log)
        self._forming = forming = Forming(inputs, batch, loss)
        try:
            theirs = super()._compute_loss(model, for_theirs(inputs))
        finally:
            self._forming = None
        if forming.carried is None:
            raise _called("_get_per_token_logps_and_entropies", 0, "for its loss")
        if forming.given[0].requires_grad and not forming.is_held:
            self._prove(theirs, forming)
        if self._is_trls:
            logged.beside_theirs(self, loss, batch.num_tokens)
        else:
            logged.in_place_of_theirs(self, loss, batch.num_tokens, before)
        return forming.carried.sum() + self._balance(forming)

    def _balance(self, forming: Forming) -> Tensor | float:
        """The load-balancing loss of a mixture of experts, which TRL has logged."""
        if not self.aux_loss_enabled:
            return 0.0
        return self.router_aux_loss_coef * forming.rest[0] / self._accumulated

    @property
    def _is_trls(self) -> bool:
        """Whether the loss is that of TRL's config."""
        return self.policy_loss is self._of_config

    @property
    def _accumulated(self) -> int:
        """How many micro-batches _compute_loss divides by."""
        divides = self.model.training and self._kind.accumulates
        return self.current_gradient_accumulation_steps if divides else 1

    def _of_step(self, inputs: dict[str, Any], batch: Any) -> tuple[StepLoss, Any]:
        """The loss of a micro-batch, and the batch as it takes it."""
        loss, divisor = self._counted(inputs)
        if isinstance(getattr(loss, "ratio", None), options.RolloutRatio):
            ratios = inputs.get("importance_sampling_ratio")
            loss = replace(loss, ratio=options.RolloutRatio.of(ratios))
            batch = replace(batch, weights=None)
        of_step = StepLoss(
            policy=loss,
            divisor=divisor,
            bonus=options.entropy_coef(self) / self._accumulated,
            masks=options.Masks(self, inputs, counted(inputs)),
            rows=rows_of(inputs["completion_mask"]),
            shape=tuple(inputs["completion_mask"].shape),
        )
        return of_step, batch

    def _counted(self, inputs: dict[str, Any]) -> tuple[Loss, float]:
        """The policy loss with the counts of the step, and what it is divided by."""
        mean = getattr(self.policy_loss, "mean", None)
        if any(getattr(mean, count, None) is not None for count in _COUNTS):
            return self.policy_loss, 1
        of_step = isinstance(mean, TokenMean) and not isinstance(mean, options.MicroBatchMean)
        if not of_step or "num_items_in_batch" not in inputs:
            return self.policy_loss, self._accumulated
        # TRL counts the tokens of all that was generated, which may serve several steps.
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self._accumulated / self.args.steps_per_generation
        return replace(self.policy_loss, mean=TokenMean(tokens)), 1

    def _prove(self, theirs: Tensor, forming: Forming) -> None:
        """That TRL's loss has the gradient of ours, by the numbers of every token."""
        expected = torch.autograd.grad(
            theirs, forming.given, allow_unused=True, materialize_grads=True
        )
        both = zip(forming.loss.gradients(), expected, strict=True)
        error = torch.stack([(ours - of_trl).norm() for ours, of_trl in both]).norm()
        size = torch.stack([of_trl.norm() for of_trl in expected]).norm()
        if error > _SAME * size:
            raise options.moved(
                f"loss has another gradient than fused_rl's of the same {self._kind.config} "
                f"({(error / size).item():.2g} of it, by log-probs and entropies)"
            )
        # Advantages of 0 prove nothing.
        self._proved = bool(size > 0)


def _called(what: str, times: int, when: str) -> RuntimeError:
    import trl

    return RuntimeError(
        f"the trainer of TRL {trl.__version__} called {what} {times} times {when}, not once: "
        "fused_rl forms the losses of TRL 1.15 and 1.16"
    )


def _fused(name: str) -> type:
    import trl

    names = {"__module__": "fused_rl.integrations.trl", "__doc__": FusedLoss.__doc__}
    return type(f"Fused{name}", (FusedLoss, getattr(trl, name)), names)


@functools.cache
def fused_grpo_trainer() -> type:
    """FusedLoss of TRL's GRPOTrainer."""
    return _fused("GRPOTrainer")


@functools.cache
def fused_rloo_trainer() -> type:
    """FusedLoss of TRL's RLOOTrainer."""
    return _fused("RLOOTrainer")
