"""CAB's efficiency length: from which length on a method of linear cost beats attention of quadratic cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def efficiency_length(
    lengths: Sequence[int], dense: Sequence[float], method: Sequence[float], *, skip_first: bool = False
) -> float | None:
    """The larger root of a n^2 + (b - e) n + (c - f), from least-squares fits a n^2 + b n + c and e n + f.

    `dense` and `method` are seconds, or bytes, at `lengths`; `skip_first` leaves the shortest out of the method's fit,
    as CAB does for seconds. None where the curves never cross. Raises ValueError with fewer than three lengths.
    """
    if len(lengths) < 3 or len(lengths) != len(dense) or len(lengths) != len(method):
        raise ValueError("three lengths or more are needed, and a figure of both for each")
    a, b, c = _fit(lengths, dense, 2)
    from_ = 1 if skip_first else 0
    e, f = _fit(lengths[from_:], method[from_:], 1)
    inside = (b - e) ** 2 - 4 * a * (c - f)
    if inside < 0 or a == 0:
        return None
    return (-(b - e) + inside**0.5) / (2 * a)


def _fit(lengths: Sequence[int], values: Sequence[float], degree: int) -> list[float]:
    """Coefficients, highest power first."""
    scale = float(max(lengths))  # keeps the powers of one size
    n = torch.tensor(lengths, dtype=torch.float64) / scale
    powers = torch.stack([n**power for power in range(degree, -1, -1)], 1)
    found = torch.linalg.lstsq(powers, torch.tensor(values, dtype=torch.float64)[:, None]).solution[:, 0]
    return [float(one) / scale**power for one, power in zip(found, range(degree, -1, -1), strict=True)]
