"""Shares and their intervals."""

from __future__ import annotations

import math

WORST_CASE = "worst_case"
"""The evaluator of the headline in summary.json."""
SAME_BUDGET = 1e-9
"""Relative difference of budgets that are the same but for rounding."""


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default (Wilson 1927, equation 1)."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half) if successes else 0.0, min(1.0, centre + half) if successes < n else 1.0
