"""Numbers on the command line: what argparse makes of their text, or says of it."""

import argparse


def positive(text: str) -> int:
    """argparse: an integer above 0."""
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def seed(text: str) -> int:
    """argparse: what torch takes for a seed."""
    if not -(2**63) <= (value := int(text)) < 2**64:
        raise argparse.ArgumentTypeError(f"must be from -2**63 to 2**64 - 1, got {text}")
    return value


def not_negative(text: str) -> float:
    """argparse: a finite number that is not below 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, got {text}")
    return value


def above_zero(text: str) -> float:
    """argparse: a finite number above 0."""
    if (value := not_negative(text)) == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value
