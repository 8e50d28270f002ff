"""The losses that have a name, made with the arguments that some of them want."""

from fused_rl.losses.named import NAMES

NEEDS = {"dr_grpo": {"length": 11}, "kimi": {"tau": 0.5}}


def loss_of(name: str, **options):
    """NAMES[name], made."""
    return NAMES[name](**NEEDS.get(name, {}), **options)
