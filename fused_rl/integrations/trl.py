"""TRL's trainers on our head: one line to get in, one line to get out.

```python
from fused_rl.integrations.trl import patched

with patched():
    trainer.train()
```

`patch()` and `unpatch()` do the same without a block. They replace the one function that TRL's
fused language-model head calls, `_ChunkedLogProbFunction`, wherever TRL holds it; what is put back
is the object itself. Which trainers call it is TRL's choice:

    TRL 1.15, 1.16     GRPO, RLOO, KTO, DPO, SFT, asynchronous GRPO
    TRL 1.14           DPO, KTO and GRPO with use_liger_kernel=True; asynchronous GRPO
    TRL 1.12, 1.13     asynchronous GRPO

Policy and reference are always computed by one head: TRL's rounds logits to bfloat16 where ours
does not, and between the two equal weights would differ by some 3e-3 nats per token. So two things
stay with TRL's own function, as a whole: models whose head ZeRO-3 has sharded, which TRL gathers
again in its backward pass; and a DPO or KTO trainer with precompute_ref_log_probs=True, since its
reference log-probs may be from before patch(), or from a file. All other calls are ours. What only
DPO and KTO ask for, `log_sum_sq_probs` (use_weighting) and the `mean_logits` of a model with a
softcap (Gemma 2), takes a second pass over the weight, without gradient and in float32.

`is_top1`, from which SFT and DPO take their token accuracy, compares float32 logits, where TRL's
function compares those it rounded to the dtype of the model; and tokens that tie are all the most
likely one, of which TRL's function counts the first.

`FusedGRPOTrainer` is TRL's GRPOTrainer with any of our losses, formed with its gradients in one
pass, inside the model's forward:

```python
import fused_rl
from fused_rl.integrations.trl import FusedGRPOTrainer

trainer = FusedGRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=config,
    train_dataset=dataset,
    processing_class=tokenizer,
    policy_loss=fused_rl.dapo(),
)
trainer.train()
```
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_rl.linear.head import LMHead
from fused_rl.linear.logprobs import linear_top_logprobs
from fused_rl.losses.batch import TokenBatch
from fused_rl.losses.means import TokenMean
from fused_rl.losses.policy import Loss, LossOutput
from fused_rl.one_pass.policy_loss import linear_policy_loss
from fused_rl.ops import in_full
from fused_rl.reference import logits

_SEAM = "_ChunkedLogProbFunction"
_OPTIONS = ("targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
# What its forward takes after ctx and the hidden states: TRL 1.12; 1.13 and 1.14; 1.15 and 1.16.
_KNOWN = (
    ("weight", *_OPTIONS),
    ("weight", "bias", *_OPTIONS),
    ("weight", "bias", *_OPTIONS, "outputs"),
)
_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Logits that are held at once for what needs all of them: 64 MiB of float32.
_LOGITS = 2**24

# What a trainer of ours does in place of log-probs: (hidden [N, H], head, temperature) -> [N].
_InHead = Callable[[Tensor, LMHead, float], Tensor]
_in_head: ContextVar[_InHead | None] = ContextVar("fused_rl_in_head", default=None)
# Whether calls go to TRL's function meanwhile.
_with_theirs: ContextVar[bool] = ContextVar("fused_rl_with_theirs", default=False)


class _FusedHead:
    """Stands where TRL's autograd function stood, and is called as that was, by `apply`."""

    def __init__(self, original: Any, names: tuple[str, ...]) -> None:
        self.original = original
        self.names = names

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        """What the original returns: (logprobs [N], entropy [N]), and more where it says more."""
        given = dict(zip(self.names, args, strict=False))
        hidden, targets, temperature = given["hidden"], given["targets"], given["temperature"]
        softcap = given.get("final_logit_softcapping")
        scale = given.get("logit_scale", 1.0)
        outputs = given.get("outputs", _OUTPUTS if "outputs" in self.names else _OUTPUTS[:2])
        # A weight that ZeRO-3 has sharded has a ds_id.
        if _with_theirs.get() or hasattr(given["weight"], "ds_id"):
            return self.original.apply(*args)
        head = LMHead(given["weight"], given.get("bias"), scale, softcap)
        if in_head := _in_head.get():
            logprobs = in_head(hidden, head, temperature)
            entropy = top = torch.zeros_like(logprobs)
        else:
            logprobs, entropy, top = linear_top_logprobs(
                hidden, head, targets, temperature=temperature
            )
        if "outputs" not in self.names:
            return logprobs, entropy
        entropy = entropy if "entropy" in outputs else None
        is_top1 = logprobs == top if "is_top1" in outputs else None
        squares = mean = None
        if "log_sum_sq_probs" in outputs or ("mean_logits" in outputs and softcap is not None):
            squares, mean = _of_all_logits(hidden, head, temperature)
        elif "mean_logits" in outputs:
            mean = _mean_logits(hidden, head) / temperature
        squares = squares if "log_sum_sq_probs" in outputs else None
        mean = mean if "mean_logits" in outputs else None
        return logprobs, entropy, squares, mean, is_top1


@torch.no_grad()
def _mean_logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[N]: the mean over the vocabulary, from the mean of the weight's rows, without [N, V]."""
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.float() @ head.weight.mean(0, dtype=torch.float32)
    return head.scale * (mean if head.bias is None else mean + head.bias.float().mean())


@torch.no_grad()
def _of_all_logits(hidden: Tensor, head: LMHead, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum_v p_v^2 and the mean of the logits at temperature, [N] each.

    log sum p^2 = logsumexp(2 z) - 2 logsumexp(z); both, and the sum of z, are of parts of the
    vocabulary first.
    """
    V = len(head.weight)
    step = max(_LOGITS // max(len(hidden), 1), 1)
    at = torch.full(hidden.shape[:1], temperature, dtype=torch.float64, device=hidden.device)
    once, twice, total = [], [], 0.0
    formed = in_full(logits)
    for start in range(0, V, step):
        rows = slice(start, start + step)
        bias = None if head.bias is None else head.bias[rows]
        z = formed(hidden, head.weight[rows], bias, at, head.scale, head.softcap or 0.0)
        once.append(z.logsumexp(-1))
        twice.append((2 * z).logsumexp(-1))
        total = total + z.sum(-1)
    squares = torch.stack(twice).logsumexp(0) - 2 * torch.stack(once).logsumexp(0)
    return squares, total / V


_active: _FusedHead | None = None
# (class, name of a method, TRL's own), while patched.
_guarded: list[tuple[type, str, Callable]] = []


def patch() -> None:
    """Route TRL's fused head through linear_logprobs, until `unpatch`. A second call does nothing.

    Trainers that exist already are routed too.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a TRL whose head is not called in one of the ways that we know.
    """
    global _active
    if _active is None:
        _active = _find_seam()
        _swap(_active.original, _active)
        _guard_precomputed()


def unpatch() -> None:
    """Put TRL's own function back, the very object, wherever `patch` put ours."""
    global _active
    if _active is not None:
        _swap(_active, _active.original)
        _active = None
        for owner, name, theirs in _guarded:
            setattr(owner, name, theirs)
        _guarded.clear()


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for the length of a block; within a block, or after patch(), it changes nothing."""
    if _active is not None:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()


def _find_seam() -> _FusedHead:
    import trl

    original = getattr(importlib.import_module("trl.trainer.utils"), _SEAM, None)
    forward = getattr(original, "forward", None)
    names = tuple(inspect.signature(forward).parameters)[2:] if forward else None
    if names not in _KNOWN:
        found = "is not there" if names is None else f"takes {', '.join(names)}"
        raise RuntimeError(
            f"TRL {trl.__version__} is not one that fused_rl can patch: its trl.trainer.utils."
            f"{_SEAM} {found}. Versions 1.12 to 1.16 are known to work; use one of them, or TRL "
            "without the patch"
        )
    return _FusedHead(original, ("hidden", *names))


def _swap(old: object, new: object) -> None:
    """Every name in TRL's modules that is bound to `old` becomes one of `new`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trl" and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _guard_precomputed() -> None:
    """Trainers that compare with log-probs from a file do so with the head that made the file."""
    import trl

    for name in ("DPOTrainer", "KTOTrainer"):
        owner = getattr(trl, name, None)
        if not hasattr(owner, "_precompute_ref_logps"):
            continue
        for method in ("_precompute_ref_logps", "_compute_loss"):
            theirs = getattr(owner, method)
            _guarded.append((owner, method, theirs))
            setattr(owner, method, _by_trainer(theirs))


def _by_trainer(method: Callable) -> Callable:
    """The method, with TRL's own head throughout where the trainer's reference is precomputed."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        reset = _with_theirs.set(self.precompute_ref_logps)
        try:
            return method(self, *args, **kwargs)
        finally:
            _with_theirs.reset(reset)

    return call


# TRL's names for our metrics; the others keep theirs.
_LOGGED_AS = {
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
_COUNTS = ("num_tokens", "num_sequences", "num_rollouts")


class FusedLoss:
    """Gives a GRPOTrainer class our losses: `class Mine(FusedLoss, MyGRPOTrainer)`.

    The loss is formed in the model's forward, where the head's weight is whole, and leaves it as
    the log-prob of one token, 0 at the others: what wraps the model sees it among its outputs. It
    was tried on one process, without FSDP or DeepSpeed.

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
            1.15), or whose head ZeRO-3 has sharded.
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

        def in_head(hidden: Tensor, head: LMHead, temperature: float) -> Tensor:
            at, rows = _scored(len(hidden), inputs["completion_mask"])
            part = batch.select(rows)
            output = linear_policy_loss(hidden[at], head, part, loss, temperature=temperature)
            formed.append(output)
            one = at[:1]
            value = output.loss.expand(len(one))
            return output.loss.new_zeros(len(hidden)).index_put((one,), value)

        reset = _in_head.set(in_head)
        try:
            carried, balance = self._logprobs_of(model, inputs)
        finally:
            _in_head.reset(reset)
        if len(formed) != 1:
            import trl

            raise RuntimeError(
                f"the GRPOTrainer of TRL {trl.__version__} called its fused head {len(formed)} "
                "times in one forward, not once: FusedGRPOTrainer needs TRL 1.15 or 1.16, and a "
                "head that ZeRO-3 has not sharded"
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
def _fused_grpo_trainer() -> type:
    from trl import GRPOTrainer

    names = {"__module__": __name__, "__doc__": FusedLoss.__doc__}
    return type("FusedGRPOTrainer", (FusedLoss, GRPOTrainer), names)


def __getattr__(name: str) -> Any:
    """FusedGRPOTrainer, built when it is first asked for: only then is TRL imported."""
    if name == "FusedGRPOTrainer":
        return _fused_grpo_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
