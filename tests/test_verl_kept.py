"""Kept sets replayed by verl's heads: without verl, and by its own engine where it is installed."""

from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from test_kept import packed
from tiny_models import qwen2
from torch import Tensor

from fused_rl.integrations import verl
from fused_rl.integrations.verl import kept
from fused_rl.sampling_masks import SamplingMask

V, H, T = 19, 8, 6
EVERY = torch.arange(V)
ONE = torch.tensor([-1])


def problem() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """hidden [T, H], weight, labels, and sets of which the second and the last are all."""
    hidden = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    sets = [torch.cat([EVERY[EVERY.ne(label)][:n], label[None]]) for n, label in enumerate(labels)]
    sets[1], sets[-1] = ONE, EVERY
    return hidden, weight, labels, sets


def plain(hidden, weight, labels, sets, temperature: float = 0.7) -> tuple[Tensor, Tensor]:
    """Log-probs renormalised over the sets; entropies of the whole vocabulary."""
    z = hidden @ weight.T / temperature
    logp = torch.log_softmax(z, -1)
    kept_z = torch.full_like(z, -torch.inf)
    for t, ids in enumerate(sets):
        kept_z[t, ids if ids[0] >= 0 else EVERY] = z[t, ids if ids[0] >= 0 else EVERY]
    logprobs = torch.log_softmax(kept_z, -1).gather(-1, labels[:, None])[:, 0]
    return logprobs, -(logp.exp() * logp).sum(-1)


def by_function(hidden, weight, labels):
    return verl.linear_cross_entropy(hidden[None], weight, labels[None], 0.7)


def by_module(hidden, weight, labels):
    found = verl.FusedLinearForPPO()(hidden[None], weight, labels[None], 0.7)
    return [t[0] for t in found]


@pytest.mark.parametrize("call", [by_function, by_module])
def test_log_probs_are_of_the_kept_sets_inside_of_the_block_alone(call):
    """Values and gradients in float64; -1 is the whole vocabulary."""
    hidden, weight, labels, sets = problem()
    before = call(hidden, weight, labels)
    with verl.kept_sets(*packed(sets)):
        found = call(hidden, weight, labels)
    expected = plain(hidden, weight, labels, sets)
    slopes = [torch.randn(T, dtype=torch.float64) for _ in range(2)]
    torch.testing.assert_close(tuple(found), expected)
    gradients = [torch.autograd.grad(pair, (hidden, weight), slopes) for pair in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not torch.equal(found[0], before[0])
    assert torch.equal(call(hidden, weight, labels)[0], before[0])


def test_blocks_within_each_other_and_an_error_in_one():
    hidden, weight, labels, sets = problem()
    other = [EVERY for _ in sets]
    with verl.kept_sets(*packed(sets)):
        with verl.kept_sets(*packed(other)):
            inner, _ = by_function(hidden, weight, labels)
        outer, _ = by_function(hidden, weight, labels)
    torch.testing.assert_close(inner, plain(hidden, weight, labels, other)[0])
    torch.testing.assert_close(outer, plain(hidden, weight, labels, sets)[0])
    with pytest.raises(KeyError), verl.kept_sets(*packed(sets)):
        raise KeyError
    torch.testing.assert_close(by_function(hidden, weight, labels)[0], inner)


def test_a_block_without_a_head_of_ours_is_an_error():
    with (
        pytest.raises(RuntimeError, match=r"no head of fused_rl was called.*use_fused_kernels"),
        verl.kept_sets(*packed([EVERY])),
    ):
        pass


@pytest.mark.parametrize("name", ["kept", "cu_kept"])
def test_sets_that_are_no_integers(name):
    given = dict(zip(("kept", "cu_kept"), packed([EVERY]), strict=True)) | {name: [0, 1]}
    with (
        pytest.raises(ValueError, match=f"^{name} must be an int64 or int32 tensor, got list"),
        verl.kept_sets(**given),
    ):
        pass


def test_another_number_of_labels_is_an_error():
    hidden, weight, labels, sets = problem()
    said = r"labels \[5\], and 6 kept sets are replayed: sequences that are split over ranks"
    with pytest.raises(ValueError, match=said), verl.kept_sets(*packed(sets)):
        by_function(hidden[:5], weight, labels[:5])


def test_empty_sets_are_filled_and_others_stay():
    sets = kept.KeptSets(*packed([EVERY[:0], EVERY[3:5], EVERY[:0], EVERY[:0], ONE]))
    expected = packed([ONE, EVERY[3:5], ONE, ONE, ONE])
    for found, right in zip(kept.filled(sets), expected, strict=True):
        assert torch.equal(found, right)
    none = kept.filled(kept.KeptSets(*packed([])))
    assert [t.tolist() for t in none] == [[], [0]]


@pytest.mark.parametrize("what", ["another", "none"])
def test_a_label_that_was_not_kept_is_an_error(what):
    hidden, weight, labels, sets = problem()
    sets[2] = EVERY[EVERY.ne(labels[2])][: 0 if what == "none" else None]
    with pytest.raises(ValueError, match="label"), verl.kept_sets(*packed(sets)):
        by_function(hidden, weight, labels)


def test_a_split_vocabulary(ranks):
    for differences in ranks(2).run("cases_doors", "of_verl_kept"):
        assert max(differences) < 1e-12


# Micro-batches.

PROMPTS, RESPONSES = (2, 3, 1), (3, 1, 2)
SETS = [[[1, 2], None, [4]], None, SamplingMask([5, 6, 7], [0, 1, 3])]
IN_ORDER = [[1, 2], [4], [5], [6, 7]]


def micro_batch(*, nested: bool, **options) -> dict:
    """Three sequences as verl's engines get them, each of a prompt and a response."""

    def of(lengths) -> Tensor:
        jagged = [torch.ones(n, dtype=torch.int64) for n in lengths]
        return torch.nested.as_nested_tensor(jagged, layout=torch.jagged)

    found = {"input_ids": of(map(sum, zip(PROMPTS, RESPONSES, strict=True)))}
    found |= {"sampling_mask": SETS, **options}
    if nested:
        return found | {"prompts": of(PROMPTS), "responses": of(RESPONSES)}
    at, before, after = torch.arange(3), torch.tensor(PROMPTS), torch.tensor(RESPONSES)
    mask = torch.cat([at >= 3 - before[:, None], at < after[:, None]], 1).long()
    ones = torch.ones(3, 3, dtype=torch.int64)
    return found | {"prompts": ones, "responses": ones, "attention_mask": mask}


def of_labels(sets) -> dict[int, list[int]]:
    """Place of the label -> its set, where it is not the whole vocabulary."""
    places = sets.kept.split(sets.cu_kept.diff().tolist())
    return {n: ids.tolist() for n, ids in enumerate(places) if ids.tolist() != [-1]}


@pytest.mark.parametrize("nested", [False, True])
def test_the_sets_of_a_packed_micro_batch(nested):
    """The labels at a sequence's last token and before its response's first have none."""
    sets = kept.sets_of(micro_batch(nested=nested))
    # Lengths 5, 4, 3: responses are tokens 2 to 4, 3, and 1 to 2, each a label one place before.
    expected = dict(zip((1, 3, 9, 10), IN_ORDER, strict=True))
    assert of_labels(sets) == expected and len(sets.cu_kept) == 13


def test_the_sets_of_a_padded_micro_batch():
    sets = kept.sets_of(micro_batch(nested=False, use_remove_padding=False))
    expected = dict(zip((1, 3, 10, 11), IN_ORDER, strict=True))
    assert of_labels(sets) == expected and len(sets.cu_kept) == 16


def test_sets_that_are_not_one_per_token_of_the_response():
    given = micro_batch(nested=True) | {"sampling_mask": [[[1]], None, None]}
    with pytest.raises(ValueError, match=r"masks\[0\] has 1 sets, for 3 generated tokens"):
        kept.sets_of(given)


def test_an_engine_replays_what_has_masks():
    class Engine:
        def forward_step(self, micro_batch, loss_function, forward_only):
            N = len(micro_batch["input_ids"].values())
            hidden, weight = torch.zeros(N, H), torch.zeros(V, H)
            labels = torch.tensor([0, 1, 9, 4, 0, 0, 0, 3, 0, 5, 7, 0])
            return verl.linear_cross_entropy(hidden, weight, labels)[0].exp()

    kept.replay(Engine)
    kept.replay(Engine)
    given = micro_batch(nested=True)
    sizes = 1 / Engine().forward_step(given, None, forward_only=True)
    expected = torch.full((12,), float(V))
    expected[[1, 3, 9, 10]] = torch.tensor([2.0, 1.0, 1.0, 2.0])
    torch.testing.assert_close(sizes, expected)
    del given["sampling_mask"]
    found = Engine().forward_step(given, None, forward_only=True)
    torch.testing.assert_close(found, torch.full((12,), 1 / V))


# verl's own engine.

P, R = 4, 5
BEFORE, AFTER = torch.tensor([4, 2, 3]), torch.tensor([5, 3, 1])


@pytest.fixture
def engine(monkeypatch):
    """verl's FSDP engine around a small model, without ranks."""
    pytest.importorskip("verl", reason="verl is not installed")
    from verl.models.transformers.dense_common import forward_with_torch_backend
    from verl.workers.engine.fsdp import transformer_impl

    for name in ("get_device_id", "get_device_name"):
        monkeypatch.setattr(transformer_impl, name, lambda: "cpu")
    step = transformer_impl.FSDPEngineWithLMHead.forward_step

    class Engine(transformer_impl.FSDPEngineWithLMHead):
        forward_step = step

        def __init__(self):
            self.module = qwen2(37, seed=3)
            self.module.forward = MethodType(forward_with_torch_backend, self.module)
            self.pad_to_length = self.use_ulysses_sp = False
            self.ulysses_sequence_parallel_size = 1
            self.engine_config, self._autocast_dtype = SimpleNamespace(), torch.float32

        def get_data_parallel_group(self):
            return None

    return Engine


def of_verl(remove_padding: bool):
    """A batch as verl's trainer makes it, its responses, and the sets of their tokens."""
    from verl import DataProto
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    ids = torch.randint(3, 37, (3, P + R))
    after = torch.arange(R) < AFTER[:, None]
    mask = torch.cat([torch.arange(P) >= P - BEFORE[:, None], after], 1).long()
    tensors = {"input_ids": ids, "attention_mask": mask, "response_mask": mask[:, P:]}
    tensors |= {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    tensors |= {"prompts": ids[:, :P], "responses": ids[:, P:]}
    masks = np.empty(3, dtype=object)
    masks[:] = [[[int(i), 1, 2] for i in ids[b, P : P + AFTER[b]]] for b in range(3)]
    masks[0][1] = None
    batch = DataProto.from_dict(tensors=tensors, non_tensors={"sampling_mask": masks})
    micro = left_right_2_no_padding(batch.to_tensordict())
    options = {"use_fused_kernels": True, "use_remove_padding": remove_padding}
    tensordict_utils.assign_non_tensor(micro, temperature=0.7, calculate_entropy=True, **options)
    return micro, ids, mask, masks


@pytest.mark.parametrize("remove_padding", [True, False])
def test_verls_engine_replays_the_rollout(engine, remove_padding):
    """From the trainer's batch to log-probs of responses, beside the model's own logits."""
    from verl.workers.utils.padding import no_padding_2_padding

    micro, ids, mask, masks = of_verl(remove_padding)
    verl.patch()
    try:
        plain_step = engine()
        _, before = plain_step.forward_step(micro, None, True)
        kept.replay(engine)
        _, inside = plain_step.forward_step(micro, None, True)
    finally:
        verl.unpatch()
    found, whole = (
        no_padding_2_padding(out["model_output"]["log_probs"], micro) for out in (inside, before)
    )
    model = qwen2(37, seed=3)
    for b in range(3):
        own = ids[b][mask[b].bool()][None]
        logp = torch.log_softmax(model(input_ids=own).logits[0] / 0.7, -1)
        for t in range(int(AFTER[b])):
            row, label = logp[BEFORE[b] + t - 1], ids[b, P + t]
            torch.testing.assert_close(whole[b, t], row[label], rtol=1e-4, atol=1e-5)
            mass = row.logsumexp(-1) if masks[b][t] is None else row[masks[b][t]].logsumexp(-1)
            torch.testing.assert_close(found[b, t], row[label] - mass, rtol=1e-4, atol=1e-5)
    entropies = [out["model_output"]["entropy"].values() for out in (inside, before)]
    torch.testing.assert_close(*entropies)


def test_an_engine_without_our_head_says_so(engine):
    """Masks that would be passed over: verl's head has not been patched."""
    micro, *_ = of_verl(True)
    kept.replay(engine)
    with pytest.raises(RuntimeError, match="no head of fused_rl was called"):
        engine().forward_step(micro, None, True)
