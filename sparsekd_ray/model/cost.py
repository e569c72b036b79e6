"""The number of parameters of a matrix in each stored form: whole numbers, and no library but Python's own.

A matrix of m by n costs m n parameters while dense and r (m + n) as a product of rank r. The gauge-fixed form
(PIFA; see `gauge.py`) drops the r² numbers by which two factors of the same product may differ and costs
r (m + n − r), which is less than m n for every rank below min(m, n). A bias adds m; only
low-rank matrices can have one.
"""

from bisect import bisect_left

ROWS_PER_CHUNK = 512
"""Rows of logits in memory at once: enough for a fast product, 400 MB in fp32 at V = 200,064. One size for all callers,
since the last bits of a product depend on it."""


def parameters(m: int, n: int, rank: int | None, gauge: bool = False, bias: bool = False) -> int:
    """Number of parameters of an m by n matrix at this rank, or dense (without bias) where rank is None."""
    if rank is None:
        return m * n
    return rank * (m + n - (rank if gauge else 0)) + (m if bias else 0)


def aligned_ranks(m: int, n: int, align: int, gauge: bool = False, bias: bool = False) -> range:
    """Multiples of `align` that save something; for plain factors those below the break-even m n / (m + n)."""
    # up to min(m, n) the count rises with the rank, so the first rank that saves nothing is found by bisection
    saves_nothing = bisect_left(
        range(min(m, n) + 1), m * n, key=lambda rank: parameters(m, n, rank, gauge, bias)
    )
    return range(align, saves_nothing, align)
