"""A report as a picture: the differences beside what rounding alone gives, and both log-probs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fused_rl.rollouts.mismatch import MismatchReport
from fused_rl.system.drawing import INK, MUTED, STRONG, frame, new_figure, save, title

# In nats; what is less is drawn there.
LEAST = 1e-7
BINS = 48
# More would only cover each other.
DOTS = 2000


def write(path: Path, report: MismatchReport) -> None:
    """Draws a report of at least one token into an .svg or a .png.

    Raises:
        Unwritable: the file cannot be written.
    """
    figure = new_figure((8.6, 3.6))
    sizes, scatter = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_sizes(sizes, report)
    draw_scatter(scatter, report)
    words = f"{len(report.logprobs)} tokens, mean difference {report.mean_abs:.3g} nats"
    names = ", ".join(finding.name for finding in report.findings)
    title(figure, f"rollout mismatch: {report.verdict}", f"{words}; {names or 'nothing found'}")
    save(figure, path)


def draw_sizes(panel, report: MismatchReport) -> None:
    """How the differences are distributed over powers of 10, and where rounding alone puts them."""
    frame(panel)
    observed = (report.logprobs - report.rollout_logprobs).abs()
    rounding = report.rounding_errors.abs()
    highest = max(observed.max().item(), report.rounding.max, 10 * LEAST)
    edges = torch.logspace(
        *(torch.tensor([LEAST, 1.2 * highest], dtype=torch.float64).log10().tolist()),
        BINS + 1,
        dtype=torch.float64,
    )
    looks = ((rounding, MUTED[0], "rounding alone"), (observed, STRONG, "observed"))
    for errors, colour, name in looks:
        shares = share_of(errors, edges)
        panel.stairs(shares, edges.tolist(), color=colour, fill=True, alpha=0.25)
        panel.stairs(shares, edges.tolist(), color=colour, lw=1.4, label=name)
    panel.set(xscale="log", xlabel="|trainer - engine|, nats", ylabel="share of the tokens")
    panel.set_ylim(bottom=0)
    panel.tick_params(which="minor", colors=INK)
    panel.legend(frameon=False, fontsize=8, labelcolor="linecolor", loc="upper left")


def share_of(errors: Tensor, edges: Tensor) -> list[float]:
    """[bins]: the share of the errors in each; those below or above count in the outermost."""
    held = errors[errors.isfinite()].clamp(edges[0].item(), edges[-1].item())
    places = (torch.bucketize(held, edges, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.bincount(places, minlength=len(edges) - 1).double()
    return (counts / max(len(held), 1)).tolist()


def draw_scatter(panel, report: MismatchReport) -> None:
    """A dot for each token, or for some of many; on the line both sides say the same."""
    frame(panel)
    count = len(report.logprobs)
    chosen = torch.arange(min(count, DOTS)) * count // min(count, DOTS)
    x, y = (v[chosen].tolist() for v in (report.rollout_logprobs, report.logprobs))
    low = min(*x, *y)
    panel.plot((low, 0), (low, 0), color=INK, lw=0.8)
    panel.scatter(x, y, s=6, color=STRONG, alpha=0.5, lw=0)
    panel.set(xlabel="engine's log-prob, nats", ylabel="trainer's log-prob, nats")
