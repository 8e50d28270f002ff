"""What has a name: the losses, made with the arguments that some want, and all that is public."""

import fused_rl
from fused_rl import preference, scores
from fused_rl.losses.named import NAMES
from fused_rl.losses.preference.named import NAMES as PREFERENCES

NEEDS = {"dr_grpo": {"length": 11}, "kimi": {"tau": 0.5}}


def loss_of(name: str, **options):
    """NAMES[name], made."""
    return NAMES[name](**NEEDS.get(name, {}), **options)


def preference_loss(name: str, **options) -> preference.PreferenceLoss:
    """That of fused_rl.preference, made."""
    parts = [(0.8, preference.dpo()), (0.2, preference.bco_pair()), (1.0, preference.sft())]
    needs = {"f_dpo": scores.Alpha(0.5), "ld_dpo": 0.3, "mixture": parts}
    return PREFERENCES[name](*([needs[name]] if name in needs else []), **options)


def public() -> dict[str, object]:
    """Everything public by its last name, at the top and under the public modules."""
    top = {name: getattr(fused_rl, name) for name in fused_rl.__all__}
    under = {name: getattr(m, name) for m in fused_rl.MODULES for name in m.__all__}
    assert all(top.get(name, thing) is thing for name, thing in under.items())
    return {**under, **top}
