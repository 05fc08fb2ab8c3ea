"""How sure a loss of accuracy is, where both models saw the same images."""

import math
from statistics import NormalDist
from typing import NamedTuple

HALVINGS = 60  # of an interval no wider than 2: to the last bit of a float


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


def paired_difference(lost: int, gained: int, count: int, confidence: float = 0.95) -> Interval:
    """Tango's score interval for the difference of two proportions on the same items.

    Where b of n items are lost and c gained, it holds every difference d that the score test does
    not reject: |b - c - n d| <= z sqrt(n (2 q + d (1 - d))), with q the most likely share of gained
    items given d.  Items on which both models agree count through n alone.  The interval keeps its
    level where few items differ, and does not shrink to a point where none does.

    Args:
      lost: items that the first model has right and the second has wrong.
      gained: items that the first has wrong and the second has right.
      count: all items.
      confidence: of the two-sided interval.

    Returns:
      The interval of the first proportion less the second, in [-1, 1].

    Raises:
      ValueError: the numbers of items are negative or do not fit each other.

    References:
      Tango, "Equivalence test and confidence interval for the difference in proportions for the
      paired-sample design", Statistics in Medicine 17, 1998.  Recommended with others by Fagerland,
      Lydersen and Laake, "Recommended tests and confidence intervals for paired binomial
      proportions", Statistics in Medicine 33, 2014.

    Example:
      >>> low, high = paired_difference(lost=9, gained=3, count=650)
      >>> f"{100 * low:.2f} to {100 * high:.2f} points"
      '-0.13 to 2.18 points'
    """
    if min(lost, gained) < 0 or count < 1 or lost + gained > count:
        raise ValueError(f"{lost} lost and {gained} gained items of {count} do not fit each other")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    estimate = (lost - gained) / count

    def end(outside: float) -> float:
        """Between the estimate, which no test rejects, and the last difference on one side."""
        inside = estimate
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            if abs(_score(lost, gained, count, middle)) <= z:
                inside = middle
            else:
                outside = middle
        return inside

    return Interval(end(-1.0), end(1.0))


def _score(lost: int, gained: int, count: int, difference: float) -> float:
    """The score statistic of one difference, standard normal where that is the true one."""
    b = -lost - gained + (2 * count - lost + gained) * difference
    root = math.sqrt(max(b * b + 8 * count * gained * difference * (1 - difference), 0.0))
    share = (root - b) / (4 * count)
    variance = count * (2 * share + difference * (1 - difference))
    distance = lost - gained - count * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)
