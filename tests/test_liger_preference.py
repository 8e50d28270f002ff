"""Liger's preference losses beside ours by the same names: equal in float32, figures where not."""

import inspect
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed, and liger-kernel needs it")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

from liger_kernel import chunked_loss as theirs
from liger_kernel.chunked_loss import functional as their_functions
from test_liger_parity import relative

from fused_rl.integrations import liger as ours

P, T, H, REF_H, V = 3, 7, 16, 11, 37
PAIRED = ("CPO", "SimPO", "ORPO", "DPO")
NAMES = (*PAIRED, "KTO")
SMOOTHED = ("robust", "exo_pair")
LOSS_TYPES = (
    *("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", *SMOOTHED),
)
DOORS = (ours, theirs)
TOLERANCE = 1e-5

Output = tuple[Tensor, tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Everything here is small: more of them would only wait for each other."""
    torch.set_num_threads(1)


def parameters(function) -> list[tuple[str, object]]:
    """Names and defaults, in order."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.name not in ("ctx", "cls")]


def module(door, name: str, **options) -> torch.nn.Module:
    return getattr(door, f"LigerFusedLinear{name}Loss")(**{"compiled": False, **options})


@pytest.mark.parametrize("name", NAMES)
def test_signatures_defaults_and_attributes(name):
    mine, other = (getattr(door, f"LigerFusedLinear{name}Loss") for door in DOORS)
    assert parameters(mine) == parameters(other)
    assert parameters(mine.forward) == parameters(other.forward)
    attributes = ({n: v for n, v in vars(c()).items() if n[0] != "_"} for c in (mine, other))
    assert next(attributes) == next(attributes)
    function = getattr(ours, f"LigerFusedLinear{name}Function").apply
    by_name = f"liger_fused_linear_{name.lower()}"
    their_function = getattr(their_functions, by_name).__self__
    assert their_function.__name__ == f"LigerFusedLinear{name}Function"
    assert getattr(ours, by_name) is function
    assert parameters(function) == parameters(their_function.forward)


class Problem:
    """2 P sequences with gaps, two heads, and which of the sequences are desirable."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32, gaps: bool = True):
        def noise(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape) * scale).to(dtype).requires_grad_()

        self.hidden, self.weight = noise(2 * P, T, H), noise(V, H, scale=0.4)
        self.bias = noise(V) if bias else None
        self.reference = noise(2 * P, T, REF_H), noise(V, REF_H, scale=0.4), noise(V)
        self.labels = torch.randint(0, V, (2 * P, T))
        if gaps:
            # Of lengths 6, 5, 6, 7, 5, 3.
            at = torch.tensor([3, 9, 10, 15, 31, 33, 36, 38, 39, 41])
            self.labels.view(-1)[at] = -100
        self.desirable = torch.tensor([True, False, True, False, False, True])

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def counted(self) -> Tensor:
        return self.labels != -100

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves, retain_graph=True))

    def call(self, door, name: str, *more: Tensor | None, **options) -> Output:
        """more: what forward takes after the bias."""
        heads = (self.weight, self.hidden) if name != "KTO" else (self.hidden, self.weight)
        loss_fn = module(door, name, **options)
        if name == "KTO":
            more = (self.desirable, *more)
        if name in ("DPO", "KTO") and not more[1:] and loss_fn.use_ref_model:
            more = (*more, *self.reference)
        return loss_fn(*heads, self.labels, self.bias, *more)

    def both(self, name: str, *more: Tensor | None, **options) -> list[Output]:
        return [self.call(door, name, *more, **options) for door in DOORS]

    def assert_same(self, mine: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> None:
        """In value and in the gradients of hidden, weight and bias; the reference has none."""
        assert mine.dtype == other.dtype and relative(mine, other) < tolerance
        for pair in zip(self.gradients(mine), self.gradients(other), strict=True):
            assert relative(*pair) < tolerance
        found = torch.autograd.grad(mine, self.reference, retain_graph=True, allow_unused=True)
        assert found == (None, None, None)

    def check(self, name: str, *more: Tensor | None, **options) -> None:
        """All that is returned."""
        (mine, aux), (other, their_aux) = self.both(name, *more, **options)
        self.assert_same(mine, other)
        assert len(aux) == len(their_aux) and not any(t.requires_grad for t in aux)
        assert [(t.dtype, t.shape) for t in aux] == [(t.dtype, t.shape) for t in their_aux]
        torch.testing.assert_close(aux, their_aux, rtol=TOLERANCE, atol=TOLERANCE)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor that an operator returns has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.numbers = max(self.numbers, t.numel())
        return out


def smoothing(loss_type: str) -> float:
    return 0.1 if loss_type in SMOOTHED else 0.0


@pytest.mark.parametrize(
    ("loss_type", "averaged", "referenced", "bias"),
    list(itertools.product(LOSS_TYPES, (False, True), (False, True), (False, True))),
)
def test_dpo(loss_type, averaged, referenced, bias):
    Problem(bias).check(
        "DPO",
        loss_type=loss_type,
        label_smoothing=smoothing(loss_type),
        average_log_prob=averaged,
        use_ref_model=referenced,
        beta=0.3,
    )


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.3}, {"alpha": 0.0}, {"ignore_index": 5}, {"chunk_size": 2}]
)
def test_dpo_with_the_likelihood_of_the_chosen(options):
    problem = Problem()
    if "ignore_index" in options:
        problem.labels = problem.labels.masked_fill(~problem.counted, 5)
    problem.check("DPO", compute_nll_loss=True, **options)


@pytest.mark.parametrize(
    ("nll", "averaged", "label_smoothing", "bias"),
    list(itertools.product((False, True), (False, True), (0.0, 0.2), (False, True))),
)
def test_cpo(nll, averaged, label_smoothing, bias):
    options = {"compute_nll_loss": nll, "average_log_prob": averaged, "alpha": 0.7}
    Problem(bias).check("CPO", label_smoothing=label_smoothing, beta=0.3, **options)


@pytest.mark.parametrize(
    ("nll", "gamma", "label_smoothing", "bias"),
    list(itertools.product((False, True), (0.5, 1.6), (0.0, 0.2), (False, True))),
)
def test_simpo(nll, gamma, label_smoothing, bias):
    options = {"compute_nll_loss": nll, "gamma": gamma, "alpha": 0.7, "beta": 2.0}
    Problem(bias).check("SimPO", label_smoothing=label_smoothing, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nll", [False, True])
def test_orpo(nll, bias):
    Problem(bias).check("ORPO", compute_nll_loss=nll, beta=0.3)


def test_orpo_with_the_likelihood_of_prompts():
    """nll_target counts more tokens, and fewer; of the rejected it means nothing."""
    problem = Problem()
    filled = torch.randint(0, V, problem.labels.shape)
    nll_target = problem.labels.where(problem.counted, filled)
    nll_target[0, 4:], nll_target[P + 1, :3] = -100, filled[P + 1, :3] + 1
    assert (nll_target[:P] != problem.labels[:P]).sum() > 6
    problem.check("ORPO", nll_target)


def test_orpo_with_a_likelihood_of_other_labels():
    """Some tokens have one label in target and another in nll_target, some the same."""
    problem = Problem()
    nll_target = problem.labels.clone()
    nll_target[:, ::2] = torch.randint(0, V, nll_target[:, ::2].shape)
    both = problem.counted & (nll_target != -100)
    assert 4 < (both & (nll_target == problem.labels))[:P].sum() < both[:P].sum() - 6
    problem.check("ORPO", nll_target)


@pytest.mark.parametrize("kl", [None, 0.7, [0.7]])
@pytest.mark.parametrize(
    ("averaged", "referenced", "bias"), list(itertools.product((False, True), repeat=3))
)
def test_kto(averaged, referenced, bias, kl):
    problem = Problem(bias)
    more = problem.reference if referenced else (None,) * 3
    kl = None if kl is None else torch.tensor(kl)
    problem.check("KTO", *more, kl, average_log_prob=averaged, use_ref_model=referenced)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_from_above_scales_theirs_and_ours(name):
    problem = Problem()
    mine, other = (-3 * loss for loss, _ in problem.both(name))
    problem.assert_same(mine, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_head(name):
    problem = Problem()
    problem.weight, problem.bias = problem.weight.detach(), problem.bias.detach()
    mine, other = (torch.autograd.grad(loss, problem.hidden)[0] for loss, _ in problem.both(name))
    assert relative(mine, other) < TOLERANCE


# Where ours are not Liger's.


def naive(problem: Problem, odds: bool = False, averaged: bool = False) -> Tensor:
    """[2 P] float64: log-probs of sequences by torch, without a kernel."""
    hidden, weight, bias = (t.double() for t in problem.leaves)
    logprobs = (hidden @ weight.T + bias).log_softmax(-1)
    at = problem.labels.where(problem.counted, 0)
    per_token = logprobs.gather(-1, at[..., None])[..., 0].where(problem.counted, 0.0)
    count = problem.counted.sum(-1).clamp(min=1) if averaged else 1
    return per_token.sum(-1) / count


def test_ipo_which_liger_refuses():
    """(r_w / n_w - r_l / n_l - 1 / (2 beta))^2, by hand."""
    problem = Problem()
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        module(theirs, "DPO", loss_type="ipo")
    loss, aux = problem.call(ours, "DPO", loss_type="ipo", beta=0.3)
    policy = naive(problem, averaged=True)
    problem.hidden, problem.weight, problem.bias = problem.reference
    r = policy.detach() - naive(problem, averaged=True)
    expected = (r[:P] - r[P:] - 1 / 0.6).square().mean()
    assert relative(loss, expected) < TOLERANCE
    torch.testing.assert_close(torch.cat(aux[-2:]), (0.3 * r).float(), rtol=1e-5, atol=1e-5)


def sure(logit: float) -> tuple[Tensor, Tensor, Tensor]:
    """One pair, of tokens whose logit is this one, of the rejected 1, all others being 0."""
    hidden = torch.ones(2, 4, 1)
    hidden[0] *= logit
    weight = torch.zeros(8, 1)
    weight[5] = 1.0
    return hidden.requires_grad_(), weight.requires_grad_(), torch.full((2, 4), 5)


def test_orpo_of_a_completion_that_is_certain():
    """From logits of 20 on, exp of the mean log-prob is 1 in float32, and theirs log(1 - 1)."""
    for logit, fails in ((17.0, False), (20.0, True), (60.0, True)):
        hidden, weight, labels = sure(logit)
        found = {}
        for door in DOORS:
            loss, aux = module(door, "ORPO", compute_nll_loss=False)(weight, hidden, labels)
            found[door] = loss, torch.autograd.grad(loss, (hidden, weight)), aux
        _, gradients, aux = found[theirs]
        assert all(g.isnan().any() for g in gradients) == fails
        assert aux[-1].isinf() == fails
        loss, gradients, aux = found[ours]
        assert all(g.isfinite().all() for g in gradients)
        assert 0 < loss < 1e-8 and gradients[0].abs().max() < 1e-8 and 15 < aux[-1] < 18


@pytest.mark.parametrize("name", ["SimPO", "ORPO", "CPO", "DPO", "KTO"])
@pytest.mark.parametrize("empty", [1, P + 1])
def test_one_empty_completion(name, empty):
    """Of means over tokens theirs is NaN, and so are the head's gradients; ours scores it 0."""
    problem = Problem()
    problem.labels[empty] = -100
    options = {} if name in ("SimPO", "ORPO") else {"average_log_prob": True}
    (mine, aux), (other, _) = problem.both(name, **options)
    assert other.isnan()
    assert all(g.isnan().all() for g in problem.gradients(other)[1:])
    assert mine.isfinite() and all(t.isfinite().all() for t in aux)
    hidden, *of_head = problem.gradients(mine)
    assert hidden.isfinite().all() and not hidden[empty].any()
    assert all(g.isfinite().all() and g.any() for g in of_head)


def test_simpo_of_an_empty_completion_by_hand():
    problem = Problem()
    problem.labels[1] = -100
    s = naive(problem, averaged=True)
    expected = -logsigmoid(2.0 * (s[:P] - s[P:]) - 0.5).mean()
    loss, _ = problem.call(ours, "SimPO", beta=2.0, compute_nll_loss=False)
    problem.assert_same(loss, expected.float())


@pytest.mark.parametrize("name", ["CPO", "DPO"])
def test_no_chosen_token_at_all(name):
    """Theirs divides 0 by 0 for a likelihood that nobody asked for."""
    problem = Problem()
    problem.labels[:P] = -100
    (mine, aux), (other, _) = problem.both(name, compute_nll_loss=False)
    assert other.isnan() and mine.isfinite() and aux[4] == 0
    assert all(g.isfinite().all() for g in problem.gradients(mine))


def test_simpos_module_adds_the_likelihood_unless_it_is_told_not_to():
    """As Liger's does; its function does not. The term is 84 % of the loss here."""
    problem = Problem()
    given = (problem.hidden, problem.weight, problem.labels, problem.bias)
    alone = ours.LigerFusedLinearSimPOFunction.apply(*given)[0]
    loss, aux = problem.call(ours, "SimPO")
    told, _ = problem.call(ours, "SimPO", compute_nll_loss=False)
    assert torch.equal(alone, told) and aux[4] > 3 * told
    torch.testing.assert_close(loss, told + aux[4])


def test_discopop_of_a_pair_that_is_lost():
    """Theirs multiplies exp(1000) by 0."""
    problem = Problem(bias=False)
    with torch.no_grad():
        problem.hidden[:P] *= 60
        problem.hidden[P:] = 0
    options = {"loss_type": "discopop", "use_ref_model": False, "beta": 1.0}
    (mine, _), (other, _) = problem.both("DPO", **options)
    assert other.isnan() and problem.gradients(other)[1].isnan().all()
    s = (t.sum() for t in problem.call(ours, "DPO", **options)[1][-2:])
    lost = next(s) - next(s)
    assert lost < -300
    torch.testing.assert_close(mine, -lost / P)
    assert all(g.isfinite().all() for g in problem.gradients(mine))


def test_kto_with_a_kl_per_sequence():
    """As Liger's docstring has it; theirs takes each from every sequence, and adds up."""
    problem = Problem()
    none = (None,) * 3
    kl = torch.full((2 * P,), 0.7)
    (mine, _), (other, _) = problem.both("KTO", *none, kl)
    expected, _ = problem.call(theirs, "KTO", *none, kl[0])
    problem.assert_same(mine, expected)
    problem.assert_same(2 * P * mine, other)
    varied = torch.arange(6.0) * 3
    signed = 0.1 * (naive(problem) - varied) * problem.desirable.where(problem.desirable, -1)
    by_hand = torch.sigmoid(-signed).mean()
    problem.assert_same(problem.call(ours, "KTO", *none, varied)[0], by_hand.float())


def test_kto_where_it_saturates():
    """Theirs is 1 - sigmoid(x), which cancels: of rewards of -8 its gradients are off by 2e-5."""
    problem, exact = Problem(), Problem(dtype=torch.float64)
    for leaf, of_problem in zip(exact.leaves, problem.leaves, strict=True):
        leaf.data.copy_(of_problem)
    exact.labels = problem.labels
    options = {"beta": 0.3, "use_ref_model": False}
    signed = 0.3 * naive(exact) * exact.desirable.where(exact.desirable, -1)
    expected = exact.gradients(torch.sigmoid(-signed).mean())
    for (loss, aux), least, most in zip(
        problem.both("KTO", **options), (0.0, 1e-5), (1e-6, 1e-4), strict=True
    ):
        assert -25 < aux[5] < -23
        for found, gradient in zip(problem.gradients(loss), expected, strict=True):
            assert least <= relative(found, gradient) < most


def test_kto_takes_labels_of_0_and_1():
    problem = Problem()
    expected, _ = problem.call(ours, "KTO")
    problem.desirable = problem.desirable.long()
    assert torch.equal(problem.call(ours, "KTO")[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_padding_holds_anything(name):
    """Theirs multiplies it by 0, NaN being none the less. Means of logits are over padding too."""
    problem = Problem()
    expected, aux = problem.call(ours, name)
    gradients = problem.gradients(expected)
    with torch.no_grad():
        problem.hidden[~problem.counted] = torch.nan
    (mine, again), (other, _) = problem.both(name)
    assert other.isnan()
    assert torch.equal(mine, expected)
    assert again[2].isnan() and again[3].isnan()
    again, aux = again[:2] + again[4:], aux[:2] + aux[4:]
    for found, before in zip((*again, *problem.gradients(mine)), (*aux, *gradients), strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("name", NAMES)
def test_no_logits_are_formed(name):
    """No operator returns as much as the logits of one sequence, forwards or backwards."""
    problem = Problem(bias=False)
    T, V = 512, 2000
    problem.hidden = torch.randn(2 * P, T, H, requires_grad=True)
    problem.weight = torch.randn(V, H, requires_grad=True)
    problem.labels = torch.randint(0, V, (2 * P, T))
    options = {"use_ref_model": False} if name in ("DPO", "KTO") else {}
    with Largest() as seen:
        loss, _ = problem.call(ours, name, **options)
        problem.gradients(loss)
    assert 0 < seen.numbers < T * V


def test_float64_is_computed_in_float32():
    problem = Problem(dtype=torch.float64)
    (mine, _), (other, _) = problem.both("CPO", compute_nll_loss=False)
    s = naive(problem)
    expected = -logsigmoid(0.1 * (s[:P] - s[P:])).mean()
    problem.assert_same(mine, expected, 1e-13)
    assert other.dtype == torch.float32 and 1e-10 < relative(other, expected) < 1e-5


def test_long_sequences_in_bfloat16():
    """Theirs rounds logits to bfloat16: a sequence of 1024 tokens is off by more than 0.1 nats."""
    hidden, weight = torch.randn(4, 1024, 64).bfloat16(), (torch.randn(2000, 64) * 0.4).bfloat16()
    labels = torch.randint(0, 2000, (4, 1024))
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    exact = logprobs.gather(-1, labels[..., None])[..., 0].sum(-1)
    errors = []
    for door in DOORS:
        _, aux = module(door, "CPO")(weight, hidden, labels)
        errors.append((torch.cat(aux[:2]).double() - exact).abs().max().item())
    # The float32 of the answer is good to 2.5e-4 at -10,000 nats.
    assert errors[0] < 1e-3 and errors[1] > 0.1


def test_bfloat16_gradients_of_the_head_are_rounded_once():
    """64 pairs: theirs adds up dweight in bfloat16, pair by pair."""
    hidden = torch.randn(128, 8, 64).bfloat16().requires_grad_()
    weight = (torch.randn(500, 64) * 0.4).bfloat16().requires_grad_()
    labels = torch.randint(0, 500, (128, 8))

    def gradient(door, *given: Tensor) -> Tensor:
        loss, _ = module(door, "CPO")(*given, labels)
        return torch.autograd.grad(loss, given[0])[0]

    exact = gradient(ours, *(t.detach().double().requires_grad_() for t in (weight, hidden)))
    mine, other = (relative(gradient(door, weight, hidden), exact) for door in DOORS)
    assert mine < 2**-8 and other > 2 * mine


# Mistakes.


def dpo(**options):
    return lambda: ours.LigerFusedLinearDPOLoss(**options)


def call(name: str, *more, **options):
    return lambda: Problem().call(ours, name, *more, **options)


def with_labels(name: str, labels: Tensor, **options):
    def run() -> Output:
        problem = Problem()
        problem.labels = labels
        return problem.call(ours, name, **options)

    return run


def judged(labels: Tensor | None):
    def run() -> Output:
        problem = Problem()
        problem.desirable = labels
        return problem.call(ours, "KTO")

    return run


MISTAKES = {
    "a loss type": (dpo(loss_type="dpo"), "Unsupported loss_type: 'dpo', not one of sigmoid, "),
    "no smoothing for EXO": (
        dpo(loss_type="exo_pair"),
        "label_smoothing must be > 0 for loss_type='exo_pair'",
    ),
    "too much for robust": (
        dpo(loss_type="robust", label_smoothing=0.5),
        r"label_smoothing must lie in \[0.0, 0.5\) for loss_type='robust', got 0.5",
    ),
    "smoothing that Liger ignores": (
        dpo(label_smoothing=0.1),
        r"label_smoothing is of loss_type 'robust' and 'exo_pair'.*dpo\(beta, smoothing=0.1\)",
    ),
    "tau": (dpo(loss_type="discopop", discopop_tau=0.0), "discopop_tau must be positive, got 0"),
    "CPO's smoothing": (call("CPO", label_smoothing=1.0), r"label_smoothing must be in \[0, 1"),
    "alpha": (call("CPO", alpha=-1.0), "alpha must be at least 0, got -1.0"),
    "beta": (call("CPO", beta=0.0), "beta must be positive, got 0.0"),
    "ORPO's beta": (call("ORPO", beta=-0.1), "beta must be at least 0, got -0.1"),
    "gamma": (call("SimPO", gamma=torch.inf), "gamma must be finite, got inf"),
    "no reference": (call("DPO", None, None), "use_ref_model is True, and ref_input or ref_weight"),
    "KTO without a reference": (
        call("KTO", None, None, use_ref_model=True),
        "use_ref_model is True, and ref_input or ref_weight",
    ),
    "an odd number": (
        with_labels("CPO", torch.zeros(3, T, dtype=torch.int64)),
        "there are 3 sequences",
    ),
    "flat labels": (
        with_labels("CPO", torch.zeros(6 * T, dtype=torch.int64)),
        r"target must be a tensor \[B, T\], got a tensor \[42\]",
    ),
    "a label": (with_labels("CPO", torch.full((6, T), V)), f"labels.*{V}"),
    "nll_target's shape": (
        call("ORPO", torch.zeros(P, T, dtype=torch.int64)),
        r"nll_target must be as target, \[6, 7\], got \[3, 7\]",
    ),
    "no preference": (judged(None), "preference_labels must be a torch.Tensor, got None"),
    "preferences per token": (
        judged(torch.ones(6, T, dtype=torch.bool)),
        r"preference_labels must be \[6\] bool or 0/1, got \[6, 7\]",
    ),
    "kl": (
        call("KTO", None, None, None, torch.zeros(5)),
        r"kl must be \[\], \[1\] or, one per sequence, \[6\], got \[5\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_value_errors_that_say_what(mistake):
    run, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        run()
