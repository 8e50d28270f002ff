"""What papers say of gradients of a KL, beside the numbers of the study's part on gradients.

COMEDY is "A comedy of estimators" (arXiv 2512.21852), RETHINKING "Rethinking KL regularization in
RLHF" (arXiv 2510.01555). Verdicts are computed.
"""

from __future__ import annotations

import math

from fused_rl.study.moments import ROUNDING
from fused_rl.study.part import Numbers, Table

COMEDY, RETHINKING = "2512.21852", "2510.01555"
UNBIASED = (
    "k1 in reward, product ratio",
    "k3 in loss, attached product ratio",
    "k2 of the sum in loss, product ratio",
    "exact in loss, later in reward, product ratio",
)


def claims(numbers: Numbers) -> Table:
    rows = [*on_policy(numbers), *off_policy(numbers)]
    return Table("Claims", ("claim", "from", "here", "verdict"), rows)


def confirmed(found: bool, otherwise: str = "not confirmed") -> str:
    return "confirmed" if found else otherwise


def on_policy(numbers: Numbers) -> list[tuple[str, str, str, str]]:
    lines, distance = numbers["path"]["lines"], numbers["path"]["distance"]
    reach = f"{distance[0]:g} to {distance[-1]:.2g} nats"
    k1, k3, both = (lines[n] for n in ("k1 in reward", "k3 in loss", "k3 in both"))
    nothing, k3_reward = lines["k1 in loss"], lines["k3 in reward"]
    target = numbers["named"]["k3 in loss"][0][0]
    far = numbers["named"]["k3 in loss"][-2][1]
    order = slope([d**0.5 for d in distance], k3["bias_token"], below=0.1)
    times = [a / b for a, b in zip(k3_reward["noise"], k1["noise"], strict=True)]
    same = max(numbers["same"].values())
    return [
        (
            "k1 in the reward has the gradient of the KL of whole sequences",
            COMEDY,
            f"largest bias of any world, {reach}: {least(max(k1['bias_most']))}",
            confirmed(max(k1["bias_most"]) == 0),
        ),
        (
            "k1 in the loss has no expected gradient, only noise",
            COMEDY,
            f"length of the mean: {'not ' if any(nothing['cosine']) else ''}0; noise "
            f"{nothing['noise'][0]:.2g} times the true gradient at {distance[0]:g} nats",
            confirmed(not any(nothing["cosine"])),
        ),
        (
            "k3 in the loss is biased: its gradient is that of the forward KL",
            COMEDY,
            f"gradient of: {target}; bias {far:.0%} at 1 nat",
            confirmed(target.startswith("forward") and far > 0.05),
        ),
        (
            "k3 in the reward is biased",
            COMEDY,
            f"bias {min(k3_reward['bias']):.0%} to {max(k3_reward['bias']):.0%}; near the "
            "reference it has next to no gradient",
            confirmed(min(k3_reward["bias"]) > 0.05),
        ),
        (
            "k3 in the reward has a huge variance",
            COMEDY,
            f"noise {times[0]:.2g} times that of k1 in the reward at {distance[0]:g} nats, "
            f"{times[-1]:.2g} times at {distance[-1]:.2g}",
            confirmed(
                min(times) > 1, "not confirmed" if max(times) <= 1 else beyond(distance, times)
            ),
        ),
        (
            "k3 in the reward and in the loss is unbiased",
            COMEDY,
            f"largest bias {least(max(both['bias_most']))}; noise {both['noise'][0]:.2g} to "
            f"{both['noise'][-1]:.2g}, k1 in the reward's {k1['noise'][0]:.2g} to "
            f"{k1['noise'][-1]:.2g}",
            confirmed(max(both["bias_most"]) == 0),
        ),
        (
            "k1 in the reward and k2 in the loss have the same gradient",
            RETHINKING,
            f"at the same level (own token, or sum) in every sequence, to {least(same)}; k1 of "
            f"later tokens too is {lines['k2 in loss']['bias'][-1]:.0%} away at "
            f"{distance[-1]:.2g} nats",
            confirmed(same < 1e-9),
        ),
        (
            "k3 in the loss is a first-order approximation, its error of second order",
            RETHINKING,
            f"with d the log-ratio the gradient grows as d, its error as d^{1 + order:.2f}",
            confirmed(abs(order - 1) < 0.1),
        ),
    ]


def off_policy(numbers: Numbers) -> list[tuple[str, str, str, str]]:
    lines = numbers["staleness"]["lines"]
    old = numbers["world"]["old"]
    four = {n: lines[n]["bias"][old] for n in ("k1 in reward", "k3 in reward")}
    four |= {n: lines[n]["bias"][old] for n in ("k1 in loss", "k3 in loss")}
    kept = lines["kept k1 in reward, token ratio"]
    fresh = lines["k1 in reward, token ratio"]
    left = max(max(lines[name]["bias_most"]) for name in UNBIASED)
    away = lines["k1 in loss"]["cosine"][1:]
    k2, token, product = (
        max(lines[f"k2 in loss{ratio}"]["bias_token"])
        for ratio in ("", ", token ratio", ", product ratio")
    )
    whole = lines["kept k1 in reward, product ratio"]["bias"][-1]
    exact = lines["k1 in reward, product ratio"]["bias"][-1]
    return [
        (
            "off-policy, k1 and k3 in reward or loss are all biased",
            COMEDY,
            f"{old} steps old: " + ", ".join(f"{n} {bias:.0%}" for n, bias in four.items()),
            confirmed(min(four.values()) > 0.05),
        ),
        (
            "off-policy, an unbiased gradient of the KL of whole sequences is an open question",
            COMEDY,
            f"up to 10 steps old, largest bias {least(left)}: " + "; ".join(UNBIASED),
            f"answered: {len(UNBIASED)} ways have it" if left == 0 else "open here, too",
        ),
        (
            "k1 in the reward stays good 10 steps off-policy",
            COMEDY,
            f"kept from the rollout, token ratio: cosine {kept['cosine'][-1]:.2f}, bias "
            f"{kept['bias'][-1]:.0%}, of too short a gradient; with the product ratio still "
            f"{whole:.0%}. Of the current policy: token ratio {fresh['bias'][-1]:.0%}, product "
            f"ratio {least(exact)}",
            good_when_stale(kept, exact),
        ),
        (
            "k1 in the loss fails off-policy",
            COMEDY,
            f"1 to 10 steps old, cosine with the true gradient {min(away):.2f} to "
            f"{max(away):.2f}: it drives the policy away from its reference",
            confirmed(max(away) < -0.5),
        ),
        (
            "off-policy, estimators in the loss need the importance ratio",
            RETHINKING,
            f"k2, up to 10 steps old, from the reverse KL per token: no ratio {k2:.0%}, token "
            f"{token:.0%}, product {product:.0%}",
            confirmed(product == 0 and k2 > 2 * token),
        ),
    ]


def good_when_stale(kept: Numbers, exact: float) -> str:
    """Of k1 in the reward, kept from the rollout with token ratios, or current and weighted."""
    if kept["bias"][-1] < 0.1:
        return "confirmed"
    direction = "its direction" if kept["cosine"][-1] > 0.7 else "not even its direction"
    better = "; exact with the current policy's k1 and product ratio" if exact == 0 else ""
    return f"depends: {direction}, not its strength{better}"


def least(error: float) -> str:
    """What is below the rounding is written as 0 in the numbers."""
    return f"below {ROUNDING:g}" if error < ROUNDING else f"{error:.1g}"


def slope(x: list[float], y: list[float], below: float) -> float:
    """Of log y against log x, by least squares, where x is below a bound."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a <= below * 1.001]
    mean_x, mean_y = (sum(v) / len(points) for v in zip(*points, strict=True))
    across = sum((a - mean_x) * (b - mean_y) for a, b in points)
    return across / sum((a - mean_x) ** 2 for a, _ in points)


def beyond(distance: list[float], times: list[float]) -> str:
    """From where on the noise is the larger one."""
    last = max(i for i, t in enumerate(times) if t <= 1)
    if last == len(times) - 1:
        return "not confirmed"
    return f"depends: beyond {distance[last]:.2g} nats"
