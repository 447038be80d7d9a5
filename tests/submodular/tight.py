"""Instances on which a guarantee is nearly all that one gets."""

from lorambo_alloc.submodular import Coverage


def staircase(k: int, tilt: float = 0.0) -> tuple[Coverage, list[int]]:
    """Coverage on which greedy gets 1 - (1 - 1/k)^k of the optimum under a cardinality k.

    The last k elements are disjoint and of weight 1. Element t < k covers the t-th piece, of weight
    (1/k) (1 - 1/k)^t, of each of them: as much as any one of them has left. Of equal gains greedy
    takes the first; where rounding would decide (k above 8), a tilt takes so much off the last k.

    Returns:
        The objective and the optimal set.
    """
    sizes = [(1 - 1 / k) ** t / k for t in range(k)]
    sizes.append(1 - sum(sizes) - tilt)
    pieces = k + 1
    steps = [[i * pieces + t for i in range(k)] for t in range(k)]
    optimal = [[i * pieces + t for t in range(pieces)] for i in range(k)]
    return Coverage([*steps, *optimal], sizes * k), list(range(k, 2 * k))
