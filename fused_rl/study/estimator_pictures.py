"""Pictures of how well the KL is estimated, drawn from the numbers of estimators.py."""

from __future__ import annotations

from fused_rl.study.part import Numbers
from fused_rl.system.drawing import INK, MUTED, STRONG, frame, new_figure

BROWN, VIOLET, GREEN, RED = MUTED[:4]
LOOKS = {"k1": (RED, "--"), "k2": (BROWN, "-."), "k3": (STRONG, "-")}


def spread(numbers: Numbers):
    """What one token's estimate is, over the KL: bands of its quantiles, its mean and its std."""
    figure = new_figure((9, 3.5))
    panels = figure.subplots(1, 3, sharey=True)
    rows = numbers["quantiles"]
    kls = [row["kl"] for row in rows]
    for panel, name in zip(panels, LOOKS, strict=True):
        frame(panel)
        low, tenth, median, ninetieth, high = zip(*(row[name] for row in rows), strict=True)
        panel.fill_between(kls, low, high, color=STRONG, alpha=0.2, lw=0)
        panel.fill_between(kls, tenth, ninetieth, color=STRONG, alpha=0.35, lw=0)
        for edge in (low, high):
            panel.plot(kls, edge, color=STRONG, lw=0.8)
        panel.plot(kls, median, color=STRONG, lw=1.8)
        moments = [row[name] for row in numbers["gaussians"]["shifted"]]
        panel.plot(kls, [1 + m["bias"] for m in moments], color=INK, lw=1.4, ls="--")
        panel.plot(kls, [1 + m["bias"] + m["std"] for m in moments], color=INK, lw=1.2, ls=":")
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=2, linscale=0.8)
        panel.set_ylim(-400, 3000)
        panel.set_yticks([-100, -10, -1, 0, 1, 10, 100, 1000])
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.minorticks_off()
        panel.set_xlabel("true KL, nats")
        panel.set_title(name, color=INK, fontsize=10, loc="left")
    panels[0].set_ylabel("estimate of one token / true KL")
    write(panels[1], 2e-4, 4, "1 to 99 %", STRONG, offset=(0, -1))
    write(panels[1], 2e-4, 1.4, "10 to 90 %", STRONG, offset=(0, 0))
    write(panels[1], 2e-4, 0, "median", STRONG, offset=(0, -12))
    write(panels[2], 2e-4, 1, "mean", INK, offset=(0, 4))
    write(panels[2], 0.35, 200, "mean + std", INK, offset=(-22, 0))
    return figure


def samples(numbers: Numbers):
    """Tokens whose mean is the KL within 10 %, over the KL."""
    figure = new_figure((7.5, 4.2))
    panel = figure.subplots()
    frame(panel)
    for name, (colour, style) in LOOKS.items():
        draw_samples(panel, numbers["gaussians"]["shifted"], name, colour, style, 2.0)
    draw_samples(panel, numbers["gaussians"]["sharper"], "k3", GREEN, (0, (1, 1.2)), 2.2)
    kls = [row["kl"] for row in numbers["gaussians"]["shifted"]]
    panel.plot(kls, [1] * len(kls), color=INK, lw=2)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.minorticks_off()
    panel.set_ylim(0.6, 5e6)
    panel.set_xlabel("true KL per token, nats")
    panel.set_ylabel("independent tokens for a standard error of 10 %")
    crossing = numbers["limits"]["k3 over k1"]["shifted"]
    end = numbers["limits"]["k3 without variance"]["sharper"]
    biased = numbers["limits"]["k2 biased"]["shifted"]
    panel.axvline(end, ymin=0.42, color=GREEN, lw=0.8, ls=":")
    panel.plot([crossing], [200 / crossing], "o", color=INK, ms=6, mfc="none")
    panel.plot([crossing] * 2, [40, 250 / crossing], color=INK, lw=0.8)
    panel.plot([biased], [200 * (1 + biased)], "X", color=BROWN, ms=7)
    write(panel, 2.5e-4, 8e5, "k1", RED, offset=(12, 6))
    write(panel, 2.5e-4, 200, "k2 and k3", STRONG, offset=(0, -12))
    write(panel, 5.6, 2e5, "k3", STRONG, offset=(8, 4))
    write(panel, 6.0, 33, "k1", RED, offset=(4, 6))
    write(panel, biased, 200, "k2 ends: its bias is over 10 %", BROWN, offset=(-118, -16))
    write(panel, crossing, 320, f"k1 and k3 cross\nat {crossing:.2g} nats", INK, offset=(-6, -58))
    write(panel, 2.5e-4, 1450, "k3, policy sharper than the reference", GREEN, offset=(0, -14))
    write(panel, end, 3e5, f"no variance\nfrom {end:.2g} nats on", GREEN, offset=(5, 20))
    write(panel, 2.5e-4, 1, "the exact KL: no noise of sampling", INK, offset=(0, 6))
    return figure


def draw_samples(panel, rows: list[Numbers], name: str, colour: str, style, width: float) -> None:
    """A line that ends where no number of samples is enough."""
    found = [(row["kl"], row[name]["samples"]) for row in rows if row[name]["samples"] is not None]
    panel.plot(*zip(*found, strict=True), color=colour, ls=style, lw=width)


ROUNDED = {
    "float32": ("float32", STRONG, "-", "o"),
    "bf16 log-probs": ("both log-probs bf16", BROWN, "-.", "s"),
    "bf16 logits": ("both logits bf16", RED, "--", "D"),
    "reference's logits bf16": ("reference's logits bf16", VIOLET, ":", "^"),
    "exp in bf16": ("k3 formed in bf16", GREEN, (0, (5, 1, 1, 1, 1, 1)), "v"),
}


def rounding(numbers: Numbers):
    """The expected k3 over the true KL, where what it is formed of was rounded."""
    figure = new_figure((7.5, 4.2))
    panel = figure.subplots()
    frame(panel)
    rows = [row for row in numbers["rounding"] if row["scale"] == "peaked" and row["kl"] > 0]
    kls = [row["kl"] for row in rows]
    panel.axvspan(1e-3, 1e-1, color=INK, alpha=0.12, lw=0)
    ends = {}
    for name, (_, colour, style, marker) in ROUNDED.items():
        ratio = [row["rounding"][name]["k3"] / row["kl"] for row in rows]
        panel.plot(kls, ratio, color=colour, ls=style, marker=marker, ms=5, lw=1.8)
        ends[name] = ratio[0]
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(kls[0] / 24, 0.5)
    panel.set_yticks([1, 2, 5, 10, 20, 50])
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.minorticks_off()
    lowest = 0.0
    for name in sorted(ends, key=ends.get):
        label, colour, *_ = ROUNDED[name]
        lowest = max(ends[name], lowest * 1.35)
        panel.text(
            kls[0] / 1.25, lowest, label, color=colour, fontsize=8.5, ha="right", va="center"
        )
    panel.set_xlabel("true KL per token, nats")
    panel.set_ylabel("expected k3 / true KL")
    panel.text(1e-2, max(ends.values()), "GRPO's usual range", color=INK, fontsize=8.5, ha="center")
    return figure


CLAMPED = {
    "exponent held at 20": ("exponent at 20 nats, or log-ratio within 20", STRONG, "-"),
    "log-ratio within 10": ("log-ratio within 10 nats", VIOLET, ":"),
    "value within 10": ("value at 10 nats", RED, "--"),
}


def clamp(numbers: Numbers):
    """The bias of k3 where it, or the log-ratio, is clamped, over the KL."""
    figure = new_figure((9, 3.5))
    panels = figure.subplots(1, 2, sharey=True)
    for panel, family in zip(panels, ("shifted", "sharper"), strict=True):
        frame(panel)
        rows = [row for row in numbers["clamped"] if row["family"] == family]
        for name, (label, colour, style) in CLAMPED.items():
            bias = [100 * row["bias"][name] for row in rows]
            kls = [row["kl"] for row in rows]
            panel.plot(kls, bias, color=colour, ls=style, lw=1.8, label=label)
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xlabel("true KL, nats")
        panel.set_title(f"policy {family}", color=INK, fontsize=9, loc="left")
    panels[0].set_ylabel("bias of k3, % of the KL")
    panels[0].legend(frameon=False, labelcolor=INK, fontsize=8, handlelength=3.5, loc="lower left")
    return figure


def write(panel, x: float, y: float, text: str, colour: str, offset=(0, 0)) -> None:
    """A label beside a line, offset in points."""
    panel.annotate(text, (x, y), offset, textcoords="offset points", color=colour, fontsize=8.5)
