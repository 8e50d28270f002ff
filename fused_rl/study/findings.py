"""What the numbers of the training say: tables, and claims with verdicts computed from the seeds.

Options are compared seed by seed, for those of a seed share the reference and the problems. A
difference counts if it has one sign in all seeds and is twice its standard error.
"""

from __future__ import annotations

import statistics
from math import sqrt

from fused_rl.study.part import Numbers, Table

REFERENCE = "reference"
TRAINED, UNSEEN = "4", ("3", "5")
PAPER = "arXiv 2512.21852"
ONE_SEED = "depends: one seed says nothing"


def found(numbers: Numbers, option: str, what: str, staleness: int = 0) -> list[float]:
    """One number per seed, of answers to fresh problems at the end.

    what: "unseen", the mean reward of the lengths that RL did not see; "objective", reward minus
        beta times the KL of an answer; or a key of held_out, for the length it did.
    """
    ends = [
        run["held_out"]
        for run in numbers["runs"]
        if (run["option"], run["staleness"]) == (option, staleness)
    ]
    if what == "unseen":
        return [statistics.fmean(end[n]["reward"] for n in UNSEEN) for end in ends]
    if what == "objective":
        beta = numbers["beta"]
        return [end[TRAINED]["reward"] - beta * end[TRAINED]["kl_answer"] for end in ends]
    return [end[TRAINED][what] for end in ends]


def options(numbers: Numbers, staleness: int = 0) -> list[str]:
    """Those that were run, in order."""
    return list(
        dict.fromkeys(
            run["option"]
            for run in numbers["runs"]
            if run["staleness"] == staleness and run["option"] != REFERENCE
        )
    )


def differences(first: list[float], second: list[float]) -> tuple[float, float]:
    """Mean of first - second over the seeds, and the sign that counts: 1, -1, or 0 for neither."""
    each = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(each)
    if len(each) == 1:
        return mean, 0
    error = statistics.stdev(each) / sqrt(len(each))
    one_sign = all(d * mean > 0 for d in each)
    return mean, (1 if mean > 0 else -1) if one_sign and abs(mean) > 2 * error else 0


def verdict(seeds: int, sign: int, *claimed: int) -> str:
    """Of a claim that a difference has one of these signs, 0 being none that counts."""
    if seeds == 1:
        return ONE_SEED
    if sign in claimed:
        return "confirmed" if sign else "confirmed: within the seeds' spread"
    return "not confirmed" if sign else "depends: within the seeds' spread"


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and lowest to highest of the seeds, if there are several."""
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.fmean, min, max))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def tables(numbers: Numbers) -> list[Table]:
    """What was trained, what RL did not see, old samples, modes, claims."""
    seeds, beta = numbers["seeds"], numbers["beta"]
    many = "one seed" if seeds == 1 else f"mean (range) of {seeds} seeds"
    trained = {
        "reward": ("reward", 2),
        "KL to the reference, nats per token": ("kl", 2),
        "reward - beta KL of an answer": ("objective", 2),
        "entropy, nats per token": ("entropy", 2),
    }
    beside = {
        "reward, other lengths": ("unseen", 2),
        "problems with a right answer of 8": ("some_right", 2),
        "different answers of 8": ("different", 1),
    }
    return [
        by_option(numbers, f"What a KL trains, beta {beta}: {many}", trained),
        by_option(numbers, f"What RL does not see, and diversity: {many}", beside),
        stale(numbers, f"Old samples: {many}"),
        of_modes(numbers),
        claims(numbers),
    ]


def by_option(numbers: Numbers, title: str, columns: dict[str, tuple[str, int]]) -> Table:
    """The ends of the runs on their own samples; header -> what of them, and its digits."""
    rows = [
        (name, *(spread(found(numbers, name, key), digits) for key, digits in columns.values()))
        for name in (REFERENCE, *options(numbers))
    ]
    return Table(title, ("KL", *columns), rows)


def stalenesses(numbers: Numbers) -> list[int]:
    """Those that were run."""
    return sorted({run["staleness"] for run in numbers["runs"]})


def stale(numbers: Numbers, title: str) -> Table:
    """Rewards of those options that were also trained on old samples."""
    ages = stalenesses(numbers)
    rows = [
        (name, *(spread(found(numbers, name, "reward", age)) for age in ages))
        for name in options(numbers, ages[-1])
    ]
    header = ("KL", *(f"reward, samples {age} updates old" for age in ages))
    return Table(title, header, rows)


def of_modes(numbers: Numbers) -> Table:
    """Where Gaussians end, from two starts."""
    starts = numbers["modes"]["starts"]
    rows = []
    for name in next(iter(starts.values())):
        ends = [of[name] for of in starts.values()]
        rows.append((name, *(f"{e[k]:.2f}" for e in ends for k in ("mean", "std", "reverse"))))
    columns = ("mean", "std", "reverse KL, nats")
    header = ("KL", *(f"{column}, {start} start" for start in starts for column in columns))
    return Table("A Gaussian towards two bumps, by expected gradients", header, rows)


def claims(numbers: Numbers) -> Table:
    """The papers' claims."""
    rows = [
        *useless(numbers),
        *generalising(numbers),
        *equal(numbers),
        *collapses(numbers),
        *seeking(numbers),
    ]
    return Table("Claims", ("claim", "from", "here", "verdict"), rows)


def compared(
    numbers: Numbers, what: str, first: str, second: str, *claimed: int
) -> tuple[str, str]:
    """Our number and the verdict: of first against second."""
    a, b = (found(numbers, name, what) for name in (first, second))
    mean, sign = differences(a, b)
    unit = " nats per token" if what in ("kl", "entropy") else ""
    said = f"{statistics.fmean(a):.2f} against {statistics.fmean(b):.2f}{unit}, {mean:+.3f}"
    return said, verdict(numbers["seeds"], sign, *claimed)


def useless(numbers: Numbers) -> list[tuple[str, ...]]:
    """k1 in the loss, k3 in the reward."""
    idle = compared(numbers, "kl", "k1 in loss", "no KL", 0, 1)
    worse = compared(numbers, "objective", "k3 in reward", "k1 in reward", -1)
    further = compared(numbers, "kl", "k3 in reward", "k1 in reward", 1)
    return [
        ("k1 in the loss holds nothing: it ends as far away as no KL, or further", PAPER, *idle),
        ("k3 in the reward is a bad penalty: less reward - beta KL than k1", PAPER, *worse),
        ("and it ends further from the reference", PAPER, *further),
    ]


def generalising(numbers: Numbers) -> list[tuple[str, ...]]:
    """Unbiased gradients against k3 in the loss."""
    base = "k3 in loss"
    rows = []
    for what, where in (("reward", "on what is trained"), ("unseen", "on unseen lengths")):
        for name in ("k1 in reward", "k3 in reward and loss"):
            said, judged = compared(numbers, what, name, base, 1)
            a, b = (statistics.fmean(found(numbers, n, what)) for n in (name, base))
            claim = f"{name} earns more than k3 in loss {where}"
            paper = f"{PAPER}: +19 %" if what == "unseen" else PAPER
            rows.append((claim, paper, f"{said} ({a / b - 1:+.0%})", judged))
    lower = compared(numbers, "entropy", "k1 in reward", base, -1)
    rows.append(("k1 in reward ends with a lower entropy than k3 in loss", PAPER, *lower))
    return rows


def equal(numbers: Numbers) -> list[tuple[str, ...]]:
    """Options whose gradients have the same mean."""
    rows = []
    for what in ("reward", "kl", "unseen"):
        same = compared(numbers, what, "k3 in reward and loss", "k1 in reward", 0)
        name = {"unseen": "reward on unseen lengths", "kl": "KL"}.get(what, what)
        rows.append((f"k3 in reward and loss trains as k1 in reward: {name}", PAPER, *same))
    same = compared(numbers, "kl", "exact in loss", "k2 in loss", 0)
    rows.append(("k2 in loss trains as the exact reverse KL: KL", "arXiv 2510.01555", *same))
    return rows


def collapses(numbers: Numbers) -> list[tuple[str, ...]]:
    """Below half of what the reference earns is a collapse, above all of it is stable."""
    oldest = stalenesses(numbers)[-1]
    start = found(numbers, REFERENCE, "reward")
    rows = []
    for name, age, falls in (
        ("k3 in reward", 0, True),
        ("no KL", oldest, True),
        ("k1 in loss", oldest, True),
        ("k1 in reward", oldest, False),
    ):
        ends = found(numbers, name, "reward", age)
        ratios = [end / begin for end, begin in zip(ends, start, strict=True)]
        count = sum((ratio < 0.5) if falls else (ratio > 1) for ratio in ratios)
        done = "below half of" if falls else "above"
        here = f"reward {spread(ends)}; {done} the reference's in {count} of {len(ends)} seeds"
        judged = {len(ends): "confirmed", 0: "not confirmed"}.get(count, "depends: on the seed")
        where = f"samples {age} updates old" if age else "fresh samples"
        claim = f"on {where} {name} {'collapses' if falls else 'is stable'}"
        rows.append((claim, PAPER, here, ONE_SEED if len(ends) == 1 else judged))
    return rows


def seeking(numbers: Numbers) -> list[tuple[str, ...]]:
    """Modes: one has half of the reference's width at most, both have three quarters at least."""
    rows = []
    starts = numbers["modes"]["starts"]
    width = starts["narrow"]["exact forward in loss"]["std"]
    for name, one in (("k1 in reward", True), ("k2 in loss", True), ("k3 in loss", False)):
        shares = {start: of[name]["std"] / width for start, of in starts.items()}
        held = [share < 0.5 if one else share > 0.75 for share in shares.values()]
        said = ", ".join(f"{share:.0%} from a {start} start" for start, share in shares.items())
        judged = {2: "confirmed", 0: "not confirmed"}.get(sum(held), "depends: on the start")
        kind = "seeks one mode" if one else "covers both modes"
        rows.append((f"{name} {kind}", PAPER, f"width {said}", judged))
    return rows
