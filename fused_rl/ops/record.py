"""Operators of torch, written as functions of a few records.

A record is a NamedTuple of tensors and numbers. Its fields are arguments of the operator, in order,
and the results are the fields of the record that the function returns:

    class Rows(NamedTuple):
        x: Tensor  # [N, V]
        scale: float

    class Sums(NamedTuple):
        total: Tensor  # [N]
        largest: Tensor  # [N]

    class OfSums(NamedTuple):
        dtotal: Tensor  # [N], the gradient of total; `largest` has none

    @Operator
    def row_sums(rows: Rows) -> Sums: ...  # plain torch, for every device without a kernel

    @Operator
    def row_sums_backward(up: OfSums, rows: Rows) -> Tensor: ...  # dx, that of the first argument

    row_sums.fake(lambda rows: Sums(*(rows.x.new_empty(rows.x.shape[:1]) for _ in range(2))))
    row_sums_backward.fake(lambda up, rows: rows.x.new_empty(rows.x.shape))
    row_sums.differentiate(row_sums_backward, of="row_sums")
    row_sums.kernel("cuda", in_triton)  # in_triton(rows) -> Sums

A kernel in C++ is registered under the same name, and takes the fields in the same order.

Shapes: N tokens, H hidden sizes, V vocabulary entries; results in float32, or float64 where an
input is float64. A token whose label is `ignore_index` gives zeros, costs nothing and passes no
gradient. A vocabulary entry whose logit is -inf has a gradient of exactly 0. A token's logits may
be as large as the dtype holds, also in every entry: log_sum = lse - max, which an lse of that size
has no room for, is found again where the gradient needs it.
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple, NewType, get_type_hints

import torch
from torch import Tensor
from torch.library import custom_op

from fused_rl import reference
from fused_rl.derivatives import call, register_gradient
from fused_rl.ops.autocast import in_full


class Head(NamedTuple):
    """What the logits of N tokens are made of; reference.py has the formula."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N]
    scale: float
    softcap: float  # 0: none
    rounding: int = 0  # a place in reference.ROUNDED; 0: none

    @property
    def dtype(self) -> torch.dtype:
        """What the logits are formed in."""
        return reference.acc_dtype(self.hidden, self.weight)

    def at(self, rows: Tensor | slice) -> "Head":
        """The same for some of the tokens."""
        hidden, labels, temperature = self.hidden[rows], self.labels[rows], self.temperature[rows]
        return self._replace(hidden=hidden, labels=labels, temperature=temperature)

    def logits(self) -> Tensor:  # [N, V]
        operands = (self.hidden, self.weight, self.bias, self.temperature)
        return reference.logits(*operands, *self[5:])


class Limits(NamedTuple):
    """ignore_index: the label of tokens that are left out. chunk_bytes: a bound on the scratch."""

    ignore_index: int
    chunk_bytes: int


class Statistics(NamedTuple):
    """[N] each. lse is in float64: its rounding is a relative error of every probability."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor
    top: Tensor


class Upstream(NamedTuple):
    """The gradients of a loss with respect to the statistics, [N] each."""

    dlogprobs: Tensor
    dentropy: Tensor


class Known(NamedTuple):
    """What the backward pass takes from the forward pass, [N] each."""

    lse: Tensor
    entropy: Tensor


class Given(NamedTuple):
    """Whether a loss depends on the entropy at all."""

    has_dentropy: bool


class Needs(NamedTuple):
    """Which gradients are asked for; the others come back empty."""

    need_dhidden: bool
    need_dweight: bool
    need_dbias: bool


class Gradients(NamedTuple):
    """Each in the shape and dtype of what it is the gradient of, or empty."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


# A tensor that the operator writes to.
Written = NewType("Written", Tensor)

# torch numbers what is written by its position.
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Written: "Tensor(a{}!)",
    float: "float",
    int: "SymInt",
    bool: "bool",
}


class Operator:
    """A function of records as an operator of torch.

    plain: the function, in plain torch: what runs on a device without a kernel.
    takes: the arguments, name -> type. gives: the names of the results, where there are several.
    """

    def __init__(self, plain: Callable) -> None:
        *records, result = get_type_hints(plain).values()
        self.plain, self.records, self.result = plain, records, result
        self.__name__, self.__doc__ = plain.__name__, plain.__doc__
        fields = [field for record in records for field in get_type_hints(record).items()]
        self.takes = dict(fields)
        assert len(self.takes) == len(fields), "two records have a field of the same name"
        self.gives = () if result is Tensor else result._fields
        self.op = custom_op(
            "fused_rl::" + plain.__name__,
            in_full(self.flat(plain)),
            mutates_args=[name for name, kind in fields if kind is Written],
            schema=self._schema(),
        )

    def _schema(self) -> str:
        typed = (f"{_TYPES[t].format(i)} {name}" for i, (name, t) in enumerate(self.takes.items()))
        results = f"({', '.join(['Tensor'] * len(self.gives))})" if self.gives else "Tensor"
        return f"({', '.join(typed)}) -> {results}"

    def flat(self, function: Callable) -> Callable:
        """function(*records) as torch calls it: the fields of all of them, in a row."""

        def run(*args):
            rest = iter(args)
            out = function(*(r._make(islice(rest, len(r._fields))) for r in self.records))
            return tuple(out) if self.gives else out

        return run

    def __call__(self, *records: tuple) -> Tensor | tuple:
        out = call(self.op, *[field for record in records for field in record])
        return self.result(*out) if self.gives else out

    def fake(self, function: Callable) -> Callable:
        """function(*records): results without values, of the right shapes, dtypes and strides."""
        self.op.register_fake(self.flat(function))
        return function

    def kernel(self, device: str, function: Callable) -> None:
        """function(*records) takes the place of `plain` on a type of device."""
        self.op.register_kernel(device)(in_full(self.flat(function)))

    def differentiate(self, backward: "Operator", of: str) -> None:
        """backward gives the gradients of the first arguments, and takes what it names.

        x is an argument or a result x of this operator, dx the gradient of a result x, which is
        zeros where a loss does not depend on it; has_dx says whether it does, and need_dx whether
        an argument x requires a gradient. Results whose gradient it does not take have none. `of`
        is the public function, for the errors.
        """
        rule = _Rule(self, backward)
        register_gradient(of, self.op, backward.op, rule.gradient, rule.save)


class _Rule:
    """What the backward pass of an operator takes, found by its names; kept as positions."""

    def __init__(self, forward: Operator, backward: Operator) -> None:
        arguments, results, taken = tuple(forward.takes), forward.gives, backward.takes
        names = (*arguments, *results)
        self.backward, self.count = backward, max(1, len(backward.gives))
        self.tensors = [i for i, n in enumerate(names) if taken.get(n) in (Tensor, Tensor | None)]
        self.numbers = [i for i, n in enumerate(names) if n in taken and i not in self.tensors]
        # The results that have a gradient.
        self.moving = [i for i, n in enumerate(results) if f"d{n}" in taken]
        known = [names[i] for i in (*self.tensors, *self.numbers)]
        known += [f"d{results[i]}" for i in self.moving]
        known += [f"has_d{results[i]}" for i in self.moving]
        known += [f"need_d{n}" for n in arguments[: self.count]]
        self.order = [known.index(n) for n in taken]
        self.rest = (None,) * (len(arguments) - self.count)

    def save(self, ctx, inputs, output) -> None:
        values = (*inputs, *output)
        ctx.save_for_backward(*[values[i] for i in self.tensors])
        ctx.numbers = [values[i] for i in self.numbers]
        ctx.shapes = [(output[i].shape, output[i].dtype) for i in self.moving]
        ctx.mark_non_differentiable(*[t for i, t in enumerate(output) if i not in self.moving])
        ctx.set_materialize_grads(False)

    def gradient(self, ctx, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[: self.count]
        moving = zip([upstream[i] for i in self.moving], ctx.shapes, strict=True)
        grads = [
            saved[0].new_zeros(shape, dtype=dtype) if g is None else g.to(dtype)
            for g, (shape, dtype) in moving
        ]
        given = (upstream[i] is not None for i in self.moving)
        known = (*saved, *ctx.numbers, *grads, *given, *needs)
        found = call(self.backward.op, *[known[i] for i in self.order])
        found = found if self.backward.gives else (found,)
        return (*[g if n else None for g, n in zip(found, needs, strict=True)], *self.rest)
