"""Operators written as functions of records: one record and one body, and torch has all of it."""

from typing import NamedTuple

import oracle
import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from fused_rl.ops import Head
from fused_rl.ops.record import Gradients, Needs, Operator, Written

N, H, V, K = 4, 3, 7, 2


# Log-probs of several ids per token: what the docstring of record.py says how to write.


class Ids(NamedTuple):
    ids: Tensor  # [N, K] int64


class Picked(NamedTuple):
    picked: Tensor  # [N, K]
    lse: Tensor  # [N]


class OfPicked(NamedTuple):
    dpicked: Tensor


class Lse(NamedTuple):
    lse: Tensor


@Operator
def toy_several_ids(head: Head, several: Ids) -> Picked:
    """Log-probabilities of K ids per token."""
    logp = head.logits().log_softmax(-1)
    return Picked(logp.gather(1, several.ids), head.logits().logsumexp(-1))


@toy_several_ids.fake
def _(head: Head, several: Ids) -> Picked:
    room = head.hidden.new_empty
    shape = several.ids.shape
    return Picked(room(shape, dtype=head.dtype), room(shape[:1], dtype=head.dtype))


@Operator
def toy_several_ids_backward(
    up: OfPicked, head: Head, several: Ids, known: Lse, needs: Needs
) -> Gradients:
    p = (head.logits() - known.lse[:, None]).exp()
    draw = -p * up.dpicked.sum(1, keepdim=True)
    draw = draw.scatter_add(1, several.ids, up.dpicked) * (head.scale / head.temperature[:, None])
    found = (draw @ head.weight, draw.T @ head.hidden, draw.sum(0))
    return Gradients(*(g if need else g.new_empty(0) for g, need in zip(found, needs, strict=True)))


@toy_several_ids_backward.fake
def _(up: OfPicked, head: Head, several: Ids, known: Lse, needs: Needs) -> Gradients:
    shapes = zip((head.hidden, head.weight, head.weight[:, 0]), needs, strict=True)
    return Gradients(*(t.new_empty(t.shape if need else 0) for t, need in shapes))


toy_several_ids.differentiate(toy_several_ids_backward, of="several_ids")


class Total(NamedTuple):
    x: Tensor
    total: Written
    factor: float


@Operator
def toy_add_to(of: Total) -> Tensor:
    """total += factor x, which it returns."""
    of.total.add_(of.x, alpha=of.factor)
    return of.x * of.factor


toy_add_to.fake(lambda of: torch.empty_like(of.x))


def case() -> tuple[Head, Ids]:
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((N, H), (V, H), (V,)))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    temperature = torch.rand(N, dtype=torch.float64) + 0.5
    head = Head(*leaves, torch.zeros(N).long(), temperature, 0.7, 0.0)
    return head, Ids(torch.randint(V, (N, K)))


def picked(head: Head, several: Ids, *leaves: Tensor) -> Tensor:
    """Through the operator, of other hidden, weight and bias."""
    return toy_several_ids(Head(*leaves, *head[3:]), several).picked


def test_the_schema_is_the_fields_in_order():
    given = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor temperature"
    given += ", float scale, float softcap, SymInt rounding, Tensor ids"
    schemas = {
        toy_several_ids: f"({given}) -> (Tensor, Tensor)",
        toy_several_ids_backward: f"(Tensor dpicked, {given}, Tensor lse, bool need_dhidden, "
        "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
        toy_add_to: "(Tensor x, Tensor(a1!) total, float factor) -> Tensor",
    }
    for op, schema in schemas.items():
        assert str(op.op._opoverload._schema) == f"fused_rl::{op.__name__}{schema}"


def test_two_fields_of_one_name_are_refused():
    def twice(a: Ids, b: Ids) -> Tensor: ...

    with pytest.raises(AssertionError, match="same name"):
        Operator(twice)


def test_a_backward_pass_that_takes_what_nobody_knows_is_refused():
    class Unknown(NamedTuple):
        nobody: Tensor

    def toy_of_nobody(up: OfPicked, unknown: Unknown) -> Tensor: ...

    with pytest.raises(ValueError, match="'nobody' is not in list"):
        toy_several_ids.differentiate(Operator(toy_of_nobody), of="several_ids")


def test_the_operator_is_documented_and_gives_its_record():
    head, several = case()
    out = toy_several_ids(head, several)
    assert toy_several_ids.__doc__ == "Log-probabilities of K ids per token."
    assert type(out) is Picked
    want = head.logits().log_softmax(-1).gather(1, several.ids)
    torch.testing.assert_close(out.picked, want, rtol=1e-13, atol=1e-13)


def test_gradients_and_what_has_none():
    head, several = case()
    assert torch.autograd.gradcheck(lambda *t: picked(head, several, *t), head[:3])
    out = toy_several_ids(head, several)
    assert out.picked.requires_grad and not out.lse.requires_grad


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 1), (0, 0, 1)], ids=str)
def test_only_what_requires_a_gradient_is_asked_for(needs):
    head, several = case()
    leaves = [t.detach().requires_grad_(bool(n)) for t, n in zip(head[:3], needs, strict=True)]
    picked(head, several, *leaves).sum().backward()
    assert [t.grad is not None for t in leaves] == [bool(n) for n in needs]


def test_torch_finds_nothing_wrong_with_them():
    head, several = case()
    torch.library.opcheck(toy_several_ids.op, (*head, *several))
    constant = Head(*(t.detach() if isinstance(t, Tensor) else t for t in head))
    known = toy_several_ids(constant, several)
    for needs in ((True, True, True), (False, True, False)):
        args = (torch.randn(N, K).double(), *constant, *several, known.lse, *needs)
        torch.library.opcheck(toy_several_ids_backward.op, args)
    torch.library.opcheck(toy_add_to.op, (torch.randn(3), torch.randn(3), 2.0))


def test_compiled_in_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()

    def value(hidden, weight, bias, labels, temperature, ids):
        head = Head(hidden, weight, bias, labels, temperature, 0.7, 0.0)
        return toy_several_ids(head, Ids(ids)).picked.square().sum()

    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 8):
        head, _ = case()
        hidden = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
        rest = (torch.zeros(tokens).long(), torch.ones(tokens).double())
        args = (hidden, *head[1:3], *rest, torch.randint(V, (tokens, K)))
        for mine, right in zip(
            *(torch.autograd.grad(run(*args), args[:3]) for run in (compiled, value)), strict=True
        ):
            assert oracle.relative_error(mine, right) < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_and_derivatives_that_are_not_there():
    head, several = case()
    hidden, *rest = (t.detach() for t in head[:3])

    def value(h: Tensor) -> Tensor:
        return picked(head, several, h, *rest).square().sum()

    leaf = hidden.clone().requires_grad_()
    (right,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(grad(value)(hidden), right)
    both = torch.stack([hidden, hidden])
    torch.testing.assert_close(vmap(grad(value))(both), torch.stack([right, right]))
    with pytest.raises(NotImplementedError, match="several_ids has no forward-mode"):
        jvp(value, (hidden,), (hidden,))
    with pytest.raises(NotImplementedError, match="several_ids has no second derivative"):
        grad(lambda h: grad(value)(h).sum())(hidden)


def test_autocast_stays_outside():
    head, several = case()
    args = (
        Head(*(t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in head)),
    )
    with torch.autocast("cpu", torch.bfloat16):
        inside = toy_several_ids(*args, several).picked
    oracle.assert_same_bits(inside.detach(), toy_several_ids(*args, several).picked.detach())


def test_what_is_written_is_written_and_counted():
    """A version of the tensor is spent, so that autograd sees who read it before."""
    total = torch.ones(3)
    before = total._version
    assert toy_add_to(Total(torch.arange(3.0), total, 2.0)).tolist() == [0, 2, 4]
    assert total.tolist() == [1, 3, 5] and total._version > before
