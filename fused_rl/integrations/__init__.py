"""One import away: the seams of other packages, served by this one. Each module is imported alone.

Nothing here is imported by `fused_rl`, and importing a module changes nothing in the other package.
"""
