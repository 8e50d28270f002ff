"""Derivatives of the operators: torch's own gradient, and what torch.func and forward mode see.

torch.func cannot reach the gradient of a custom operator, and forward mode finds no derivative in
one and takes its result for a constant: a tangent of 0, which is a wrong number. Wherever either is
at work, `call` runs the operator inside an autograd.Function that has the same gradient: grad, vjp,
jacrev and vmap of them are right then, forward mode and second derivatives raise.
"""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef


class _Derivative(NamedTuple):
    missing: str  # what there is not, should someone ask for it
    gradient: Callable
    setup_context: Callable


_OF: dict[CustomOpDef, _Derivative] = {}


def register_gradient(
    function: str,
    op: CustomOpDef,
    backward: CustomOpDef,
    gradient: Callable,
    setup_context: Callable,
) -> None:
    """op.register_autograd(gradient), where gradient calls backward, which has none of its own.

    function: the public name, for the errors.
    """
    forward_mode = (
        f"{function} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad): take reverse mode, which is torch.func.vjp, jacrev or backward"
    )
    second = (
        f"{function} has no second derivative (create_graph, torch.func.hessian, a gradient or "
        "tangent of its gradient): take plain torch on LMHead.logits for the few tokens it is for"
    )
    _OF[op] = _Derivative(forward_mode, gradient, setup_context)
    _OF[backward] = _Derivative(second, _no_gradient(second), _nothing)
    for operator in (op, backward):
        of = _OF[operator]
        operator.register_autograd(of.gradient, setup_context=of.setup_context)


def _no_gradient(message: str) -> Callable:
    def gradient(ctx, *upstream) -> NoReturn:
        raise NotImplementedError(message)

    return gradient


def _nothing(ctx, inputs, output) -> None:
    pass


def transformed() -> bool:
    """Whether torch.func, or forward mode, is at work. A Function without a rule for it is not."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_constant(tensor: Tensor) -> bool:
    """Whether no derivative with respect to it can be asked for.

    Under torch.func, requires_grad is that of the innermost transform alone, and a tangent is none.
    """
    return not tensor.requires_grad and (torch.compiler.is_compiling() or not transformed())


def call(op: CustomOpDef, *args: object) -> tuple[Tensor, ...]:
    """op(*args) with its derivatives.

    Raises:
        NotImplementedError: a tangent among args; at the backward pass, a second derivative.
    """
    if torch.compiler.is_compiling():
        # Tensors do not show their tangents here: none may be about.
        if forward_ad._current_level >= 0:
            raise NotImplementedError(_OF[op].missing)
        return op(*args)
    if not transformed():
        return op(*args)
    # A tangent of what vmap batches does not reach the Function's jvp: functorch fails on the way.
    if forward_ad._current_level >= 0 and any(map(_is_batched, args)):
        raise NotImplementedError(_OF[op].missing)
    return _Call.apply(*args, op)


def _is_batched(value: object) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


class _Call(torch.autograd.Function):
    """The operator, last of the arguments, and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return args[-1](*args[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[-1]
        _OF[ctx.op].setup_context(ctx, inputs[:-1], output)

    @staticmethod
    def backward(ctx, *upstream):
        gradients = _OF[ctx.op].gradient(ctx, *upstream)
        # Within vmap the public function does not see what requires one.
        if any(g is None and n for g, n in zip(gradients, ctx.needs_input_grad, strict=False)):
            raise NotImplementedError("temperature gets no gradient: detach it")
        return (*gradients, None)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_OF[ctx.op].missing)
