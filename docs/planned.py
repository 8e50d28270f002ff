"""docs/images/plan.svg, for docs/limits.md: `make docs` runs this.

What a step needs beside hidden states and weight at Qwen3-8B's head, against its tokens: as
`fused-rl plan --device h100` says it.
"""

from __future__ import annotations

from pathlib import Path

from fused_rl.plan.devices import CARDS
from fused_rl.plan.memory import Plan, plan
from fused_rl.plan.report import readable
from fused_rl.system.drawing import INK, MARKERS, MUTED, STRONG, frame, new_figure, save

PICTURE = Path(__file__).resolve().parent / "images" / "plan.svg"
HEAD, CARD = {"hidden_size": 4096, "vocab_size": 151936}, "h100"
FEWEST, MOST = 10, 16
# Between two powers of 2.
STEPS = 4

# A way's name in the plan -> what the picture calls it, colour, dashes.
WAYS = {
    "eager torch": ("eager torch", INK, (0, (5, 2))),
    "linear_policy_loss": ("linear_policy_loss", STRONG, "-"),
    "linear_logprobs": ("linear_logprobs, then any loss", MUTED[0], (0, (1, 1.2))),
    "linear_logprobs, no gradient": ("linear_logprobs, no gradient", MUTED[2], (0, (4, 1, 1, 1))),
}
# Of the label at a line's end, in points, where two lines end together.
SHIFTS = {"linear_policy_loss": 13, "linear_logprobs": -13}


def plans() -> list[Plan]:
    """From 2 ** FEWEST tokens to 2 ** MOST."""
    powers = (FEWEST + i / STEPS for i in range(STEPS * (MOST - FEWEST) + 1))
    return [plan(HEAD, round(2**power), device=CARD) for power in powers]


def peaks(planned: list[Plan], name: str) -> list[int]:
    """Bytes of a way, of each plan."""
    return [way.peak for p in planned for way in p.ways if way.name == name]


def work(planned: list[Plan], name: str) -> str:
    """A way's NHV, and how they change with more tokens."""
    found = [way.nhv for p in planned for way in p.ways if way.name == name]
    return f"{', then '.join(map(str, dict.fromkeys(found)))} NHV"


def rule(panel, size: int, text: str, shift: int) -> None:
    """A size to compare with; shift: of its text, in points."""
    panel.axhline(size, color=INK, lw=0.9, ls=(0, (1, 3)))
    panel.annotate(
        f"{text}, {readable(size)}",
        (2**FEWEST, size),
        xytext=(2, shift),
        textcoords="offset points",
        fontsize=9,
        color=INK,
    )


def draw(path: Path) -> None:
    from matplotlib.ticker import NullLocator

    planned = plans()
    tokens = [p.tokens for p in planned]
    figure = new_figure((8.0, 4.4))
    panel = figure.subplots()
    frame(panel)
    for (name, (label, colour, dashes)), marker in zip(WAYS.items(), MARKERS, strict=False):
        found = peaks(planned, name)
        panel.plot(
            *(tokens, found),
            color=colour,
            lw=1.8,
            ls=dashes,
            marker=marker,
            ms=5,
            markevery=STEPS,
        )
        panel.annotate(
            f"{label}\n{work(planned, name)}, {readable(found[-1])}",
            (tokens[-1], found[-1]),
            xytext=(8, SHIFTS.get(name, 0)),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
        )
    rule(panel, CARDS[CARD].memory_gb * 10**9, "all memory of the card", 4)
    rule(panel, 2 * HEAD["hidden_size"] * HEAD["vocab_size"], "the gradient of the weight", -12)
    panel.set(xscale="log", yscale="log", xlabel="tokens of a step", ylabel="extra memory at peak")
    powers = range(FEWEST, MOST + 1)
    panel.set_xticks([2**k for k in powers], labels=[f"{2**k // 1024}k" for k in powers])
    sizes = [2**k for k in range(20, 37, 2)]
    panel.set_yticks(sizes, labels=[readable(size).replace(".0", "") for size in sizes])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.set_ylim(2**19.3, 2**37.5)
    save(figure, path)


if __name__ == "__main__":
    draw(PICTURE)
