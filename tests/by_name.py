"""What has a name: the losses, made with the arguments that some want, and all that is public."""

import fused_rl
from fused_rl.losses.named import NAMES

NEEDS = {"dr_grpo": {"length": 11}, "kimi": {"tau": 0.5}}


def loss_of(name: str, **options):
    """NAMES[name], made."""
    return NAMES[name](**NEEDS.get(name, {}), **options)


def public() -> dict[str, object]:
    """Everything public by its last name, at the top and under the public modules."""
    top = {name: getattr(fused_rl, name) for name in fused_rl.__all__}
    under = {name: getattr(m, name) for m in fused_rl.MODULES for name in m.__all__}
    assert all(top.get(name, thing) is thing for name, thing in under.items())
    return {**under, **top}
