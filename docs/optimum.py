"""docs/images/preference-optimum.svg, for docs/kl.md: `make docs` runs this.

Left, how far DPO is from its closed form while Adam trains it; right, what the reward costs in KL:
the closed form at every beta, and where trained policies end. See tests/preference_world.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from preference_world import ENDS, PreferenceWorld  # noqa: E402 - found by the line above

from fused_rl import preference  # noqa: E402
from fused_rl.system.drawing import INK, MUTED, STRONG, frame, new_figure, save  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "preference-optimum.svg"
BETAS = (0.5, 1.0, 2.0)
STEPS, EVERY = 750, 10
# Below it the curves show Adam's rounding.
LEAST = 1e-7


def distances(world: PreferenceWorld, beta: float) -> list[float]:
    """The largest error of a probability, every EVERY steps of Adam on the expected loss."""
    policy, best = world.ref.clone().requires_grad_(), world.best(beta)
    optimizer = torch.optim.Adam([policy], lr=0.02)
    found = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            error = (world.probability(policy.detach()) - best).abs().max()
            found.append(max(float(error), LEAST))
        optimizer.zero_grad()
        world.loss(policy, preference.dpo(beta)).loss.backward()
        optimizer.step()
    return found


def trade(world: PreferenceWorld, probability: Tensor) -> tuple[float, float]:
    return world.kl(probability), world.expected_reward(probability)


def draw_training(panel, world: PreferenceWorld) -> None:
    from matplotlib.ticker import NullLocator

    frame(panel)
    steps = [EVERY * i for i in range(STEPS // EVERY + 1)]
    for beta, dashes in zip(BETAS, ("-", (0, (4, 1.5)), (0, (1, 1.5))), strict=True):
        errors = distances(world, beta)
        panel.plot(steps, errors, color=STRONG, lw=1.6, ls=dashes, label=f"beta = {beta}")
    panel.axhline(1e-3, color=INK, lw=1.0, ls=(0, (1, 2)))
    panel.set(yscale="log", xlabel="steps of Adam", ylabel="largest |policy - closed form|")
    panel.set_ylim(LEAST / 2, 1.0)
    panel.yaxis.set_minor_locator(NullLocator())
    panel.legend(frameon=False, fontsize=8, labelcolor=INK)


def draw_trade(panel, world: PreferenceWorld) -> None:
    frame(panel)
    betas = torch.logspace(-1.3, 2, 200, dtype=torch.float64)
    curve = [trade(world, world.best(float(beta))) for beta in betas]
    panel.plot(*zip(*curve, strict=True), color=INK, lw=1.2, zorder=2)
    colours = dict(zip(("ipo", "cpo", "simpo"), MUTED, strict=False)) | {"dpo": STRONG}
    for name, (loss, _, _) in ENDS.items():
        at = trade(world, world.trained(loss))
        colour = colours[name.split("(")[0]]
        panel.plot(*at, color=colour, marker="o", ms=6, zorder=5)
        panel.annotate(
            name,
            at,
            textcoords="offset points",
            xytext=(8, -9),
            fontsize=7,
            color=colour,
        )
    panel.set(xlabel="KL(policy, reference), nats", ylabel="expected reward", xlim=(-0.05, 2.1))


def draw(path: Path) -> None:
    world = PreferenceWorld()
    figure = new_figure((9.0, 3.6))
    left, right = figure.subplots(1, 2)
    draw_training(left, world)
    draw_trade(right, world)
    save(figure, path)


if __name__ == "__main__":
    draw(PICTURE)
