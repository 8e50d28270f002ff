"""The names of verl, OpenRLHF and prime-rl against plain formulas; none of the three is run here.

verl itself runs beside them in test_verl_parity.py, where it is installed. What stands in for it in
the tests of patch() are empty modules with its names in its places.
"""

import math
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_rl.integrations import verl
from fused_rl.integrations.verl import kl_penalties

B, T, V, H = 4, 6, 19, 8


def leaves(dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels."""
    hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (B, T))


def plain(hidden, weight, labels, temperature=1.0) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def assert_same(ours, theirs, inputs) -> None:
    """Values, and the gradients of a random combination of them."""
    coefficients = [torch.randn_like(t) for t in theirs]
    torch.testing.assert_close(tuple(ours), tuple(theirs))
    gradients = [
        torch.autograd.grad(
            sum((c * t).sum() for c, t in zip(coefficients, ts, strict=True)), inputs
        )
        for ts in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)


def config(**options) -> SimpleNamespace:
    """What the losses read of verl's actor config, with its defaults."""
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}
    defaults |= {"clip_ratio_c": 3.0, "tau_pos": 1.0, "tau_neg": 1.05, "global_batch_info": {}}
    defaults |= {"policy_loss": SimpleNamespace(**options.pop("policy_loss", {}))}
    return SimpleNamespace(**(defaults | options))


# The head.


@pytest.mark.parametrize("shape", [(B * T,), (B, T)])
def test_linear_cross_entropy(shape):
    hidden, weight, labels = leaves()
    states, labels = hidden.reshape(*shape, H), labels.reshape(shape)
    ours = verl.linear_cross_entropy(states, weight, labels, 0.7)
    assert_same(ours, [t.flatten() for t in plain(states, weight, labels, 0.7)], (hidden, weight))


@pytest.mark.parametrize(
    ("states_in", "labels_in"),
    [((B, T), (B * T,)), ((B * T,), (B, T)), ((B * T, 1), (1, B * T)), ((1, B * T), (B * T, 1))],
)
def test_leading_dimensions_are_flattened_each_by_itself(states_in, labels_in):
    hidden, weight, labels = leaves()
    expected = [t.flatten() for t in plain(hidden, weight, labels)]
    ours = verl.linear_cross_entropy(
        hidden.reshape(*states_in, H), weight, labels.reshape(labels_in)
    )
    assert_same(ours, expected, (hidden, weight))


def test_a_temperature_per_label():
    hidden, weight, labels = leaves()
    temperature = 0.5 + torch.rand(B, 1, dtype=torch.float64)
    expected = [t.flatten() for t in plain(hidden, weight, labels, temperature[..., None])]
    ours = verl.linear_cross_entropy(hidden, weight, labels, temperature)
    assert_same(ours, expected, (hidden, weight))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_are_of_the_log_probs(reduction):
    hidden, weight, labels = leaves()
    logprobs, entropy = plain(hidden, weight, labels)
    ours = verl.linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    assert_same(ours, (getattr(logprobs, reduction)(), entropy.flatten()), (hidden, weight))


def test_what_linear_cross_entropy_refuses():
    hidden, weight, labels = leaves()
    with pytest.raises(ValueError, match="got 'batchmean'"):
        verl.linear_cross_entropy(hidden, weight, labels, reduction="batchmean")
    with pytest.raises(ValueError, match=r"one state per label.*\[4, 6, 8\].*labels \[4\]"):
        verl.linear_cross_entropy(hidden, weight, labels[:, 0])
    with pytest.raises(ValueError, match=r"pair states with labels of other tokens"):
        verl.linear_cross_entropy(hidden.transpose(0, 1), weight, labels)


@pytest.mark.parametrize("world", [2, 4])
def test_a_vocabulary_that_is_split_over_ranks(ranks, world):
    """Values, the sum over ranks of dhidden, and dweight: verl's contract."""
    for differences in ranks(world).run("cases_doors", "of_verl"):
        assert max(differences) < 1e-12


def test_a_label_outside_a_split_vocabulary_is_an_error_of_every_rank(ranks):
    for said in ranks(2).run("cases_doors", "of_verl_outside"):
        assert "outside the vocabulary [0, 12)" in said


def test_a_group_of_one_rank_is_no_group(monkeypatch):
    hidden, weight, labels = leaves()
    monkeypatch.setattr(torch.distributed, "get_world_size", {"the group": 1}.get)
    given = (hidden, weight, labels, 1.0, "none", "the group")
    expected = [t.flatten() for t in plain(hidden, weight, labels)]
    assert_same(verl.linear_cross_entropy(*given), expected, (hidden, weight))


@pytest.mark.parametrize("chunk_size", [1, 5, 512])
def test_fused_linear_for_ppo(chunk_size):
    hidden, weight, labels = leaves()
    head = verl.FusedLinearForPPO(chunk_size, impl_backend="liger" if chunk_size == 5 else "torch")
    assert not list(head.parameters())
    ours = head(hidden, weight, labels.int(), temperature=1.3)
    assert_same(ours, plain(hidden, weight, labels, 1.3), (hidden, weight))


def test_a_backend_that_is_none():
    with pytest.raises(ValueError, match=r"impl_backend must be one of .* got 'triton'"):
        verl.FusedLinearForPPO(impl_backend="triton")


def test_entropies_of_bfloat16_states_are_float32():
    hidden, weight, labels = (t.bfloat16() if t.is_floating_point() else t for t in leaves())
    expected = plain(hidden.double(), weight.double(), labels)
    ours = verl.FusedLinearForPPO()(hidden, weight, labels)
    assert all(t.dtype == torch.float32 for t in ours)
    torch.testing.assert_close(tuple(ours), tuple(t.float() for t in expected))


# KL.

K = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.exp(-d) - 1 + d,
}
NAMES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2"}
NAMES |= {"low_var_kl": "k3", "k3": "k3"}


@pytest.mark.parametrize("straight", ["", "+"])
@pytest.mark.parametrize("name", NAMES)
def test_kl_penalty(name, straight):
    logprob = torch.randn(B, T, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(B, T, dtype=torch.float64)
    d = logprob - ref
    value = K[NAMES[name]](d)
    through = K["k2"](d) if straight else value
    ours = verl.kl_penalty(logprob, ref, name + straight)
    torch.testing.assert_close(ours, value)
    gradients = (torch.autograd.grad(x.sum(), logprob) for x in (ours, through))
    torch.testing.assert_close(*gradients)


def test_k3_of_a_token_that_the_reference_likes_far_more():
    """At d = -3 verl's value of 16.1 is held at 10, without a gradient; ours is 16.1 and pulls."""
    logprob = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    ours = verl.kl_penalty(logprob, torch.zeros_like(logprob), "low_var_kl")
    e3 = torch.tensor(3.0, dtype=torch.float64).exp().item()
    assert ours.item() == pytest.approx(e3 - 4)
    assert torch.autograd.grad(ours, logprob)[0].item() == pytest.approx(1 - e3)


@pytest.mark.parametrize("name", ["k4", "k3++", "", "+"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="kl_penalty must be one of"):
        verl.kl_penalty(torch.zeros(1), torch.zeros(1), name)


@pytest.mark.parametrize("held", [2**24, 20])
def test_full_is_the_exact_kl_of_logits(monkeypatch, held):
    """In one chunk and in several; by the formula, in value and in both models' gradients."""
    monkeypatch.setattr(kl_penalties, "_LOGITS", held)
    logits = [torch.randn(B, T, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours = verl.kl_penalty(*logits, "full")
    s, t = (torch.log_softmax(z, -1) for z in logits)
    exact = (s.exp() * (s - t)).sum(-1)
    torch.testing.assert_close(ours, exact)
    upstream = torch.randn(B, T, dtype=torch.float64)
    gradients = (torch.autograd.grad(x, logits, upstream) for x in (ours, exact))
    torch.testing.assert_close(*gradients)


def test_full_is_what_the_estimators_estimate():
    """The mean of k1 and of k3 over the policy's own distribution, of every entry once."""
    logits = [torch.randn(B, T, 9, dtype=torch.float64) for _ in range(2)]
    exact = verl.kl_penalty(*logits, "full")
    s, t = (torch.log_softmax(z, -1) for z in logits)
    for name in ("k1", "k3"):
        torch.testing.assert_close((s.exp() * verl.kl_penalty(s, t, name)).sum(-1), exact)


def test_full_of_distributions_that_hardly_differ():
    """Of 5e-7 nats in float32, to 1e-3 of itself; a sum of s (log s - log t) is off by 1e-2."""
    logits = torch.randn(B, T, 2000)
    other = logits + 1e-3 * torch.randn(B, T, 2000)
    s, t = (torch.log_softmax(z.double(), -1) for z in (logits, other))
    exact = (s.exp() * (s - t)).sum(-1)
    plain = torch.log_softmax(logits, -1)
    plain = (plain.exp() * (plain - torch.log_softmax(other, -1))).sum(-1)
    errors = [
        ((x - exact).abs() / exact).max() for x in (verl.kl_penalty(logits, other, "full"), plain)
    ]
    assert errors[0] < 1e-3 and errors[1] > 1e-2 and 3e-7 < exact.mean() < 7e-7


def test_entries_that_are_ruled_out():
    """On both sides they add nothing; where the reference alone has none, the KL is infinite."""
    logits = torch.randn(1, 2, 5, dtype=torch.float64)
    ruled_out = torch.tensor([0.0, 0, 0, 0, -torch.inf], dtype=torch.float64)
    policy, ref = (logits + ruled_out).requires_grad_(), logits.flip(1) + ruled_out
    ours = verl.kl_penalty(policy, ref, "full")
    torch.testing.assert_close(ours, verl.kl_penalty(policy[..., :4], ref[..., :4], "full"))
    (gradient,) = torch.autograd.grad(ours.sum(), policy)
    assert gradient.isfinite().all() and not gradient[..., 4].any()
    assert verl.kl_penalty(logits, ref, "full").isinf().all()


def test_full_is_not_of_log_probs():
    """Which verl's trainers give every estimator."""
    for shapes in (((B, T), (B, T)), ((B, T, 3), (B, T, 4))):
        with pytest.raises(ValueError, match=r"logits \[B, T, V\] of both models"):
            verl.kl_penalty(*(torch.zeros(shape) for shape in shapes), "full")
    with pytest.raises(ValueError, match="kl_penalty must be one of"):
        verl.kl_penalty(torch.zeros(B, T, 3), torch.zeros(B, T, 3), "full+")


# Policy losses.


def rollout(advantages_per_token: bool = False) -> dict[str, Tensor]:
    """Sequences of 6, 3, 0 and 5 tokens, with garbage outside the mask."""
    mask = (torch.arange(T) < torch.tensor([T, 3, 0, 5])[:, None]).long()
    new = -torch.rand(B, T, dtype=torch.float64) * 3
    old = new + 0.4 * torch.randn(B, T, dtype=torch.float64)
    # One ratio beyond the dual clip where A < 0.
    old[0, 0] = new[0, 0] - 2
    per_token = torch.randn(B, T, dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.5, 1.0, 0.5], dtype=torch.float64)[:, None].expand(B, T)
    old = old.where(mask.bool(), -900.0)
    return {
        "old_log_prob": old,
        "log_prob": new.requires_grad_(),
        "advantages": per_token if advantages_per_token else advantages,
        "response_mask": mask,
    }


def matrices(name: str, given: dict[str, Tensor], low: float, high: float) -> Tensor:
    """[B, T]: the loss of each token, as the papers have it."""
    mask = given["response_mask"].bool()
    logp, A = given["log_prob"], given["advantages"]
    d = (logp - given["old_log_prob"]).where(mask, 0)
    tokens = mask.sum(-1, keepdim=True).clamp(min=1)
    if name == "gpg":
        return -A * logp
    if name == "cispo":
        return -d.exp().clamp(1 - low, 1 + high).detach() * A * logp
    if name == "sapo":
        tau = torch.where(A > 0, 1.0, 1.05).double()
        return -torch.sigmoid(tau * (d.exp() - 1)) * 4 / tau * A
    if name == "geo_mean":
        cut = torch.sign(A) * torch.minimum(torch.sign(A) * d, torch.sign(A) * d.clamp(-low, high))
        return (-A * torch.exp(cut.sum(-1, keepdim=True) / tokens)).expand(B, T)
    if name == "gspo":
        d = (logp - logp.detach()).where(mask, 0) + d.detach().sum(-1, keepdim=True) / tokens
    r = d.exp()
    losses = torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + high))
    if name == "vanilla":
        losses = torch.where(A < 0, torch.minimum(losses, -3.0 * A), losses)
    return losses


def aggregated(name: str, losses: Tensor, mask: Tensor, mode: str, scale: float = T) -> Tensor:
    """verl 0.9.1's means: GMPO's is over all rows, the others' over those that have a token."""
    losses = losses.where(mask.bool(), 0)
    # Those of two losses are their own.
    mode = "seq-mean-token-mean" if name in ("sapo", "geo_mean") else mode
    if mode == "token-mean":
        return losses.sum() / mask.sum()
    if mode == "token-sum":
        return losses.sum()
    sums = losses.sum(-1)
    if mode == "seq-mean-token-mean":
        sums = sums / mask.sum(-1).clamp(min=1)
    rows = len(mask) if name == "geo_mean" else 3
    return sums.sum() / rows / (scale if mode.endswith("norm") else 1)


MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
MODES += ["token-sum"]
NAMED = ["vanilla", "gspo", "geo_mean", "cispo", "sapo", "gpg"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMED)
def test_policy_losses(name, mode):
    given = rollout(advantages_per_token=name in ("vanilla", "gspo", "gpg"))
    loss, metrics = verl.policy_losses[name](
        **given, loss_agg_mode=mode, config=config(clip_ratio_high=0.28)
    )
    expected = aggregated(name, matrices(name, given, 0.2, 0.28), given["response_mask"], mode)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    pair = (torch.autograd.grad(x, given["log_prob"])[0] for x in (loss, expected))
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-9)
    mask = given["response_mask"].bool()
    if name == "gpg":
        assert metrics == {}
        return
    kl = (given["old_log_prob"] - given["log_prob"])[mask].mean().item()
    assert metrics["actor/ppo_kl"] == pytest.approx(kl)
    assert 0 <= metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"] <= 1


def test_rollout_weights_multiply_and_counts_are_of_the_step():
    given = rollout()
    weights = torch.rand(B, T, dtype=torch.float64)
    mask = given["response_mask"]
    losses = weights * matrices("vanilla", given, 0.2, 0.2)
    info = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 12, "loss_scale_factor": 9}
    expected = {
        "token-mean": losses[mask.bool()].sum() / 40 * 2,
        "token-sum": losses[mask.bool()].sum() * 2,
        "seq-mean-token-sum": losses[mask.bool()].sum() / 12 * 2,
        "seq-mean-token-sum-norm": losses[mask.bool()].sum() / 12 * 2 / 9,
    }
    for mode, value in expected.items():
        loss, _ = verl.policy_losses["vanilla"](
            **given,
            loss_agg_mode=mode,
            config=config(global_batch_info=info),
            rollout_is_weights=weights,
        )
        torch.testing.assert_close(loss, value)


def test_ranks_need_the_counts_that_they_share():
    for mode, name in [
        ("token-mean", "batch_num_tokens"),
        *((mode, "global_batch_size") for mode in MODES[1:4]),
    ]:
        with pytest.raises(ValueError, match=f"{name} is required when dp_size > 1"):
            verl.policy_losses["vanilla"](
                **rollout(), loss_agg_mode=mode, config=config(global_batch_info={"dp_size": 2})
            )


def test_gmpo_takes_the_geometric_mean_of_rollout_weights():
    """Two tokens of weights 1 and 4 have the weight 2, whatever each token's own."""
    weights = torch.tensor([[1.0, 4.0, 99.0]])
    given = (torch.zeros(1, 3), torch.tensor([[0.1, 0.3, 5.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    mask = torch.tensor([[1, 1, 0]])
    loss, _ = verl.policy_losses["geo_mean"](
        *given, mask, config=config(), rollout_is_weights=weights
    )
    # The second log-ratio counts as the bound, 0.2.
    assert loss.item() == pytest.approx(-2 * math.exp(0.15))


@pytest.mark.parametrize("name", NAMED)
def test_a_token_whose_old_log_prob_is_not_known(name):
    """It is as if nothing had moved there, in the loss and in what is reported."""
    given = rollout()
    options = {"config": config(), "rollout_is_weights": torch.ones(B, T, dtype=torch.float64)}
    given["old_log_prob"][0, 1] = given["log_prob"][0, 1].detach()
    expected, metrics = verl.policy_losses[name](**given, **options)
    given["old_log_prob"][0, 1] = options["rollout_is_weights"][0, 1] = torch.nan
    loss, found = verl.policy_losses[name](**given, **options)
    torch.testing.assert_close(loss, expected)
    assert found == pytest.approx(metrics)


def ratios(name: str, **options) -> dict[str, float]:
    """Metrics at the ratios 1.5, 0.5, 1, 4 and 0.5 with A = 1, -1, 1, -1, 1; a token of ratio 9
    does not count.
    """
    new = torch.tensor([[1.5, 0.5, 1.0, 4.0, 0.5, 9.0]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    given = (torch.zeros(1, 6), new - 3 * (name in PROBABILITIES), advantages, mask)
    old = given[0] - 3 * (name in PROBABILITIES)
    return verl.policy_losses[name](old, *given[1:], config=config(**options))[1]


# Losses that look at probabilities, which must be below 1.
PROBABILITIES = ("dppo_tv", "dppo_kl")
# e^-3 = 0.05 times the ratios: probabilities move by 0.025, -0.025, 0, 0.15, -0.025.
FRACTIONS = {
    # Above with A > 0, below with A < 0; the dual clip apart.
    "vanilla": (2 / 5, 1 / 5),
    "cispo": (4 / 5, 0.0),
    "sapo": (0.0, 0.0),
    # |log ratio| > 0.2, by the sign of A alone.
    "geo_mean": (2 / 5, 2 / 5),
    # Beyond 0.02 in the direction of A; the ratio of 4 is within, and cut at 3.
    "dppo_tv": (2 / 5, 1 / 5),
}


@pytest.mark.parametrize("name", FRACTIONS)
def test_the_clipped_fractions_by_hand(name):
    bounds = {"clip_ratio": 0.02} if name == "dppo_tv" else {}
    metrics = ratios(name, **bounds)
    mean = -math.log(1.5 * 0.5 * 4 * 0.5) / 5
    assert metrics["actor/ppo_kl"] == pytest.approx(mean)
    clipped, lower = FRACTIONS[name]
    assert metrics["actor/pg_clipfrac"] == pytest.approx(clipped)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(lower)


def test_losses_that_report_a_divergence_alone():
    signed = -math.log(1.5 * 0.5 * 4 * 0.5) / 5
    absolute = (math.log(1.5) + 2 * math.log(2) + math.log(4)) / 5
    assert ratios("dro", policy_loss={"dro_beta": 0.1}) == {"actor/ppo_kl": pytest.approx(signed)}
    assert ratios("kl_cov") == {"actor/ppo_kl": pytest.approx(absolute)}
    assert ratios("gpg") == {}


def test_dro_needs_its_weight():
    with pytest.raises(ValueError, match="dro_beta must be positive, got 0"):
        ratios("dro")


def test_the_loss_of_a_dual_clip_by_hand():
    """Of four tokens one is above the bound with A > 0, one below with A < 0, one beyond 3."""
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 0.5, 1.0, 4.0]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, metrics = verl.policy_losses["vanilla"](
        old, new, advantages, torch.ones(1, 4), config=config()
    )
    assert loss.item() == pytest.approx((-1.2 + 0.8 - 1 + 3) / 4)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(2 / 4)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(1 / 4)


def test_a_mode_that_is_none():
    with pytest.raises(ValueError, match="got 'mean'"):
        verl.policy_losses["gpg"](**rollout(), loss_agg_mode="mean", config=config())


# patch()


@pytest.fixture
def a_verl(monkeypatch) -> SimpleNamespace:
    """Modules with verl's names in verl's places."""
    names = ["verl", "verl.utils", "verl.utils.kernel", "verl.utils.kernel.linear_cross_entropy"]
    names += ["verl.utils.experimental", "verl.utils.experimental.torch_functional"]
    names += ["verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos", "verl.models"]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = SimpleNamespace(
        kernel=modules["verl.utils.kernel.linear_cross_entropy"],
        functional=modules["verl.utils.experimental.torch_functional"],
        core=modules["verl.trainer.ppo.core_algos"],
        models=modules["verl.models"],
    )
    modules["verl"].__version__ = "9.9.9"

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, temperature, reduction, dist_process_group):
            """Of verl 0.8 and later."""

    class FusedLinearForPPO(torch.nn.Module):
        """Of verl 0.8 and 0.9.0."""

        def __init__(self, chunk_size=512):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            """Nothing."""

    found.Function = Head
    found.kernel.linear_cross_entropy = Head.apply
    found.functional.FusedLinearForPPO = found.models.Head = FusedLinearForPPO
    found.core.POLICY_LOSS_REGISTRY = {"kl_cov": len}
    yield found
    verl.unpatch()


def test_patch_and_unpatch(a_verl):
    before = (a_verl.kernel.linear_cross_entropy, a_verl.functional.FusedLinearForPPO)
    verl.patch()
    verl.patch()
    assert a_verl.kernel.linear_cross_entropy is verl.linear_cross_entropy
    assert a_verl.functional.FusedLinearForPPO is a_verl.models.Head is verl.FusedLinearForPPO
    # A name that verl binds while ours is in place.
    a_verl.models.late = a_verl.kernel.linear_cross_entropy
    registry = a_verl.core.POLICY_LOSS_REGISTRY
    assert registry["kl_cov"] is len
    assert registry["fused_vanilla"] is verl.policy_losses["vanilla"]
    assert len(registry) == 1 + len(verl.policy_losses)
    verl.unpatch()
    verl.unpatch()
    assert a_verl.kernel.linear_cross_entropy is before[0]
    assert a_verl.functional.FusedLinearForPPO is a_verl.models.Head is before[1]
    assert a_verl.models.late is before[0]
    assert registry == {"kl_cov": len}


def test_a_verl_that_calls_otherwise_is_an_error_and_stays_as_it_is(a_verl):
    """Each of the three places, with an argument that we do not know."""

    def forward(ctx, hidden, weight, labels, temperature, dist_process_group):
        """Without a reduction."""

    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, weights):
        """With another name at the end."""

    theirs = a_verl.functional.FusedLinearForPPO
    a_verl.core.POLICY_LOSS_REGISTRY["vanilla"] = loss
    with pytest.raises(RuntimeError, match=r"verl 9.9.9 .*'vanilla' takes .* weights\), not"):
        verl.patch()
    a_verl.Function.forward = staticmethod(forward)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy takes \(hidden.*0.9.1 are known"):
        verl.patch()
    assert a_verl.functional.FusedLinearForPPO is theirs
    assert len(a_verl.core.POLICY_LOSS_REGISTRY) == 2


def test_a_verl_that_moved_is_an_error_and_stays_as_it_is(a_verl):
    before = a_verl.kernel.linear_cross_entropy
    del a_verl.core.POLICY_LOSS_REGISTRY
    with pytest.raises(RuntimeError, match=r"verl 9.9.9 has no POLICY_LOSS_REGISTRY in verl\."):
        verl.patch()
    assert a_verl.kernel.linear_cross_entropy is before


def test_without_verl_patch_is_an_error(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(RuntimeError, match="is verl installed"):
        verl.patch()


# OpenRLHF and prime-rl.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(temperature):
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    before = logits.detach().clone()
    labels = torch.randint(0, V, (B, T))
    logp = torch.log_softmax(logits / temperature, -1).gather(-1, labels[..., None])[..., 0]
    ours = verl.log_probs_from_logits(logits, labels, temperature)
    assert_same((ours,), (logp,), (logits,))
    assert torch.equal(logits.detach(), before)


def test_fused_output_linear():
    """A temperature per token; the weight is the module's, and trained."""
    hidden, weight, labels = leaves()
    head = verl.FusedOutputLinear(H, V, 4).double()
    head.weight = torch.nn.Parameter(weight.detach())
    assert head.bias is None
    temperature = 0.5 + torch.rand(B, T, dtype=torch.float64)
    out = head(hidden, labels, temperature)
    assert list(out) == ["logprobs", "entropy"]
    expected = plain(hidden, head.weight, labels, temperature[..., None])
    assert_same(out.values(), expected, (hidden, head.weight))
    for given in [(None, temperature), (labels, None)]:
        with pytest.raises(ValueError, match="labels and a temperature per token"):
            head(hidden, *given)


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", verl.__doc__, re.DOTALL)
    hidden, weight, labels = leaves()
    names = {"hidden": hidden, "weight": weight, "labels": labels, "config": config()}
    names |= {"ref_logprobs": torch.randn(B, T), "old_logprobs": torch.randn(B, T) - 3}
    names |= {"advantages": torch.randn(B, T), "response_mask": torch.ones(B, T)}
    exec(example, names)
    assert names["kl"].shape == (B, T)
    names["pg_loss"].backward()
    assert weight.grad.isfinite().all() and "actor/ppo_kl" in names["metrics"]
