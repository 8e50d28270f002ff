"""TRL's function of divergences, by our two heads."""

from typing import Any

from torch import Tensor

from fused_rl.checks import require
from fused_rl.integrations.trl.gathered import averaged
from fused_rl.kl.divergences import Divergence
from fused_rl.linear.divergence import linear_divergence
from fused_rl.linear.head import LMHead

_SIDE = ("hidden", "weight", "bias")
_AFTER = ("logit_scale", "final_logit_softcapping")
# What its forward takes after ctx, in TRL 1.16.
NAMES = (
    *(f"student_{name}" for name in _SIDE),
    *(f"teacher_{name}" for name in _SIDE),
    *("beta", "temperature"),
    *(f"student_{name}" for name in _AFTER),
    *(f"teacher_{name}" for name in _AFTER),
)


class FusedDivergence:
    """Stands where TRL's autograd function stood, and is called as that was, by `apply`."""

    def __init__(self, original: Any, names: tuple[str, ...]) -> None:
        self.original = original
        self.names = names

    def apply(self, *args: Any) -> tuple[Tensor, Tensor]:
        """What the original returns: (divergence [N], entropy [N] of the student).

        The student's hidden states, weight and bias have gradients, of the divergence alone.

        Raises:
            ValueError: vocabularies of different sizes; as linear_divergence raises.
        """
        given = dict(zip(self.names, args, strict=False))
        # A weight that ZeRO-3 has sharded has a ds_id; a teacher's is not gathered here.
        if any(hasattr(given[f"{side}_weight"], "ds_id") for side in ("student", "teacher")):
            return self.original.apply(*args)
        heads = [_head(given, side) for side in ("student", "teacher")]
        same_vocabulary(*heads)
        hidden, of_teacher = given["student_hidden"], given["teacher_hidden"].detach()
        stats = linear_divergence(
            *(hidden, heads[0], of_teacher, heads[1].detached()),
            divergence=Divergence.JSD(given["beta"]),
            temperature=given.get("temperature", 1.0),
        )
        return stats.divergence, stats.entropy.detach()


def _head(given: dict[str, Any], side: str) -> LMHead:
    scale, softcap = (given.get(f"{side}_{name}") for name in _AFTER)
    scale = 1.0 if scale is None else scale
    weight, bias = (averaged(given[f"{side}_{name}"]) for name in ("weight", "bias"))
    return LMHead(weight, bias, scale, softcap)


def same_vocabulary(student: LMHead, teacher: LMHead) -> None:
    """ValueError unless both heads have as many vocabulary entries."""
    V, of_teacher = len(student.weight), len(teacher.weight)
    require(
        of_teacher == V,
        lambda: (
            f"the student's head has {V} vocabulary entries and the teacher's {of_teacher}: which "
            "of them are the same tokens is not to be guessed; cut or resize one head so that the "
            "entries are the same (resize_token_embeddings), or train outside of patched()"
        ),
    )
