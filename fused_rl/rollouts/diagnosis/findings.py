"""What a diagnosis says, and from where on it says so."""

from dataclasses import dataclass, fields
from enum import Enum
from typing import NamedTuple

from fused_rl import checks


class Severity(Enum):
    """How much a finding matters, gravest first: numbers are wrong, look at it, good to know."""

    GRAVE = "grave"
    WARNING = "warning"
    NOTE = "note"


class Finding(NamedTuple):
    """What is wrong, the numbers that say so, what to do about it, and how much it matters."""

    name: str
    evidence: str
    advice: str
    severity: Severity = Severity.WARNING


@dataclass(frozen=True)
class Thresholds:
    """From where on something counts as ailing. Beginning, halfway and end are means over `window`.

    Args:
        window: steps that are judged together.
        stuck_kl: nats per token; a KL that never leaves it has moved nothing.
        entropy_left: collapse below this share of the first entropy.
        kl_growth: runaway if the KL rises, is in the end so many times that of halfway,
        runaway_kl: and above so many nats per token.
        ratio_max: runaway above this ratio of current to old policy.
        length_growth: length bias from this growth on, if reward correlates with length by
            length_correlation.
        length_correlation: of rewards and lengths over the history.
        idle_tokens: dead gradient above this share of tokens without one.
        clipped_tokens: clip saturation above this share of clipped tokens.
        unknown_tokens: unknown log-probs, or an unknown reference, above this share of tokens with
            one.
        displaced: likelihood displacement if the chosen lose more than so many nats per token.
        pair_length_correlation: length bias if margins correlate so much, either way, with how
            much longer the chosen is than the rejected.
        saturated_accuracy: saturated pairs from this accuracy on, halfway through the run,
        saturated_loss: where the loss of the pairs is at most so much, in nats.
        chance_accuracy: nothing learnt up to this accuracy in the end,
        idle_margin: where the margin has risen by at most so much, in nats.
        empty_sequences: empty completions above this share of the sequences.
    """

    window: int = 5
    stuck_kl: float = 1e-4
    entropy_left: float = 0.1
    kl_growth: float = 3.0
    runaway_kl: float = 0.1
    ratio_max: float = 1e3
    length_growth: float = 1.5
    length_correlation: float = 0.8
    idle_tokens: float = 0.95
    clipped_tokens: float = 0.3
    unknown_tokens: float = 0.01
    displaced: float = 0.25
    pair_length_correlation: float = 0.6
    saturated_accuracy: float = 0.99
    saturated_loss: float = 0.01
    chance_accuracy: float = 0.55
    idle_margin: float = 0.02
    empty_sequences: float = 0.01

    def __post_init__(self) -> None:
        checks.is_integer("window", self.window)
        for field in fields(self):
            checks.is_bound(field.name, getattr(self, field.name))
            if field.name != "length_correlation":
                checks.at_least(field.name, getattr(self, field.name), 0)
