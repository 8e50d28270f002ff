"""Quantised layers and weights, by the packages that make them: what to do about each.

A head of codes is none of ours: the products take floating point, and a copy [V, H] in it is what
the head would be formed of in every call.
"""

from __future__ import annotations

_PACKAGES = {"bitsandbytes", "torchao", "optimum", "hqq", "auto_gptq", "awq", "gptqmodel"}

# What gives [V, H] of the weight of a layer, by a class that it is an instance of.
_DEQUANTISED = {
    "Params4bit": "bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)",
    "Int8Params": "bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scb), "
    "scb = layer.state.SCB if weight.SCB is None else weight.SCB",
}

SKIP = (
    "leave lm_head out of the quantisation, as transformers does unless it is told otherwise "
    "(llm_int8_skip_modules of bitsandbytes, modules_to_not_convert of others)"
)


def room_of(thing: object) -> str:
    """The package that its class is of."""
    return type(thing).__module__.partition(".")[0]


def is_quantised(layer: object) -> bool:
    """Whether a layer, or its weight, is of a package that quantises."""
    return bool({room_of(layer), room_of(getattr(layer, "weight", None))} & _PACKAGES)


def way_out(weight: object) -> str:
    """What to do about a weight that is no plain tensor."""
    kinds = [kind.__name__ for kind in type(weight).__mro__]
    way = next((_DEQUANTISED[kind] for kind in kinds if kind in _DEQUANTISED), None)
    if (
        way is None
        and hasattr(type(weight), "dequantize")
        and hasattr(type(weight), "__tensor_flatten__")
    ):
        way = "weight.dequantize()"
    if way is None:
        return SKIP
    return (
        f"dequantise it: LMHead(w, bias, scale, softcap) with weight = layer.weight, w = {way}; a "
        f"copy, to be formed once as long as it is not trained. Or {SKIP}"
    )
