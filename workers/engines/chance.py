"""Random points for drawing tokens, of a request's own where it names a seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from struct import pack

import torch

#: A seed and the number of the token to draw; None for a request without a seed.
Origin = tuple[int, int] | None


class Chance:
    """Points between 0 and 1 for the rows of one step.

    A seeded row's points depend on its seed, its position and how many it took before, and on
    nothing else in the batch.
    """

    def __init__(self, origins: Sequence[Origin]) -> None:
        self._origins = origins
        self._taken: Counter[int] = Counter()
        self._seeded = any(origin is not None for origin in origins)

    def points(self, rows: Sequence[int]) -> torch.Tensor:
        """The next point of each of these rows, [row, 1], float64."""
        points = torch.rand(len(rows), 1, dtype=torch.float64)
        if self._seeded:
            for at, row in enumerate(rows):
                origin = self._origins[row]
                if origin is not None:
                    points[at] = _point(*origin, self._taken[row])
                    self._taken[row] += 1
        return points


def _point(seed: int, position: int, taken: int) -> float:
    digest = hashlib.blake2b(pack("<qqq", seed, position, taken), digest_size=8).digest()
    # The 53 bits that a float64 below 1 can hold.
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
