"""What each KL option trains: rewards, exact KL, entropy, what RL does not see, and old samples.

Small models that sort digits (settings.py), over several seeds, every option from the same
references and on the same problems; and a policy that cannot cover its reference (modes.py). The
runs are float32 and sample, so that another kind of CPU takes other turns: of the numbers only
"modes" are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from fused_rl.study import curves, findings, modes, workers
from fused_rl.study.part import Numbers, Options, derived_seed
from fused_rl.study.settings import OPTIONS, WEIGHTED, Option, Run, train

NEEDS = ("transformers",)
PICTURES = curves.PICTURES
tables = findings.tables
BETA = 0.1
STALE = (2, 10)
STALE_OPTIONS = [o for o in (*OPTIONS, WEIGHTED) if o.name in curves.STALE]


def runs(options: Options) -> list[Run]:
    """The reference of every seed as it is, and all runs from it."""
    steps, every, fresh = (20, 4, 64) if options.quick else (150, 15, 256)
    wanted = [*product((*OPTIONS, WEIGHTED), (0,)), *product(STALE_OPTIONS, STALE)]
    found = []
    for i in range(1 if options.quick else 5):
        seed = derived_seed(options.seed, i)
        found.append(Run(Option(findings.REFERENCE), seed, 0, fresh=fresh))
        found += [
            Run(option, seed, steps, staleness, BETA, every=every, fresh=fresh)
            for option, staleness in wanted
        ]
    return found


def ticks(options: Options) -> int:
    """Runs, and ends of modes."""
    return len(runs(options)) + len(modes.cases())


def measure(options: Options, tick: Callable[[], None]) -> Numbers:
    """Curves and held-out records of every run, and where the policies of modes.py end."""
    trainings = runs(options)
    found = workers.each(one, [*trainings, *modes.cases()], tick)
    results, ends = found[: len(trainings)], found[len(trainings) :]
    return {
        "reproducible": ["modes"],
        "beta": BETA,
        "seeds": len({run.seed for run in trainings}),
        "steps": [point["step"] for point in results[-1]["curve"]],
        "runs": [kept(*pair) for pair in zip(trainings, results, strict=True)],
        "modes": modes.gathered(ends),
    }


def one(case: Run | modes.Case) -> Numbers:
    """Of either kind."""
    return train(case) if isinstance(case, Run) else modes.end(case)


def kept(run: Run, found: Numbers) -> Numbers:
    """A run in the file."""
    curve = {k: [point[k] for point in found["curve"]] for k in ("reward", "kl", "entropy")}
    about = {"option": run.option.name, "staleness": run.staleness, "seed": run.seed}
    return about | curve | {"held_out": found["held_out"]}
