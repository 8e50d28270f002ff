"""Preference losses beside TRL's own code, in float64: its trainers' methods on given log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from preference_cases import DESIRABLE, MISMATCHED, Given, P, stats

from fused_rl import preference, scores

trl = pytest.importorskip("trl")
EXACT = 1e-12
# An accelerator of one process.
ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)

# name -> ours, and the options of TRL's DPOTrainer. Its alpha divergence has no float64.
DPO = {
    "sigmoid": (preference.dpo(0.3), {}),
    "robust": (preference.robust(0.3, smoothing=0.1), {"label_smoothing": 0.1}),
    "hinge": (preference.hinge(0.3), {}),
    "ipo": (preference.ipo(0.3), {}),
    "exo_pair": (preference.exo(0.3, smoothing=0.1), {"label_smoothing": 0.1}),
    "nca_pair": (preference.nca(0.3), {}),
    "bco_pair": (preference.bco_pair(0.3), {}),
    "sppo_hard": (preference.sppo(0.3), {}),
    "aot": (preference.aot(0.3, smoothing=0.1), {"label_smoothing": 0.1}),
    "aot_unpaired": (preference.aot_unpaired(0.3, smoothing=0.1), {"label_smoothing": 0.1}),
    "apo_zero": (preference.apo_zero(0.3), {}),
    "apo_down": (preference.apo_down(0.3), {}),
    "discopop": (preference.discopop(0.3), {}),
    "sft": (preference.sft(), {}),
    "sigmoid_norm": (preference.dpo_norm(0.3), {}),
    "sigmoid, forward_kl": (
        preference.f_dpo(scores.ForwardKL(), 0.3),
        {"f_divergence_type": "forward_kl"},
    ),
    "sigmoid, js_divergence": (
        preference.f_dpo(scores.JensenShannon(), 0.3),
        {"f_divergence_type": "js_divergence"},
    ),
    "sigmoid, ld_alpha": (preference.ld_dpo(0.4, 0.3), {"ld_alpha": 0.4}),
    "sigmoid, use_weighting": (preference.wpo(0.3), {"use_weighting": True}),
    "mixture": (
        preference.mixture(
            [(0.8, preference.dpo(0.3)), (0.2, preference.bco_pair(0.3)), (1.0, preference.sft())]
        ),
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
}


@pytest.fixture(autouse=True)
def wide():
    """TRL makes tensors of its options; without this they have seven digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(torch.nn.Module):
    """What TRL's fused head says of the labels of [2 P, T] predicted tokens."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs, mask, collisions=None) -> None:
        super().__init__()
        zeros = torch.zeros_like(logprobs.detach())
        self.outputs = SimpleNamespace(
            log_probs=logprobs.where(mask, 0.0),
            log_sum_sq_probs=zeros if collisions is None else collisions.where(mask, 0.0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def forward(self, **_) -> SimpleNamespace:
        return self.outputs


def its_dpo(model, reference, mask, loss_type, **options):
    """The loss of a DPOTrainer that was given nothing else."""
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    settings = {
        "model": model,
        "ref_model": reference,
        "accelerator": ALONE,
        "args": SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": 0.3,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(trainer).update(settings | options)
    whole = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
    }
    return trainer._compute_loss(model, inputs, return_outputs=False)


def assert_same(ours, theirs, leaves) -> None:
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=EXACT, atol=EXACT)
    pairs = zip(*(torch.autograd.grad(x, leaves) for x in (ours, theirs)), strict=True)
    for mine, other in pairs:
        assert other.any()
        torch.testing.assert_close(mine, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", DPO)
def test_dpo_trainer(name):
    """From hidden states, so that WPO has its sum of squares."""
    given = Given()
    loss, options = DPO[name]
    logprobs, collisions = given.logprobs(), given.collisions().detach()
    reference = Model(given.ref, given.mask)
    model = Model(logprobs, given.mask, collisions)
    theirs = its_dpo(model, reference, given.mask, name.split(",")[0], **options)
    assert_same(given.ours(loss).loss, theirs, given.leaves)


CPO = {
    "sigmoid": (preference.cpo(0.3, likelihood=0.0), {}),
    "smoothed": (
        preference.cpo(0.3, likelihood=0.0, smoothing=0.1),
        {"label_smoothing": 0.1},
    ),
    "simpo": (
        preference.simpo(0.3, gamma=0.5),
        {"loss_type": "simpo", "simpo_gamma": 0.5},
    ),
    "alphapo": (
        preference.alphapo(0.3, alpha=0.4, gamma=0.5),
        {"loss_type": "simpo", "simpo_gamma": 0.5, "alpha": 0.4},
    ),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_trainer(name):
    """CPOTrainer.cpo_loss, which is given means for SimPO and sums otherwise."""
    from trl.experimental.cpo import CPOTrainer

    loss, options = CPO[name]
    given = Given()
    logprobs = given.logprobs().detach().requires_grad_()
    sums = logprobs.where(given.mask, 0.0).sum(-1)
    if options.get("loss_type") == "simpo":
        sums = sums / given.mask.sum(-1)
    settings = {"alpha": 0.0, "beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0.0}
    trainer = SimpleNamespace(**settings | options, accelerator=ALONE)
    losses, *_ = CPOTrainer.cpo_loss(trainer, sums[:P], sums[P:])
    ours = loss(stats(logprobs), given.batch(ref_logprobs=None)).loss
    assert_same(ours, losses.mean(), [logprobs])


def test_orpo_trainer():
    """ORPOTrainer.odds_ratio_loss rounds to float32, and so is no nearer than that."""
    from trl.experimental.orpo import ORPOTrainer

    given = Given()
    logprobs = given.logprobs().detach().requires_grad_()
    means = logprobs.where(given.mask, 0.0).sum(-1) / given.mask.sum(-1)
    trainer = SimpleNamespace(beta=0.2, accelerator=ALONE)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:P], means[P:])
    chosen = given.mask[:P]
    theirs = -logprobs[:P][chosen].mean() - losses.double().mean()
    ours = preference.orpo(0.2)(stats(logprobs), given.batch(ref_logprobs=None)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    mine, other = (torch.autograd.grad(x, logprobs)[0] for x in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def its_kto(given: Given, loss_type: str):
    """The loss of a KTOTrainer; sequences 6 and 7 are the mismatched ones."""
    logprobs, judged = given.logprobs(), ~MISMATCHED
    sums, refs = (x.where(given.mask, 0.0).sum(-1) for x in (logprobs, given.ref))
    trainer = trl.KTOTrainer.__new__(trl.KTOTrainer)
    model = Model(logprobs[judged], given.mask[judged])
    settings = {
        "model": model,
        "accelerator": ALONE,
        "loss_type": loss_type,
        "beta": 0.3,
        "desirable_weight": 1.2,
        "undesirable_weight": 0.7,
        "calculate_KL": loss_type == "kto",
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_compute_kl_logps": lambda model, batch: sums[MISMATCHED],
    }
    vars(trainer).update(settings)
    whole = torch.nn.functional.pad(given.mask[judged].long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "label": DESIRABLE[judged],
        "ref_logps": refs[judged],
        "ref_KL_logps": refs[MISMATCHED],
    }
    return trainer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.parametrize("rise", [-5.0, 5.0])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_trainer(loss_type, rise):
    """With the point of reference at 0, and above it."""
    given = Given()
    given.ref = torch.where(MISMATCHED[:, None], given.ref - rise, given.ref)
    maker = {"kto": preference.kto, "apo_zero_unpaired": preference.apo_zero_unpaired}[loss_type]
    batch = given.batch(desirable=DESIRABLE, mismatched=MISMATCHED)
    out = given.ours(maker(0.3, desirable=1.2, undesirable=0.7), batch)
    if loss_type == "kto":
        assert (float(out.metrics["reference_point"]) > 0) == (rise > 0)
    assert_same(out.loss, its_kto(given, loss_type), given.leaves)
