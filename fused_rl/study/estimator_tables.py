"""Tables of how well the KL is estimated, and what others claim of it, from the numbers.

Every verdict on a claim is computed from the numbers.
"""

from __future__ import annotations

from fused_rl.study import gaussians, vocabulary
from fused_rl.study.part import Numbers, Table

TOKENS = ("k1 tokens", "k2 tokens", "k3 tokens")
SHORT = {"noise": "noise", "temperature": "T ="}


def number(x: float | None) -> str:
    """Three digits, thousands apart; none is never."""
    if x is None:
        return "never"
    if x == 0:
        return "0"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def count(x: float | None) -> str:
    """Of samples: two digits, and whole."""
    return "never" if x is None else f"{float(f'{x:.2g}'):,.0f}"


def percent(x: float) -> str:
    """A part of one; signed where it is a bias."""
    return "0 %" if abs(x) < 5e-5 else f"{100 * x:.2g} %" if abs(x) < 0.995 else f"{100 * x:.0f} %"


def at(rows: list[Numbers], kl: float) -> Numbers:
    """The row whose KL is nearest."""
    return min(rows, key=lambda row: abs(row["kl"] - kl))


def tables(numbers: Numbers) -> list[Table]:
    return [
        of_gaussians(numbers),
        of_families(numbers),
        of_limits(numbers),
        of_means(numbers),
        of_vocabulary(numbers),
        of_clamps(numbers),
        of_floors(numbers),
        of_roundings(numbers),
        of_claims(numbers),
    ]


def of_gaussians(numbers: Numbers) -> Table:
    header = ("KL, nats", "k1 < 0", "k2 bias", "k1 std", "k2 std", "k3 std", *TOKENS)
    rows = []
    for kl in (1e-4, 1e-3, 0.005, 0.01, 0.05, 0.125, 0.5, 1.0, 3.16, 10.0):
        row = at(numbers["gaussians"]["shifted"], kl)
        k1, k2, k3 = (row[k] for k in ("k1", "k2", "k3"))
        cells = [number(row["kl"]), percent(row["negative"]), percent(k2["bias"])]
        cells += [number(k["std"]) for k in (k1, k2, k3)]
        rows.append((*cells, *(count(k["samples"]) for k in (k1, k2, k3))))
    title = (
        "One token's estimate where the policy is N(0, 1) and the reference N(mu, 1), KL = mu^2 / 2"
        "; bias and std over the KL, and how many tokens have a standard error of 10 %"
    )
    return Table(title, header, rows)


def of_families(numbers: Numbers) -> Table:
    rows = []
    for kl in (0.001, 0.01, 0.05, 0.1, 0.5):
        for family in gaussians.FAMILIES:
            row = at(numbers["gaussians"][family], kl)
            stds = [row[k]["std"] for k in ("k1", "k2", "k3")]
            cells = ["infinite" if std is None else number(std) for std in stds]
            wanted = (row[k]["samples"] for k in ("k1", "k2", "k3"))
            rows.append(
                (number(row["kl"]), family, percent(row["k2"]["bias"]), *cells, *map(count, wanted))
            )
    header = ("KL, nats", "policy", "k2 bias", "k1 std", "k2 std", "k3 std", *TOKENS)
    title = "The same KL, three ways to differ from a Gaussian reference; columns as above"
    return Table(title, header, rows)


LIMITS = {
    "k2 biased": "k2's bias is below 10 %",
    "k2 over k1": "k2 has less variance than k1",
    "k3 over k1": "k3 has less variance than k1",
    "k3 without variance": "k3 has a variance",
}


def of_limits(numbers: Numbers) -> Table:
    def cell(kl: float | None) -> str:
        return "any" if kl is None else number(kl)

    rows = [
        (text, *(cell(numbers["limits"][name][family]) for family in gaussians.FAMILIES))
        for name, text in LIMITS.items()
    ]
    return Table("Up to which KL, in nats", ("", *gaussians.FAMILIES), rows)


def of_means(numbers: Numbers) -> Table:
    rows = []
    for row in numbers["sampled"]:
        exact = at(numbers["gaussians"][row["family"]], row["kl"])["k3"]["std"]
        cells = [row["family"], number(row["kl"]), percent(row["k1"]["near"])]
        spread = (row["k3"][name] for name in ("low", "median", "high"))
        cells += [percent(row["k3"]["near"]), *map(number, spread), number(row["k3"]["std"])]
        rows.append((*cells, "infinite" if exact is None else number(exact)))
    header = ("policy", "KL, nats", "k1 near", "k3 near", "k3 low", "k3 median", "k3 high")
    header += ("k3 std", "its true std")
    title = (
        f"Means of {gaussians.BATCH:,} tokens: how many are within 10 % of the KL, their 5, 50 and "
        "95 % quantiles over it, and the std of a token as it is seen"
    )
    return Table(title, header, rows)


def of_vocabulary(numbers: Numbers) -> Table:
    rows = []
    for row in numbers["vocabulary"]:
        change = f"{SHORT[row['change']]} {row['size']:g}"
        cells = [row["scale"], number(row["entropy"]), change, number(row["kl"])]
        cells.append(percent(row["k3"]["prefixes"]))
        wanted = [row[k]["samples"] for k in ("k1", "k2", "k3", "exact")]
        rows.append((*cells, *map(count, wanted)))
    header = ("policy", "entropy", "change", "KL, nats", "of prefixes", *TOKENS, "exact tokens")
    title = (
        f"Over a vocabulary of {vocabulary.V}: the part of k3's variance that is the spread of "
        "prefixes, and how many tokens, each of another prefix, have a standard error of 10 %"
    )
    return Table(title, header, rows)


def of_clamps(numbers: Numbers) -> Table:
    rows = []
    for row in numbers["clamped"]:
        if row["kl"] in (0.1, 0.3, 1.0, 2.0, 5.0, 10.0):
            biases = (percent(row["bias"][name]) for name in gaussians.CLAMPS)
            rows.append((row["family"], number(row["kl"]), *biases))
    title = "The bias of k3 over the KL where it is clamped, in nats; the first is fused_rl's"
    return Table(title, ("policy", "KL, nats", *gaussians.CLAMPS), rows)


def of_floors(numbers: Numbers) -> Table:
    rows = []
    for row in numbers["rounding"]:
        if row["size"] == 0:
            for name, means in row["rounding"].items():
                if "reference" in name:
                    cells = (f"{means[k]:.1e}" for k in ("k1", "k3"))
                    rows.append((row["scale"], name, *cells, f"{10 * means['k3']:.1e}"))
    header = ("policy", "rounded", "k1", "k3", "10 % of a KL of")
    title = "What is estimated where the KL is 0 and one side is rounded, in nats per token"
    return Table(title, header, rows)


def of_roundings(numbers: Numbers) -> Table:
    names = ("bf16 log-probs", "bf16 logits", "exp in float32", "exp in bf16")
    rows = []
    for row in numbers["rounding"]:
        if row["kl"] > 0:
            means = (row["rounding"][name]["k3"] / row["kl"] for name in names)
            negative = row["rounding"]["exp in bf16"]["negative"]
            rows.append((row["scale"], f"{row['kl']:.1e}", *map(number, means), percent(negative)))
    header = ("policy", "KL, nats", *names, "its negative")
    title = (
        "k3 over the KL where both sides are rounded, or k3 is formed as exp(-d) - 1 + d; the last "
        "column is the share of negative ones among those of exp in bf16"
    )
    return Table(title, header, rows)


def of_claims(numbers: Numbers) -> Table:
    return Table("Claims", ("claim", "from", "here", "verdict"), claims(numbers))


def claims(numbers: Numbers) -> list[tuple[str, str, str, str]]:
    """What others say of the values of the estimators, and what the numbers say of that."""
    shifted, sharper = (numbers["gaussians"][family] for family in ("shifted", "sharper"))
    limits = numbers["limits"]
    blog, near, far = "Schulman 2020", at(shifted, 0.005), at(shifted, 10.0)
    half = max((row["kl"] for row in shifted if row["negative"] >= 0.4), default=0.0)
    biased = min(limits["k2 biased"].values())
    published = [near["k1"]["std"] / 20, near["k2"]["std"] / 1.42, near["k3"]["std"] / 1.42]
    middle = at(shifted, 0.5)
    published += [middle["k1"]["std"] / 2, middle["k2"]["std"] / 1.73, middle["k3"]["std"] / 1.7]
    worst = max(abs(ratio - 1) for ratio in published)
    alike = [row["k3"]["std"] / row["k2"]["std"] for row in shifted]
    like = max((r["kl"] for r, ratio in zip(shifted, alike, strict=True) if ratio < 1.1), default=0)
    missed = [row for row in numbers["sampled"] if row["k3"]["near"] < 0.95]
    hard = at([row for row in numbers["sampled"] if row["family"] == "sharper"], 0.5)
    beaten = [
        row for row in numbers["vocabulary"] if row["exact"]["samples"] < row["k3"]["samples"]
    ]
    fewest = min(row["k3"]["samples"] / row["exact"]["samples"] for row in numbers["vocabulary"])
    usual = [row for row in shifted + sharper if 0.001 <= row["kl"] <= 0.1]
    ahead = [r for r in usual if r["k3"]["samples"] and r["k3"]["samples"] < r["k1"]["samples"]]
    floor = max(
        row["rounding"]["reference's logits bf16"]["k3"]
        for row in numbers["rounding"]
        if row["size"] == 0
    )
    negative = max(row["rounding"]["exp in bf16"]["negative"] for row in numbers["rounding"])
    return [
        (
            "At KLs of 0.005 and 0.5 nats, std / KL is 20 and 2 for k1, 1.42 and 1.73 for k2, 1.42 "
            "and 1.7 for k3",
            blog,
            f"the same to {percent(worst)}",
            verdict(worst < 0.01),
        ),
        (
            "k1 is negative for half of the samples",
            blog,
            f"{percent(near['negative'])} at 0.005 nats, {percent(far['negative'])} at 10",
            verdict(half == 10.0, f"over 40 % of them up to {number(half)} nats"),
        ),
        (
            "k2's bias is low",
            blog,
            f"{percent(near['k2']['bias'])} at 0.005 nats, {percent(middle['k2']['bias'])} at 0.5; "
            f"{percent(at(sharper, 0.05)['k2']['bias'])} at 0.05 with a sharper policy",
            verdict(
                biased > 10,
                f"below 10 % up to {number(limits['k2 biased']['shifted'])} nats, with a sharper "
                f"policy up to {number(limits['k2 biased']['sharper'])}",
            ),
        ),
        (
            "k3's variance is as low as k2's, without the bias",
            blog,
            f"std {number(alike[0])} of k2's at 0.0001 nats, {number(alike[-1])} at 10",
            verdict(like == 10.0, f"within 10 % up to {number(like)} nats"),
        ),
        (
            "k3 has less variance than k1",
            blog,
            f"std / KL at 0.005 nats {number(near['k3']['std'])} against "
            f"{number(near['k1']['std'])}, at 10 {number(far['k3']['std'])} against "
            f"{number(far['k1']['std'])}",
            verdict(
                limits["k3 over k1"]["shifted"] is None and limits["k3 over k1"]["sharper"] is None,
                f"up to {number(limits['k3 over k1']['shifted'])} nats, with a sharper policy up "
                f"to {number(limits['k3 over k1']['sharper'])}, with a flatter one always",
            ),
        ),
        (
            "k3 is unbiased",
            blog,
            f"with a sharper policy at {number(hard['kl'])} nats the median of means of "
            f"{gaussians.BATCH:,} tokens is {number(hard['k3']['median'])} KL, and "
            f"{percent(hard['k3']['near'])} of them are within 10 %",
            verdict(
                not missed,
                f"the expectation is; means of samples miss it in {len(missed)} of "
                f"{len(numbers['sampled'])} cases here",
            ),
        ),
        (
            "k3, GRPO's estimate, is never negative, and has low variance at its usual KLs, 0.001 "
            "to 0.1 nats per token",
            f"DeepSeekMath (2402.03300); {blog}",
            f"fewer tokens than k1 at {len(ahead)} of {len(usual)} KLs; {floor:.1e} nats are "
            f"rounding where the reference's logits are bf16; formed in bf16, up to "
            f"{percent(negative)} of it are negative",
            verdict(
                len(ahead) == len(usual) and floor < 1e-4 and negative == 0,
                f"with a sharper policy up to {number(limits['k3 over k1']['sharper'])} nats, with "
                f"bf16 logits from {number(10 * floor)} nats on, and formed in float32",
            ),
        ),
        (
            "The exact KL is intractable, so that it has to be estimated from samples",
            "2512.21852",
            f"per token the exact KL needs fewer tokens than k3 in {len(beaten)} of "
            f"{len(numbers['vocabulary'])} cases, by a factor of {number(fewest)} and more",
            verdict(
                not beaten, "per token it is a sum over the vocabulary, and needs fewer tokens"
            ),
        ),
    ]


def verdict(holds: bool, depends: str = "") -> str:
    """In one of three words."""
    if holds:
        return "confirmed"
    return f"depends: {depends}" if depends else "not confirmed"
