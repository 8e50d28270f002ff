"""Rounded logits of a head whose vocabulary is spread over ranks, against the whole head's."""

import torch
import torch.distributed as dist
from cases_spread import cut, relative
from rounded_cases import lm_head, random_head

from fused_rl import LMHead, TokenBatch, grpo, linear_kept_logprobs, linear_logprobs
from fused_rl import linear_policy_loss as policy_loss
from fused_rl.parallel.states import Hidden

IGNORED = -100


def over_ranks(rank, world, hidden="REPLICATED"):
    """The largest relative differences of log-probs, renormalised ones, losses; of gradients."""
    torch.manual_seed(0)
    head = random_head(24, 16, 97, torch.float64)
    kept = (head.labels.clamp(min=0)[:, None] + torch.tensor([0, 5, 90])) % 97
    sets, a = (kept.flatten(), torch.arange(25) * 3), torch.randn(24, dtype=torch.float64)
    batch = TokenBatch.packed(
        *(head.labels, torch.tensor([0, 9, 24]), a.abs()), loss_mask=head.labels != IGNORED
    )
    rows, how = cut(97, rank, world), Hidden[hidden]
    options = {"group": dist.group.WORLD, "start": rows.start, "vocabulary": 97, "hidden": how}
    mine = slice(None)
    if how is Hidden.OWN_TOKENS:
        mine = slice(rank * 24 // world, (rank + 1) * 24 // world)

    def run(tokens, columns, **options):
        leaves = [t.clone().requires_grad_() for t in head[:3]]
        whole = lm_head(head, *(t[columns] for t in leaves[1:]))
        given = LMHead(whole.weight, whole.bias, whole.scale, whole.softcap,
                       logits_dtype=whole.logits_dtype, **options)  # fmt: skip
        h, t = leaves[0][tokens], head.temperature[tokens]
        stats = linear_logprobs(h, given, head.labels[tokens], temperature=t)
        values = [stats.logprobs, stats.entropy]
        if how is Hidden.REPLICATED:
            values.append(linear_kept_logprobs(h, given, head.labels, *sets, temperature=t)[2])
            values.append(policy_loss(h, given, batch, grpo(), temperature=t).loss[None])
        sum((v * a[tokens][: len(v)]).sum() for v in values).backward()
        return values, [leaves[0].grad[tokens], *(t.grad[columns] for t in leaves[1:])]

    values, (dhidden, *of_rows) = run(mine, rows, **options)
    right, (exact_dhidden, *exact_rows) = run(slice(None), slice(None))
    share = world if how is Hidden.OWN_TOKENS else 1
    gaps = [relative(x, y[mine] if len(y) == 24 else y) for x, y in zip(values, right, strict=True)]
    gaps.append(relative(dhidden, exact_dhidden[mine]))
    pairs = zip(of_rows, exact_rows, strict=True)
    return gaps + [relative(share * x, y[rows]) for x, y in pairs]
