"""Preference losses around their formulas: batches, ranks, what tokens cost, what is said of
mistakes. test_preference_formulas.py has the formulas."""

import dataclasses
import io
import math

import pytest
import torch
from by_name import preference_loss
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rl
from fused_rl import LMHead, TokenStats, linear_preference_loss, links, preference, scores
from fused_rl.losses.preference.named import NAMES
from fused_rl.preference import PreferenceBatch

S, T, H, V = 6, 9, 5, 23
UNPAIRED = ("kto", "apo_zero_unpaired", "bco")
RANKED = ("aot", "aot_unpaired")
WITHOUT_REFERENCE = ("simpo", "cpo", "alphapo", "orpo", "sft")
PAIRED = [name for name in NAMES if name not in UNPAIRED]
JUDGED = {
    "desirable": torch.tensor([1, 0, 1, 1, 0, 0]),
    "mismatched": torch.tensor([0, 0, 0, 0, 1, 1]),
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def given(seed=0):
    """(hidden, weight, labels, mask, reference): sequences of unequal lengths, none empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (S, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([9, 4, 1, 6, 2, 7])[:, None]
    mask[0, 2] = False
    hidden = normal(S, T, H).requires_grad_()
    weight = normal(V, H, seed=1).requires_grad_()
    return hidden, weight, labels, mask, (normal(S, T, H, seed=2), normal(V, H, seed=3))


def options(name):
    return JUDGED if name in UNPAIRED else {}


def formed(name, hidden, weight, batch, reference, **more):
    """[loss, dhidden, dweight]."""
    reference = None if name in WITHOUT_REFERENCE else reference
    loss = preference_loss(name, **more)
    value = linear_preference_loss(hidden, weight, batch, loss, reference=reference).loss
    return [value, *torch.autograd.grad(value, (hidden, weight))]


def same(found, expected, within=1e-12):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= within * b.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded(name):
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    padded = PreferenceBatch.padded(labels, mask, **options(name))
    # Whole rows but their padding, so that a token inside a sequence may not count.
    there = torch.arange(T) < torch.tensor([9, 4, 1, 6, 2, 7])[:, None]
    bounds = torch.cat([torch.zeros(1).long(), there.sum(-1).cumsum(0)])
    flat = labels[there], bounds
    packed = PreferenceBatch.packed(*flat, loss_mask=mask[there], **options(name))
    expected = formed(name, hidden, weight, padded, (ref_hidden, ref_weight))
    loss = preference_loss(name)
    reference = None if name in WITHOUT_REFERENCE else (ref_hidden[there], ref_weight)
    value = linear_preference_loss(hidden[there], weight, packed, loss, reference=reference).loss
    found = [value, *torch.autograd.grad(value, (hidden, weight))]
    same(found, expected)


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_by_index_are_the_halves(name):
    """In any order of the sequences, and whichever pair comes first."""
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    place = order.argsort()
    pairs = place[torch.tensor([2, 0, 1])], place[torch.tensor([5, 3, 4])]
    expected = formed(
        name, hidden, weight, PreferenceBatch.padded(labels, mask), (ref_hidden, ref_weight)
    )
    batch = PreferenceBatch.padded(labels[order], mask[order], pairs=pairs)
    reference = None if name in WITHOUT_REFERENCE else (ref_hidden[order], ref_weight)
    loss = preference_loss(name)
    value = linear_preference_loss(hidden[order], weight, batch, loss, reference=reference).loss
    same([value, *torch.autograd.grad(value, (hidden, weight))], expected)


@pytest.mark.parametrize("name", [n for n in PAIRED if n not in (*RANKED, "mixture")])
def test_micro_batches_of_pairs_add_up(name):
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    expected = formed(
        name, hidden, weight, PreferenceBatch.padded(labels, mask), (ref_hidden, ref_weight)
    )
    counts = {} if name == "sft" else {"num_pairs": 3}
    if name in ("cpo", "orpo", "rpo", "sft"):
        counts["num_tokens"] = mask[:3].sum()
    total = [0.0, 0.0, 0.0]
    for rows in (torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])):
        batch = PreferenceBatch.padded(labels[rows], mask[rows])
        reference = None if name in WITHOUT_REFERENCE else (ref_hidden[rows], ref_weight)
        loss = preference_loss(name, **counts)
        value = linear_preference_loss(hidden[rows], weight, batch, loss, reference=reference).loss
        parts = [value, *torch.autograd.grad(value, (hidden, weight))]
        total = [a + b for a, b in zip(total, parts, strict=True)]
    same(total, expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in WITHOUT_REFERENCE])
def test_a_reference_may_come_as_head_as_log_probs_or_as_sums(name):
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    of_reference = fused_rl.linear_logprobs(ref_hidden, ref_weight, labels).logprobs.detach()
    sums = of_reference.where(mask, 0.0).sum(-1)
    batch = PreferenceBatch.padded(labels, mask, **options(name))
    expected = formed(name, hidden, weight, batch, (ref_hidden, ref_weight))
    per_token = PreferenceBatch.padded(labels, mask, ref_logprobs=of_reference, **options(name))
    kinds = [per_token, batch.with_reference(of_reference)]
    if name != "ld_dpo":
        kinds += [PreferenceBatch.padded(labels, mask, ref_logprobs=sums, **options(name))]
        kinds += [batch.with_reference(sums)]
    for kind in kinds:
        same(formed(name, hidden, weight, kind, None), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_mask_holds_reaches_nothing(name):
    """Labels, hidden states and log-probs of the reference outside the mask may be anything."""
    hidden, weight, labels, mask, (ref_hidden, ref_weight) = given()
    batch = PreferenceBatch.padded(labels, mask, **options(name))
    expected = formed(name, hidden, weight, batch, (ref_hidden, ref_weight))
    apart = ~mask
    broken = labels.masked_fill(apart, -7)
    bad = hidden.detach().masked_fill(apart[..., None], math.nan).requires_grad_()
    ref_bad = ref_hidden.masked_fill(apart[..., None], math.inf)
    batch = PreferenceBatch.padded(broken, mask, **options(name))
    found = formed(name, bad, weight, batch, (ref_bad, ref_weight))
    same(found, expected)
    assert not found[1][apart].any()


def test_mismatched_sequences_move_the_point_and_have_no_gradient():
    hidden, weight, labels, mask, reference = given()
    loss, dhidden, _ = formed(
        "kto", hidden, weight, PreferenceBatch.padded(labels, mask, **JUDGED), reference
    )
    assert not dhidden[4:].any() and dhidden[:4].any()
    # Their log-ratio raised by c tokens' worth raises z0: by hand, from the scores.
    with torch.no_grad():
        own = fused_rl.linear_logprobs(hidden, weight, labels).logprobs
        other = fused_rl.linear_logprobs(*reference, labels).logprobs
        r = 0.1 * (own - other).where(mask, 0.0).sum(-1)
        z0 = r[4:].mean().clamp(min=0)
        good, bad = torch.sigmoid(z0 - r[[0, 2, 3]]), torch.sigmoid(r[[1]] - z0)
    assert torch.isclose(loss, torch.cat([good, bad]).mean(), rtol=1e-12)


def test_a_point_that_is_given_takes_the_place_of_mismatched_ones():
    hidden, weight, labels, mask, reference = given()
    desirable = JUDGED["desirable"]
    batch = PreferenceBatch.padded(labels, mask, desirable=desirable)
    with pytest.raises(ValueError, match="mismatched"):
        formed("kto", hidden, weight, batch, reference)
    tensor = torch.tensor(0.25, dtype=torch.float64)
    out = [formed("kto", hidden, weight, batch, reference, point=p)[0] for p in (0.25, tensor)]
    assert torch.equal(*out)
    tensor.fill_(0.0)
    unpaired = formed("apo_zero_unpaired", hidden, weight, batch, reference)[0]
    loss = preference.kto(point=tensor)
    assert torch.equal(
        linear_preference_loss(hidden, weight, batch, loss, reference=reference).loss, unpaired
    )


def test_wpo_weighs_by_the_probability_among_what_the_policy_samples():
    """q from the logits themselves; and it has no gradient."""
    hidden, weight, labels, mask, reference = given()
    z = (hidden @ weight.T).detach() / 0.7
    own = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    squares = z.softmax(-1).square().sum(-1).log()
    q = ((own - squares).where(mask, 0.0).sum(-1) / mask.sum(-1)).exp()
    batch = PreferenceBatch.padded(labels, mask)
    stats = fused_rl.linear_logprobs(hidden, weight, labels, temperature=0.7)
    with torch.no_grad():
        ref = fused_rl.linear_logprobs(*reference, labels, temperature=0.7).logprobs
    r = (stats.logprobs - ref).where(mask, 0.0).sum(-1)
    pairs = -torch.nn.functional.logsigmoid(0.1 * (r[:3] - r[3:]))
    expected = (q[:3] * q[3:] * pairs).mean()
    loss = preference.wpo()
    for temperature in (0.7, torch.full((S, 1), 0.7, dtype=torch.float64)):
        found = linear_preference_loss(
            *(hidden, weight, batch, loss), reference=reference, temperature=temperature
        ).loss
        assert torch.isclose(found, expected, rtol=1e-11)
        for a, b in zip(
            torch.autograd.grad(found, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_a_likelihood_mask_counts_the_prompt_of_the_chosen_alone():
    hidden, weight, labels, mask, _ = given()
    everything = torch.ones_like(mask)
    batch = PreferenceBatch.padded(labels, mask, likelihood_mask=everything)
    out = linear_preference_loss(hidden, weight, batch, preference.orpo())
    logprobs = fused_rl.linear_logprobs(hidden, weight, labels).logprobs
    assert torch.isclose(out.metrics["nll"], -logprobs[:3].mean(), rtol=1e-12)
    narrow = linear_preference_loss(
        hidden, weight, PreferenceBatch.padded(labels, mask), preference.orpo()
    )
    nll = -logprobs[:3][mask[:3]].mean()
    assert torch.isclose(out.loss - narrow.loss, -logprobs[:3].mean() - nll, rtol=1e-9)
    assert torch.equal(out.metrics["length_chosen"], narrow.metrics["length_chosen"])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counted_has_no_gradient_and_no_pairs_no_loss(name):
    hidden, weight, labels, mask, reference = given()
    more = {"point": 0.0} if name == "kto" else {}
    for rows, masks in ((slice(0), mask), (slice(None), torch.zeros_like(mask))):
        judged = {n: t[rows] for n, t in options(name).items()}
        batch = PreferenceBatch.padded(labels[rows], masks[rows], **judged)
        states = hidden.detach()[rows].requires_grad_()
        found = formed(name, states, weight, batch, (reference[0][rows], reference[1]), **more)
        assert found[0] == 0 if rows == slice(0) else found[0].isfinite()
        assert not found[1].any() and not found[2].any()


def test_an_empty_completion_scores_0_and_is_reported():
    hidden, weight, labels, mask, reference = given()
    mask = mask.clone()
    mask[4] = False
    batch = PreferenceBatch.padded(labels, mask)
    for name in PAIRED:
        found = formed(name, hidden, weight, batch, reference)
        assert all(t.isfinite().all() for t in found), name
        assert not found[1][4].any(), name
    out = linear_preference_loss(hidden, weight, batch, preference.orpo())
    assert out.metrics["empty_fraction"].item() == pytest.approx(1 / 6)
    stats = out.metrics
    assert stats["length_rejected"].item() == pytest.approx((6 + 0 + 7) / 3)


def test_metrics_by_hand():
    labels = torch.zeros(4, 2, dtype=torch.int64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    logprobs = torch.tensor([[-1.0, -2], [-3, -9], [-2, -2], [-1, -1]], dtype=torch.float64)
    ref = torch.tensor([[-2.0, -2], [-3, -9], [math.nan, -3], [-2, -2]], dtype=torch.float64)
    batch = PreferenceBatch.padded(labels, mask, ref_logprobs=ref)
    stats = TokenStats(logprobs, torch.full_like(logprobs, 0.5))
    loss, metrics = preference.dpo(0.5)(stats, batch)
    # Log-ratios 1, 0 of the chosen, and 1, 2 of the rejected; a NaN is not known: 0.
    losses = [math.log1p(math.exp(-0.5 * m)) for m in (1 - 1, 0 - 2)]
    assert loss.item() == pytest.approx(sum(losses) / 2)
    expected = {
        **{"reward_chosen": 0.25, "reward_rejected": 0.75, "margin": -0.5, "accuracy": 0.0},
        **{"log_ratio": 1.0, "logprobs_chosen": -3.0, "logprobs_rejected": -3.0},
        **{"length_chosen": 1.5, "length_rejected": 2.0, "length_bias": 1.0, "nll": 2.0},
        **{"entropy": 0.5, "empty_fraction": 0.0, "unknown_fraction": 1 / 7},
    }
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected)
    assert not any(v.requires_grad for v in metrics.values())


def test_metrics_of_single_answers():
    labels = torch.zeros(5, 1, dtype=torch.int64)
    logprobs = torch.tensor([[1.0], [2], [-1], [3], [9]], dtype=torch.float64) - 10
    batch = PreferenceBatch.padded(
        *(labels, torch.ones(5, 1, dtype=torch.bool)),
        desirable=torch.tensor([1, 1, 0, 0, 0]),
        mismatched=torch.tensor([0, 0, 0, 0, 1]),
        ref_logprobs=torch.full((5,), -10.0),
    )
    _, metrics = preference.kto(1.0, point=1.5)(TokenStats(logprobs, -logprobs), batch)
    # Scores 1, 2 against -1, 3 with 1.5 to beat: two of four are right.
    expected = {"accuracy": 0.5, "reward_chosen": 1.5, "reward_rejected": 1.0, "margin": 0.5}
    expected["reference_point"] = 1.5
    assert {k: metrics[k].item() for k in expected} == pytest.approx(expected)
    assert "length_bias" not in metrics


def test_sums_of_long_sequences_lose_nothing():
    """4096 float32 log-probs near -1: float32 sums are off by 1e-4 and more, ours by rounding."""
    logprobs = (-1 - 0.3 * torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))).float()
    labels, mask = torch.zeros(2, 4096).long(), torch.ones(2, 4096, dtype=torch.bool)
    ref = logprobs + 1e-3 * torch.rand(2, 4096, generator=torch.Generator().manual_seed(1))
    batch = PreferenceBatch.padded(labels, mask, ref_logprobs=ref)
    judged = preference.dpo().judged(TokenStats(logprobs, -logprobs), batch)
    exact = logprobs.double().sum(-1), (logprobs.double() - ref.double()).sum(-1)
    assert (judged.sequences.sum - exact[0]).abs().max() < 1e-9
    assert (judged.sequences.log_ratio - exact[1]).abs().max() < 1e-9
    assert ((logprobs.sum(-1) - ref.sum(-1)).double() - exact[1]).abs().max() > 1e-5


class Largest(TorchDispatchMode):
    """The largest tensor that is made, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


@pytest.mark.parametrize("name", ["dpo", "wpo", "kto", "simpo"])
def test_no_logits_are_kept(name):
    """Nothing is larger than the hidden states and the head."""
    tokens, H, V = 64, 16, 4096
    hidden = torch.randn(8, tokens, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    labels, mask = torch.zeros(8, tokens).long(), torch.ones(8, tokens, dtype=torch.bool)
    judged = {"desirable": torch.arange(8) < 4, "mismatched": torch.arange(8) == 7}
    batch = PreferenceBatch.padded(labels, mask, **(judged if name in UNPAIRED else {}))
    reference = (torch.randn(8, tokens, H), torch.randn(V, H))
    with Largest() as seen:
        linear_preference_loss(
            *(hidden, weight, batch, preference_loss(name)),
            reference=None if name in WITHOUT_REFERENCE else reference,
            chunk_bytes=2**16,
        ).loss.backward()
    assert seen.numbers <= max(V * H, 8 * tokens * H)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "aot", "wpo"])
def test_it_compiles_as_one_graph(name):
    hidden, weight, labels, mask, reference = given()
    batch = PreferenceBatch.padded(labels, mask, **options(name))
    loss = preference_loss(name)
    reference = None if name in WITHOUT_REFERENCE else reference

    def value(hidden, weight):
        return linear_preference_loss(hidden, weight, batch, loss, reference=reference).loss

    expected = value(hidden, weight)
    found = torch.compile(value, fullgraph=True, backend="aot_eager")(hidden, weight)
    same(
        [found, *torch.autograd.grad(found, (hidden, weight))],
        [expected, *torch.autograd.grad(expected, (hidden, weight))],
    )


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_batches_are_read_again_from_files(name):
    _, _, labels, mask, _ = given()
    batch = PreferenceBatch.padded(labels, mask, ref_logprobs=torch.zeros(S), **options(name))
    file = io.BytesIO()
    torch.save((preference_loss(name), batch), file)
    file.seek(0)
    loss, read = torch.load(file)
    assert loss == preference_loss(name)
    assert torch.equal(read.chosen, batch.chosen) and torch.equal(read.scored, batch.scored)


def test_pair_losses_are_what_the_mean_is_of():
    hidden, weight, labels, mask, reference = given()
    batch = PreferenceBatch.padded(labels, mask)
    for name in ("dpo", "apo_down", "sppo", "ipo"):
        loss = preference_loss(name)
        with torch.no_grad():
            stats = fused_rl.linear_logprobs(hidden, weight, labels)
            ref = fused_rl.linear_logprobs(*reference, labels).logprobs
        known = batch.with_reference(ref)
        sequences = loss.judged(stats, known).sequences
        losses = loss.pair_losses(sequences.at(known.chosen), sequences.at(known.rejected))
        assert losses.shape == (3,)
        assert torch.isclose(loss.coef * losses.mean(), loss(stats, known).loss)


def test_any_function_is_a_loss_a_score_or_a_link():
    hidden, weight, labels, mask, _ = given()
    batch = PreferenceBatch.padded(labels, mask)
    own = preference.PreferenceLoss(
        lambda stats: 2.0 * stats.sum / stats.length,
        lambda w, l: -torch.nn.functional.logsigmoid(w - l - 1.0),  # noqa: E741
    )
    for loss in (own, lambda stats, batch: preference.simpo()(stats, batch)):
        same(
            [linear_preference_loss(hidden, weight, batch, loss).loss],
            [linear_preference_loss(hidden, weight, batch, preference.simpo()).loss],
        )


def test_shares_of_a_step_average_to_it(ranks):
    for world in (2, 3):
        for found in ranks(world).run("cases_preference", "shares", names=list(NAMES)):
            assert len(found) == len(NAMES) - len(RANKED)
            assert max(found.values()) < 1e-12, found


def test_split_sequences_are_whole(ranks):
    for found in ranks(2).run("cases_preference", "split", names=list(NAMES)):
        assert len(found) == len(NAMES) - 1
        assert max(found.values()) < 1e-12, found


def test_a_spread_head_is_one_head(ranks):
    for found in ranks(2).run("cases_preference", "spread", names=["dpo", "orpo", "wpo", "kto"]):
        assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("which", ["fsdp2", "ddp"])
def test_a_model_that_an_engine_spreads_has_the_gradients_of_one_process(ranks, which):
    for error in ranks(2).run("cases_preference", "engine", which=which):
        assert error < 3e-6


MISTAKES = {
    "an odd number": (lambda b: b(5), "first half"),
    "both": (
        lambda b: b(4, pairs=(torch.tensor([0]),) * 2, desirable=torch.ones(4).bool()),
        "pairs and desirable",
    ),
    "mismatched alone": (lambda b: b(4, mismatched=torch.ones(4).bool()), "desirable"),
    "outside": (lambda b: b(4, pairs=(torch.tensor([0, 4]), torch.tensor([1, 2]))), "4, outside"),
    "itself": (lambda b: b(4, pairs=(torch.tensor([0, 2]), torch.tensor([1, 2]))), "pair 1"),
    "lengths": (lambda b: b(4, pairs=(torch.tensor([0]), torch.tensor([1, 2]))), "rejected"),
    "a float label": (lambda b: b(4, desirable=torch.ones(4)), "desirable.*bool"),
    "short": (lambda b: b(4, desirable=torch.ones(3).bool()), r"desirable must be \[4\]"),
    "ref": (lambda b: b(4, ref_logprobs=torch.zeros(3)), "ref_logprobs"),
    "likelihood": (lambda b: b(4, likelihood_mask=torch.ones(4)), "likelihood_mask"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_batch_are_named(mistake):
    make, match = MISTAKES[mistake]
    with pytest.raises(ValueError, match=match):
        make(
            lambda n, **o: PreferenceBatch.padded(
                torch.zeros(n, 2).long(), torch.ones(n, 2).bool(), **o
            )
        )


def test_losses_say_what_they_lack():
    hidden, weight, labels, mask, reference = given()
    batch = PreferenceBatch.padded(labels, mask)
    single = PreferenceBatch.padded(labels, mask, **JUDGED)

    def of(loss, batch, **more):
        return linear_preference_loss(hidden, weight, batch, loss, **more)

    with pytest.raises(ValueError, match="compares with a reference"):
        of(preference.dpo(), batch)
    with pytest.raises(ValueError, match="the batch is unpaired"):
        of(preference.simpo(), single)
    with pytest.raises(ValueError, match="give dpo"):
        of(preference.dpo, batch)
    with pytest.raises(ValueError, match="give one of them"):
        of(preference.dpo(), batch.with_reference(torch.zeros(S, T)), reference=reference)
    with pytest.raises(ValueError, match="of the reference: hidden and weight must agree in H"):
        of(preference.dpo(), batch, reference=(torch.zeros(S, T, H + 1), weight))
    with pytest.raises(ValueError, match="token by token"):
        of(preference.ld_dpo(0.5), batch.with_reference(torch.zeros(S)))
    with pytest.raises(ValueError, match="several pairs"):
        pairs = torch.tensor([0, 0]), torch.tensor([1, 2])
        twice = PreferenceBatch.padded(labels, mask, pairs=pairs)
        of(preference.ld_dpo(0.5), twice, reference=reference)
    with pytest.raises(ValueError, match="half the temperature"):
        known = batch.with_reference(torch.zeros(S, T))
        preference.wpo()(fused_rl.linear_logprobs(hidden, weight, labels), known)
    with pytest.raises(ValueError, match=r"labels\[1, 2\]"):
        wrong = labels.clone()
        wrong[1, 2] = V
        of(preference.simpo(), PreferenceBatch.padded(wrong, mask))
    with pytest.raises(ValueError, match="PreferenceBatch"):
        of(preference.dpo(), fused_rl.TokenBatch.padded(labels, mask, torch.zeros(S)))


def test_a_batch_goes_to_another_device_as_a_whole():
    _, _, labels, mask, _ = given()
    moved = PreferenceBatch.padded(labels, mask, ref_logprobs=torch.zeros(S)).to("meta")
    tensors = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert len(tensors) == 8 and all(t.is_meta for t in tensors)
    assert moved.tokens.labels.is_meta


def test_links_hold_at_the_extremes():
    """Margins of +-1000: finite values and gradients, and the asymptotes."""
    w = torch.tensor([500.0, -500.0], dtype=torch.float64, requires_grad=True)
    expected = {
        links.Logistic(): [0.0, 1000.0],
        links.Hinge(): [0.0, 1001.0],
        links.Squared(0.5): [999.5**2, 1000.5**2],
        links.Exponential(): [0.0, math.exp(20)],
        links.EXO(0.25): [-math.log(0.75), -math.log(0.25)],
        links.DiscoPOP(): [0.0, 1000.0],
        links.SigmoidDown(): [1.0, 1.0],
        links.CrossEntropy(): [0.0, 1000.0],
        links.NCA(): [250.0, 750.0],
        links.Sigmoid(2.0, 3.0): [0.0, 5.0],
    }
    for link, values in expected.items():
        losses = link(w, -w)
        assert losses.tolist() == pytest.approx(values, rel=1e-12, abs=1e-200), link
        (gradient,) = torch.autograd.grad(losses.sum(), w)
        assert gradient.isfinite().all(), link


def test_odds_of_a_certain_sequence_are_those_that_float32_knows():
    for mean in (0.0, 1e-7, -(2.0**-25)):
        total = torch.tensor([3 * mean], dtype=torch.float64, requires_grad=True)
        stats = preference.SequenceStats(total, torch.tensor([3.0], dtype=torch.float64))
        odds = scores.LogOdds()(stats)
        assert odds.item() == pytest.approx(24 * math.log(2), rel=1e-6)
        (gradient,) = torch.autograd.grad(odds, total)
        assert gradient.item() == pytest.approx(2.0**24 / 3, rel=1e-6)
    head = LMHead(torch.tensor([[100.0], [-100.0]]))
    hidden = torch.ones(2, 3, 1, requires_grad=True)
    labels = torch.tensor([[0, 0, 0], [0, 0, 1]])
    batch = PreferenceBatch.padded(labels, torch.ones(2, 3, dtype=torch.bool))
    out = linear_preference_loss(hidden, head, batch, preference.orpo())
    (dhidden,) = torch.autograd.grad(out.loss, hidden)
    assert out.loss.isfinite() and dhidden.isfinite().all()
