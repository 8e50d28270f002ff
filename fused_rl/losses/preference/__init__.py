"""Preference losses: DPO, IPO, SimPO, ORPO, KTO and their kin, one composition of score and link.

    loss = coef * mean_p link(score(chosen[p]), score(rejected[p])) + likelihood * NLL(chosen)

linear_preference_loss forms it from hidden states and the head, loss(stats, batch) from log-probs.
What losses are made of is in fused_rl.scores and fused_rl.links.
"""

from fused_rl.losses.preference.batch import PreferenceBatch
from fused_rl.losses.preference.loss import PreferenceLoss, WeightedSum
from fused_rl.losses.preference.named import (
    alphapo,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    apo_zero_unpaired,
    bco,
    bco_pair,
    cpo,
    discopop,
    dpo,
    dpo_norm,
    exo,
    f_dpo,
    hinge,
    ipo,
    kto,
    ld_dpo,
    mixture,
    nca,
    orpo,
    robust,
    rpo,
    sft,
    simpo,
    sppo,
    wpo,
)
from fused_rl.losses.preference.points import BatchMean, MismatchedMean
from fused_rl.losses.preference.sequences import SequenceStats
from fused_rl.losses.preference.weights import WPOWeight

__all__ = [
    "BatchMean",
    "MismatchedMean",
    "PreferenceBatch",
    "PreferenceLoss",
    "SequenceStats",
    "WPOWeight",
    "WeightedSum",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "cpo",
    "discopop",
    "dpo",
    "dpo_norm",
    "exo",
    "f_dpo",
    "hinge",
    "ipo",
    "kto",
    "ld_dpo",
    "mixture",
    "nca",
    "orpo",
    "robust",
    "rpo",
    "sft",
    "simpo",
    "sppo",
    "wpo",
]
