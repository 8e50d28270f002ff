"""The report of a rollout: its numbers by hand, its KL by enumeration, each pattern where it is and
not where it is not.
"""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch

from fused_rl.diagnosis import Severity
from fused_rl.mismatch import mismatch_report

B, T, V = 32, 64, 96
NAN, INF = math.nan, math.inf


class World:
    """Logits [B, T, V] of a policy that is sure of some tokens alone, and its samples."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = 3 * self.normal(B, T, V) * (0.3 + 1.5 * self.uniform(B, T, 1)) + 10
        self.sampled = self.sample(self.logits)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1).reshape(-1, V)
        return torch.multinomial(p, 1, generator=self.generator).reshape(logits.shape[:-1])


@pytest.fixture
def world() -> World:
    return World()


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def bf16(logits: torch.Tensor) -> torch.Tensor:
    return logits.bfloat16().to(logits.dtype)


def names(report) -> list[str]:
    return [finding.name for finding in report.findings]


OURS = torch.tensor([[-1.0, -2.0, -0.5, 7.0], [-3.0, -0.1, NAN, -INF]], dtype=torch.float64)
THEIRS = torch.tensor([[-1.5, -1.0, -0.5, 7.0], [-1.0, NAN, -1.0, -2.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()


def test_the_numbers_by_hand():
    """Known: d = 0.5, -1, 0 and -2; two tokens have a NaN, one is infinite, one is masked."""
    report = mismatch_report(OURS, THEIRS, MASK, worst=2)
    d = np.array([0.5, -1.0, 0.0, -2.0])
    w = np.exp(d)
    assert (report.tokens, report.unknown, report.infinite, report.sequences) == (7, 2, 1, 2)
    assert report.mean_abs == pytest.approx(3.5 / 4) and report.max_abs == 2
    assert report.mean == pytest.approx(-2.5 / 4) and report.std == pytest.approx(d.std())
    assert report.k1 == pytest.approx(-d.mean())
    assert report.k2 == pytest.approx((d**2 / 2).mean())
    assert report.k3 == pytest.approx((np.expm1(d) - d).mean())
    assert report.token_share == pytest.approx(w.sum() ** 2 / (4 * (w**2).sum()))
    sums = np.exp([-0.5, -2.0])
    assert report.sequence_log_ratios.tolist() == [-0.5, -2.0]
    assert report.sequence_share == pytest.approx(sums.sum() ** 2 / (2 * (sums**2).sum()))
    assert report.far_fraction == 3 / 4
    assert [token.at for token in report.worst] == [(1, 0), (0, 1)]
    assert [token.difference for token in report.worst] == [-2, -1]


def test_packed_and_flat_are_padded():
    padded = mismatch_report(OURS, THEIRS, MASK)
    inside = MASK.reshape(-1)
    flat = OURS.reshape(-1)[inside], THEIRS.reshape(-1)[inside]
    packed = mismatch_report(*flat, cu_seqlens=torch.tensor([0, 3, 3, 7]))
    assert packed.sequences == 3 and packed.worst[0].at == (2, 0)
    assert packed.sequence_share == padded.sequence_share, "one without tokens has no weight"
    assert mismatch_report(*flat, cu_seqlens=torch.tensor([0, 3, 7])).worst == padded.worst
    alone = mismatch_report(*flat)
    assert alone.sequences is alone.sequence_share is alone.sequence_log_ratios is None
    assert [token.at for token in alone.worst[:2]] == [(3,), (1,)]
    for name in ("tokens", "unknown", "infinite", "mean_abs", "std", "k3", "token_share"):
        assert getattr(padded, name) == getattr(packed, name) == getattr(alone, name)


def test_worst_places_of_packed_tokens():
    ours = torch.tensor([-1.0, -1.0, -1.0, -1.0, -5.0])
    report = mismatch_report(ours, torch.full((5,), -1.0), cu_seqlens=torch.tensor([0, 2, 2, 5]))
    assert report.worst[0].at == (2, 2)


@pytest.mark.parametrize("T", [1, 2])
def test_the_kl_is_that_of_the_rollout_to_the_trainer(T):
    """Every sequence of a small world, as often as the rollout samples it: counts, not noise."""
    q = np.array([5, 3, 2]) / 10
    p = np.array([0.1, 0.2, 0.7])
    true = float((q * np.log(q / p)).sum())
    sequences, ours, theirs = [], [], []
    for ids in product(range(3), repeat=T):
        count = round(10**T * np.prod(q[list(ids)]))
        ours += count * [np.log(p[list(ids)])]
        theirs += count * [np.log(q[list(ids)])]
        sequences += count * [ids]
    report = mismatch_report(torch.tensor(np.array(ours)), torch.tensor(np.array(theirs)))
    assert len(sequences) == 10**T
    assert report.k1 == pytest.approx(true) and report.k3 == pytest.approx(true)
    assert report.k2 == pytest.approx(float((q * np.log(q / p) ** 2 / 2).sum()))
    other_way = float((p * np.log(p / q)).sum())
    assert abs(true - other_way) > 0.01
    # n / (n sum q (p/q)^2): of the sequence, that of its tokens to the power of T.
    share = 1 / float((p**2 / q).sum())
    assert report.token_share == pytest.approx(share)
    assert report.sequence_share == pytest.approx(share**T)


def test_effective_sizes_of_sequences_are_formed_in_logarithms():
    ours, theirs = torch.full((2, 500), -9.0), torch.full((2, 500), -1.0)
    theirs[1] = -2.0
    report = mismatch_report(ours, theirs)
    assert report.sequence_log_ratios.tolist() == [-4000, -3500]
    assert report.sequence_share == pytest.approx(0.5)


HALVES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_are_float64_of_what_is_given(world, dtype):
    ours, theirs = (
        logprobs(z, world.sampled).to(dtype) for z in (world.logits, bf16(world.logits))
    )
    got, exact = (
        mismatch_report(*given) for given in ((ours, theirs), (ours.double(), theirs.double()))
    )
    assert got.numbers() == exact.numbers()


def test_views_are_as_good_as_copies(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    mask = world.uniform(B, T) < 0.7
    views = [x.t().contiguous().t() for x in (ours, theirs, mask)]
    assert not views[0].is_contiguous()
    assert mismatch_report(*views).numbers() == mismatch_report(ours, theirs, mask).numbers()


def test_nothing_is_changed_and_nothing_is_differentiated():
    ours = OURS.clone().requires_grad_()
    report = mismatch_report(ours, THEIRS, MASK)
    assert not report.logprobs.requires_grad
    torch.testing.assert_close(ours.detach(), OURS, equal_nan=True, rtol=0, atol=0)


def test_what_is_masked_changes_nothing(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, -9:] = False
    expected = mismatch_report(ours, theirs, mask)
    for filler in (NAN, INF, -INF, 0.0, 1e30):
        ours[:, -9:] = filler
        theirs[:, -5:] = -filler
        assert mismatch_report(ours, theirs, mask.long()).numbers() == expected.numbers()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 4)])
def test_where_there_is_nothing_the_report_says_so(shape):
    given = torch.zeros(shape), torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    report = mismatch_report(*given)
    assert math.isnan(report.mean_abs) and math.isnan(report.k3) and report.tokens == 0
    assert report.verdict == "there is nothing to compare" in str(report)
    assert report.findings == () and report.worst == ()
    assert json.loads(json.dumps(report.numbers()))["mean_abs"] is None


def test_one_token_is_a_report():
    report = mismatch_report(torch.tensor([-1.0]), torch.tensor([-1.5]))
    assert report.mean == 0.5 and report.std == 0 and report.token_share == 1


def test_two_sides_that_say_the_same():
    same = torch.linspace(-5, 0, 200).reshape(4, 50)
    report = mismatch_report(same, same)
    assert report.findings == () and report.verdict == "both sides say the same"
    assert report.k1 == report.k3 == report.max_abs == 0 and report.token_share == 1


def test_rounding_is_explained_by_rounding(world):
    """An engine that samples from logits in bfloat16."""
    engine = bf16(world.logits)
    ids = world.sample(engine)
    report = mismatch_report(logprobs(world.logits, ids), logprobs(engine, ids))
    assert 0.3 < report.times_rounding < 2
    assert report.verdict == "explained by rounding" and names(report) == []
    exact = logprobs(world.logits, world.sampled)
    assert mismatch_report(exact.float(), exact).verdict == "less than rounding gives"


def test_rounding_that_was_simulated_takes_the_models_place():
    ours, theirs = torch.full((2, 40), -1.0), torch.full((2, 40), -1.0)
    theirs[::2] -= 0.04
    report = mismatch_report(ours, theirs, rounding=torch.tensor([[0.01, -0.01], [NAN, 0.0]]))
    assert report.rounding[:3] == pytest.approx((0.02 / 3, 0.01, 0.01))
    assert report.times_rounding == pytest.approx(3, rel=1e-5)
    assert "4 tokens" in report.rounding.source
    exact = mismatch_report(ours, ours + 1e-7, rounding=torch.zeros(9))
    assert 0 < exact.times_rounding < 0.3 and exact.findings == ()
    assert mismatch_report(ours, theirs, rounding=torch.zeros(9)).times_rounding > 1e4


# Trainer's and engine's log-probs of what was sampled.
def temperature(world, factor=0.8):
    engine = world.logits / factor
    ids = world.sample(engine)
    return logprobs(world.logits, ids), logprobs(engine, ids)


def raw_logprobs(world):
    """The engine samples at 0.7, as the trainer has it, and reports log-probs at 1."""
    ids = world.sample(world.logits / 0.7)
    return logprobs(world.logits / 0.7, ids), logprobs(world.logits, ids)


def kept(world, mass=0.9):
    p = world.logits.softmax(-1)
    ranked = p.sort(-1, descending=True)
    inside = (ranked.values.cumsum(-1) - ranked.values < mass).double()
    outside = torch.zeros_like(p).scatter(-1, ranked.indices, inside) == 0
    engine = bf16(world.logits).masked_fill(outside, -INF)
    ids = world.sample(engine)
    return logprobs(world.logits, ids), logprobs(engine, ids)


def barely_kept(world):
    """So much that rounding hides which tokens it moved."""
    return kept(world, 0.99)


def kept_by_the_trainer(world):
    return kept(world)[::-1]


def constant(world):
    ours = logprobs(world.logits, world.sampled)
    return ours, logprobs(bf16(world.logits), world.sampled) - 0.5


def shifted(world):
    ours = logprobs(world.logits, world.sampled)
    return ours, ours.roll(1, -1)


def shifted_back(world):
    return shifted(world)[::-1]


def stale(world, much=0.5):
    """The trainer has taken steps since."""
    ours = logprobs(world.logits + much * world.normal(B, T, V), world.sampled)
    return ours, logprobs(world.logits, world.sampled)


def broken(world):
    other = World(seed=1).logits
    return logprobs(other, world.sampled), logprobs(world.logits, world.sampled)


def few_sequences(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    other = stale(world, 2.0)[0]
    apart = torch.tensor([3, 17])
    ours[apart] = other[apart]
    return ours, theirs


def few_tokens(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    apart = world.uniform(B, T) < 0.008
    return ours.where(~apart, ours - 8 - 9 * world.uniform(B, T)), theirs


def drift(world):
    grown = torch.linspace(0, 1.5, T, dtype=torch.float64)[:, None]
    ours = logprobs(world.logits + grown**2 * world.normal(B, T, V), world.sampled)
    return ours, logprobs(world.logits, world.sampled)


def zeros(world):
    """Tokens of a tool, which the engine did not sample and the mask lets through."""
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    theirs[:, 10:14] = 0
    return ours, theirs


def engine_nan(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    return ours, theirs.where(ours < -0.005, NAN)


def engine_nan_anywhere(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    return ours, theirs.where(world.uniform(B, T) > 0.1, NAN)


def trainer_nan(world):
    return engine_nan_anywhere(world)[::-1]


def impossible(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    ours[2, 7] = -INF
    return ours, theirs


def probabilities(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    return ours, theirs.exp()


def decimal_logarithms(world):
    ours = logprobs(world.logits, world.sampled)
    return ours, ours / math.log(10)


BEYOND = "beyond rounding"
PATTERNS = {
    temperature: ["temperature", BEYOND],
    raw_logprobs: ["temperature", BEYOND],
    decimal_logarithms: ["temperature", BEYOND],
    kept: ["one-sided", BEYOND],
    kept_by_the_trainer: ["one-sided", BEYOND],
    barely_kept: ["mean ratio"],
    constant: ["offset", BEYOND],
    shifted: ["shifted tokens", BEYOND],
    shifted_back: ["shifted tokens", BEYOND],
    stale: [BEYOND],
    broken: [BEYOND],
    few_sequences: ["few sequences", BEYOND],
    few_tokens: ["few tokens", BEYOND],
    drift: ["drift", BEYOND],
    zeros: ["zeros"],
    engine_nan: ["unknown log-probs"],
    engine_nan_anywhere: ["unknown log-probs"],
    trainer_nan: ["unknown log-probs"],
    impossible: ["infinite log-probs"],
    probabilities: ["no log-probs", "one-sided", BEYOND],
}
GRAVE = {shifted, shifted_back, trainer_nan, impossible, probabilities, broken}
GRAVE |= {decimal_logarithms}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)
def test_each_pattern_is_found_where_it_is_and_only_there(pattern, seed):
    world = World(seed + 10)
    report = mismatch_report(*pattern(world))
    found = [name for name in names(report) if name != "few effective sequences"]
    assert sorted(found) == sorted(PATTERNS[pattern])
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=list(Severity).index)
    assert (severities[0] is Severity.GRAVE) == (pattern in GRAVE)
    for finding in report.findings:
        said = " ".join(str(report).split())
        assert f"{finding.severity.value} {finding.name}: {finding.evidence}" in said


def evidence(report, name: str) -> str:
    (finding,) = (f for f in report.findings if f.name == name)
    return f"{finding.evidence} {finding.advice}"


def test_what_the_evidence_says(world):
    report = mismatch_report(*kept(world))
    mass = math.exp(report.mean)
    assert 0.89 < mass < 0.95 and f"{mass:.4g}" in evidence(report, "one-sided")
    assert "less likely to the trainer" in evidence(report, "one-sided")
    turned = mismatch_report(*kept_by_the_trainer(world))
    assert "more likely to the trainer" in evidence(turned, "one-sided")
    assert "2.3 times" in evidence(mismatch_report(*decimal_logarithms(world)), "temperature")
    assert "+0.5" in evidence(mismatch_report(*constant(world)), "offset")
    assert "2 of 32 sequences" in (
        said := evidence(mismatch_report(*few_sequences(world)), "few sequences")
    )
    assert "3" in said and "17" in said
    assert "place before" in evidence(mismatch_report(*shifted(world)), "shifted tokens")
    assert "place after" in evidence(mismatch_report(*shifted_back(world)), "shifted tokens")
    ours, theirs = zeros(world)
    missing = int(((theirs == 0) & (ours < -0.5)).sum())
    assert missing > 80
    said = evidence(mismatch_report(ours, theirs), "zeros")
    assert f"{missing} log-probs of the engine and 0 of the trainer are 0" in said
    assert "Harmless" in evidence(mismatch_report(*engine_nan(world)), "unknown log-probs")


@pytest.mark.parametrize("factor", [0.8, 0.95, 1.2])
def test_the_temperature_is_at_least_so_far_off(world, factor):
    """The trainer's log-probs are `factor` times the engine's, and a part of it is seen."""
    said = evidence(mismatch_report(*temperature(world, factor)), "temperature")
    seen = float(said.split("the trainer's is ")[1].split(" times")[0])
    assert min(factor, 1) < seen < 1 if factor < 1 else 1 < seen < factor
    assert abs(seen - 1) > 0.3 * abs(factor - 1)


def test_a_mean_ratio_above_1_is_that_of_other_log_probs(world):
    ours, theirs = (
        logprobs(world.logits, world.sampled),
        logprobs(bf16(world.logits), world.sampled),
    )
    theirs = theirs - 0.04 * world.uniform(B, T)
    said = evidence(mismatch_report(ours, theirs), "mean ratio")
    assert "other log-probs than it sampled with" in said


def test_one_token_that_is_far_off_is_no_matter_of_its_sequence(world):
    ours = logprobs(world.logits, world.sampled)
    theirs = logprobs(bf16(world.logits), world.sampled)
    ours[3, 40] -= 200
    assert "few tokens" in (found := names(mismatch_report(ours, theirs)))
    assert "few sequences" not in found


def test_a_few_late_tokens_that_are_far_off_are_no_drift():
    """Differences that hardly grow, of either sign, and in ten sequences one of 30 nats."""
    d = (0.05 + 0.001 * torch.arange(T)).expand(B, T).clone()
    d[::2] *= -1
    d[:30:3, -5] = -30.0
    theirs = torch.full((B, T), -1.0)
    found = names(mismatch_report(theirs + d, theirs))
    assert "few tokens" in found and "drift" not in found


def test_noise_alone_has_no_mean_ratio(world):
    """Its variance raises the mean of exp d, which is then sure to be above 1."""
    theirs = -1 - 2 * world.uniform(40_000)
    ours = theirs + 0.1 * world.normal(40_000)
    assert (ours - theirs).exp().mean() > 1.003
    assert "mean ratio" not in names(mismatch_report(ours, theirs))


def test_few_sequences_need_sequences(world):
    flat = (x.reshape(-1) for x in few_sequences(world))
    assert "few sequences" not in names(mismatch_report(*flat))


def test_the_words_are_few(world):
    lines = str(mismatch_report(*stale(world))).splitlines()
    assert len(lines) <= 16 and max(map(len, lines)) < 125
    assert lines[0].startswith("tokens       2048 of 32 sequences")
    assert lines[6].startswith("verdict")


def test_the_numbers_are_json():
    report = mismatch_report(OURS, THEIRS, MASK)
    numbers = json.loads(json.dumps(report.numbers(), allow_nan=False))
    assert numbers["worst"][0] == {
        "at": [1, 0],
        "logprob": -3.0,
        "rollout_logprob": -1.0,
        "difference": -2.0,
    }
    assert numbers["findings"][0]["severity"] == "grave"
    assert numbers["verdict"] == report.verdict and numbers["k1"] == report.k1
    assert numbers["sequence_log_ratios"] == [-0.5, -2.0]


def test_drawn_rounding_leaves_torchs_generator_alone(world):
    before = torch.get_rng_state()
    mismatch_report(*stale(world))
    assert torch.equal(torch.get_rng_state(), before)


MISTAKES = {
    "three dimensions": (lambda x: (x[None], x[None]), {}, r"logprobs must be \[N\] or \[B, T\]"),
    "shapes": (lambda x: (x, x[:1]), {}, "rollout_logprobs must have the shape of logprobs"),
    "a mask's shape": (lambda x: (x, x, MASK[0]), {}, "loss_mask must have the shape of logprobs"),
    "a mask's dtype": (lambda x: (x, x, x), {}, "loss_mask must be bool or 0/1 integers"),
    "integers": (lambda x: (x.long(), x), {}, "logprobs must be float16"),
    "bounds of [B, T]": (lambda x: (x, x), {"cu_seqlens": torch.tensor([0, 8])}, "packed tokens"),
    "no values": (lambda x: (x.to("meta"), x.to("meta")), {}, "logprobs must have values"),
    "a number for rounding": (lambda x: (x, x), {"rounding": 0.01}, "rounding must be a tensor"),
    "worst": (lambda x: (x, x), {"worst": -1}, "worst must be at least 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    arguments, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        mismatch_report(*arguments(torch.full((2, 4), -1.0)), **options)
