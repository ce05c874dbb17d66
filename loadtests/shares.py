"""Arithmetic of fair shares: share error, Jain's index, service gap and its published bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def normalised(service: Mapping[str, float], weights: Mapping[str, float]) -> list[float]:
    """Service of each tenant over its weight; equal for all when the shares are fair."""
    if not service or service.keys() != weights.keys():
        raise ValueError("service and weights must name the same tenants, at least one")
    return [served / weights[tenant] for tenant, served in service.items()]


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    if not squares:
        raise ValueError("needs values, at least one of them above zero")
    return sum(values) ** 2 / (len(values) * squares)


def share_error(service: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Largest deviation of a tenant's part of the service, relative to the part it is due."""
    if not service or service.keys() != weights.keys():
        raise ValueError("service and weights must name the same tenants, at least one")
    total, weight = sum(service.values()), sum(weights.values())
    if not total:
        raise ValueError("nothing was served")
    return max(
        abs(served / total / (weights[tenant] / weight) - 1) for tenant, served in service.items()
    )


def vtc_bound(longest_prompt: int, batch_tokens: int) -> float:
    """Most by which the service of two backlogged tenants of weight 1 may differ in any interval.

    2 * max(w_p * L_in, w_q * M) of "Fairness in Serving Large Language Models" (Sheng et al.,
    OSDI 2024), both token prices 1; `batch_tokens` is the most the running batch holds.
    """
    return 2.0 * max(longest_prompt, batch_tokens)


class GapMeter:
    """Largest difference of two tenants' normalised service over any interval.

    An interval's difference is that of the running difference at its ends, so the extremes of the
    running difference of each pair are all that has to be kept.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        names = list(weights)
        self._ranges = {
            (a, b): [0.0, 0.0] for index, a in enumerate(names) for b in names[index + 1 :]
        }

    def look(self, service: Mapping[str, float]) -> None:
        for (a, b), ends in self._ranges.items():
            apart = service[a] / self._weights[a] - service[b] / self._weights[b]
            ends[0], ends[1] = min(ends[0], apart), max(ends[1], apart)

    @property
    def gap(self) -> float:
        return max((high - low for low, high in self._ranges.values()), default=0.0)


def while_backlogged(starts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Jobs started of each tenant until the first tenant has none left to start."""
    end = min(max(times) for times in starts.values())
    return {tenant: float(sum(at <= end for at in times)) for tenant, times in starts.items()}
