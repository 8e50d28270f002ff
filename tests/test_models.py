"""Every type of language model in transformers, made tiny: right, or a ValueError; never silence.

`python tests/test_models.py` prints the table.
"""

import sys

import pytest
import tiny_models
import torch
from torch import Tensor

from fused_rl import TokenStats
from fused_rl.integrations.transformers import logprobs
from fused_rl.models.asked import accepted

TOLERANCE = 1e-4  # nats


def stats_of(logits: Tensor, ids: Tensor) -> TokenStats:
    logp = logits[:, :-1].double().log_softmax(-1)
    chosen = logp.gather(-1, ids[:, 1:, None])[..., 0]
    # p log p is 0 at tokens that are ruled out.
    return TokenStats(chosen, -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1))


def own(model: torch.nn.Module, **inputs: Tensor) -> Tensor:
    return model(**accepted(model, {**inputs, "use_cache": False})).logits


def gap(ours: TokenStats, theirs: TokenStats, counted: Tensor | None = None) -> float:
    gaps = [(a.double() - b.double()).abs() for a, b in zip(ours, theirs, strict=True)]
    worst = [g if counted is None else g[counted] for g in gaps]
    return max(g.nan_to_num(torch.inf).max().item() for g in worst)


@torch.no_grad()
def judged(kind: str) -> tuple[str, str]:
    """("right", gaps), ("refused", why), ("not built", why) or ("wrong", gaps)."""
    torch.manual_seed(1)
    ids = torch.randint(20, 60, (3, 9))
    try:
        model = tiny_models.build(kind)
    except Exception as error:
        return "not built", said(error)
    try:
        ours = logprobs(model, ids)
    except ValueError as error:
        return "refused", str(error)
    found = {"plain": gap(ours, stats_of(own(model, input_ids=ids), ids))}
    for side, columns in (("left", slice(0, 4)), ("right", slice(5, 9))):
        mask = torch.ones_like(ids)
        mask[1, columns] = 0
        try:
            found[side] = padded_gap(model, ids, mask)
        except Exception as error:
            return "not built", f"with padding on the {side}, {said(error)}"
    gaps = ", ".join(f"{side} {value:.1e}" for side, value in found.items())
    return "right" if max(found.values()) <= TOLERANCE else "wrong", gaps


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def padded_gap(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> float:
    """From rows alone, or, where padding changes a model, from its own padded forward: as it is
    called, or with the positions that it generates with."""
    ids = ids.where(mask != 0, 0)
    ours = logprobs(model, ids, attention_mask=mask)
    counted = (mask[:, 1:] & mask[:, :-1]).bool()
    rows = [own(model, input_ids=row[m != 0][None]) for row, m in zip(ids, mask, strict=True)]
    alone = torch.zeros(*ids.shape, rows[0].shape[-1])
    for logits, row, m in zip(rows, alone, mask, strict=True):
        row[m != 0] = logits[0]
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = [alone, own(model, **inputs)]
    if hasattr(model, "_prepare_position_ids_for_generation"):
        positions = model._prepare_position_ids_for_generation(ids, {"attention_mask": mask})
        found.append(own(model, **accepted(model, {**inputs, "position_ids": positions})))
    return min(gap(ours, stats_of(logits, ids), counted) for logits in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_models.types())
def test_every_type_is_right_or_refused(kind):
    verdict, why = judged(kind)
    if verdict == "not built":
        pytest.skip(why)
    assert verdict != "wrong", why


def main() -> None:
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    for kind in sys.argv[1:] or tiny_models.types():
        verdict, why = judged(kind)
        print(f"{kind:32} {verdict:10} {' '.join(why.split())}", flush=True)


if __name__ == "__main__":
    main()
