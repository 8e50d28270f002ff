"""How well k1, k2 and k3 estimate the reverse KL from sampled tokens: bias, noise, rounding.

gaussians.py has the pairs for which everything is known, vocabulary.py those of a language model's
size; here is what is measured of them. estimator_tables.py and estimator_pictures.py show it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fused_rl.study import estimator_pictures, estimator_tables, gaussians, vocabulary
from fused_rl.study.part import Numbers, Options
from fused_rl.study.workers import each

NEEDS = ()
tables = estimator_tables.tables
PICTURES = {
    "spread": estimator_pictures.spread,
    "samples": estimator_pictures.samples,
    "rounding": estimator_pictures.rounding,
    "clamp": estimator_pictures.clamp,
}
# Four a decade, those of mu = 0.1, 0.5 and 1, and some where k3's variance grows fast.
KLS = sorted(
    {float(f"{10 ** (i / 4):.3g}") for i in range(-16, 5)}
    | {0.005, 0.05, 0.07, 0.08, 0.09, 0.094, 0.125, 0.5, 2.4, 4.2, 6.5, 7.5, 8.5}
)
CLAMPED = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)
SAMPLED = {"shifted": (0.01, 0.1, 1.0, 5.0, 10.0), "sharper": (0.01, 0.05, 0.1, 0.5, 1.0)}
# How near another machine's numbers come, relative to them, and what is taken for nothing.
TOLERANCES = {
    **{
        name: {"rtol": 1e-5, "atol": 1e-6}
        for name in ("gaussians", "quantiles", "limits", "clamped")
    },
    "sampled": {"rtol": 1e-3, "atol": 2e-2},
    "vocabulary": {"rtol": 1e-4, "atol": 1e-6},
    "rounding": {"rtol": 1e-2, "atol": 1e-9},
}


def cases(options: Options) -> list[tuple[str, Callable[[], Numbers]]]:
    """What can be measured apart, and under which name it is kept."""
    repeats, prefixes = (100, 24) if options.quick else (500, 64)
    sizes = (0.01, 0.1, 0.3) if options.quick else (0.003, 0.01, 0.03, 0.1, 0.3)
    temperatures = (0.95, 0.6) if options.quick else (0.98, 0.9, 0.8, 0.6)
    roundings = (
        (0.0, 1e-3, 1e-2, 1e-1) if options.quick else (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    )
    changes = [("noise", size) for size in sizes] + [("temperature", t) for t in temperatures]

    def case(scale: str, change: str, size: float) -> vocabulary.Case:
        return vocabulary.Case(options.seed, scale, change, size, prefixes)

    return [
        *(
            ("sampled", partial(gaussians.sampled, options.seed, family, kl, repeats))
            for family, kls in SAMPLED.items()
            for kl in kls
        ),
        *(
            ("vocabulary", partial(vocabulary.compared, case(scale, *change)))
            for scale in vocabulary.SCALES
            for change in changes
        ),
        *(
            ("rounding", partial(vocabulary.rounded, case(scale, "noise", size)))
            for scale in vocabulary.SCALES
            for size in roundings
        ),
    ]


def ticks(options: Options) -> int:
    return len(cases(options))


def called(case: tuple[str, Callable[[], Numbers]]) -> Numbers:
    return case[1]()


def measure(options: Options, tick: Callable[[], None]) -> Numbers:
    """All of it; what is closed in form does not depend on the options."""
    numbers: Numbers = {
        "tolerances": TOLERANCES,
        "gaussians": {f: [gaussians.row(f, kl) for kl in KLS] for f in gaussians.FAMILIES},
        "quantiles": [gaussians.quantiles("shifted", kl) for kl in KLS],
        "limits": gaussians.limits(),
        "clamped": [gaussians.clamped(f, kl) for f in ("shifted", "sharper") for kl in CLAMPED],
    }
    chosen = cases(options)
    for (name, _), found in zip(chosen, each(called, chosen, tick), strict=True):
        numbers.setdefault(name, []).append(found)
    return numbers
