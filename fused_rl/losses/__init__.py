"""The cheap half: policy losses on vectors of length N. Nothing here hears of a vocabulary."""
