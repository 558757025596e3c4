"""Means over facts, and how sure they are: percentile bootstrap intervals, resampled over facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


# Entries of the index matrix that are held at a time: 32 MiB of int64.
_BLOCK_ENTRIES = 2**22


class Estimate(NamedTuple):
    """A value and its confidence interval.

    Args:
        value (`float`): The value on all facts.
        low (`float`), high (`float`): Ends of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def group_means(values: Any, groups: Any, count: int) -> np.ndarray:
    """Mean of the values of each group.

    Args:
        values: (P,) numbers.
        groups: (P,) group of each, 0 to count - 1.
        count (`int`): N, number of groups.

    Returns:
        `np.ndarray`: (N,) float64; NaN for a group without any value.
    """
    places = np.asarray(groups, dtype=np.int64)
    sums = np.bincount(places, weights=np.asarray(values, dtype=np.float64), minlength=count)
    with np.errstate(invalid="ignore"):
        return sums / np.bincount(places, minlength=count)


def harmonic_mean(values: Any) -> np.ndarray:
    """Harmonic mean along the last dimension: (..., M) -> (...).

    It is 0 where a value is 0, and NaN where a value is NaN. Values are not negative.
    """
    table = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return table.shape[-1] / (1.0 / table).sum(-1)


def resample_indices(count: int, resamples: int, seed: int) -> np.ndarray:
    """Which facts are in each resample, drawn with replacement.

    Args:
        count (`int`): N, number of facts.
        resamples (`int`): R, number of resamples.
        seed (`int`): Same seed and sizes, same indices.

    Returns:
        `np.ndarray`: (R, N) int64.
    """
    return np.concatenate(list(_index_blocks(count, resamples, seed)))


def resampled_means(values: Any, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of columns on every resample of the rows; a resample takes all columns of the rows it draws.

    Args:
        values: (N, M), a row for each fact; NaN where a fact has no value, which is left out of that column's mean.
        resamples (`int`): R.
        seed (`int`): Of the draws, see `resample_indices`.

    Returns:
        `np.ndarray`: (R, M) float64; NaN where a resample drew no fact that has the value.

    Raises:
        ValueError: if there are no facts or no resamples.
    """
    table = np.asarray(values, dtype=np.float64)
    count = len(table)
    if not count:
        raise ValueError("There are no facts to resample.")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    present = ~np.isnan(table)
    filled = np.where(present, table, 0.0)
    means = []
    for indices in _index_blocks(count, resamples, seed):
        rows = len(indices)
        flat = (indices + count * np.arange(rows)[:, None]).ravel()
        drawn = np.bincount(flat, minlength=rows * count).reshape(rows, count).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((drawn @ filled) / (drawn @ present.astype(np.float64)))
    return np.concatenate(means)


def percentile_interval(samples: Any, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap samples (Efron and Tibshirani 1993, section 13.3).

    Args:
        samples: (R,) the statistic on each resample; NaN is left out.
        confidence (`float`): Share of the samples between the ends, 0 < confidence < 1.

    Returns:
        `tuple[float, float]`: quantiles (1 - confidence) / 2 and (1 + confidence) / 2, linearly interpolated.

    Raises:
        ValueError: if `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}.")
    found = np.asarray(samples, dtype=np.float64)
    found = found[~np.isnan(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def estimates(
    per_fact: Mapping[str, Sequence[float]],
    harmonic_of: Sequence[str] = (),
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Mean over facts of every named value, with its interval.

    Args:
        per_fact (`Mapping[str, Sequence[float]]`): name -> (N,) values; NaN where a fact has none.
        harmonic_of (`Sequence[str]`): Names whose means the entry `"score"` is the harmonic mean of. It is worked out
            anew on each resample, from the means of the same resampled facts. No such entry without names.
        confidence (`float`): Of the intervals.
        resamples (`int`): Number of resamples.
        seed (`int`): Of the resampling.

    Returns:
        `dict[str, Estimate]`: in the order of `per_fact`; NaN for a value that no fact has.
    """
    names, table = _table(per_fact)
    values = _with_harmonic(_means(table), names, harmonic_of)
    samples = _with_harmonic(resampled_means(table, resamples, seed), names, harmonic_of)
    return _estimates([*names, *(["score"] if harmonic_of else [])], values, samples, confidence)


def estimate_differences(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    harmonic_of: Sequence[str] = (),
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """First minus second, paired: both are worked out on the same resampled facts.

    Args:
        first, second: name -> (N,) values of the same facts in the same order; otherwise as `estimates` takes them.

    Returns:
        `dict[str, Estimate]`: an interval that leaves out 0 says that the two differ.

    Raises:
        ValueError: if the two do not hold the same names, or not the same number of facts.
    """
    names, one = _table(first)
    other_names, other = _table(second)
    if names != other_names or one.shape != other.shape:
        raise ValueError(
            f"Only scores of the same facts can be compared: got {list(names)} of {len(one)} facts and "
            f"{list(other_names)} of {len(other)}."
        )
    values, samples = (
        _with_harmonic(of(one), names, harmonic_of) - _with_harmonic(of(other), names, harmonic_of)
        for of in (_means, lambda table: resampled_means(table, resamples, seed))
    )
    return _estimates([*names, *(["score"] if harmonic_of else [])], values, samples, confidence)


def _index_blocks(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_ENTRIES // count)
    for start in range(0, resamples, rows):
        yield generator.integers(0, count, size=(min(rows, resamples - start), count))


def _table(per_fact: Mapping[str, Sequence[float]]) -> tuple[list[str], np.ndarray]:
    return list(per_fact), np.stack([np.asarray(values, dtype=np.float64) for values in per_fact.values()], axis=-1)


def _means(table: np.ndarray) -> np.ndarray:
    present = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.where(present, table, 0.0).sum(0) / present.sum(0)


def _with_harmonic(means: np.ndarray, names: list[str], harmonic_of: Sequence[str]) -> np.ndarray:
    """(..., M) -> (..., M + 1) if there is something to take the harmonic mean of."""
    if not harmonic_of:
        return means
    chosen = means[..., [names.index(name) for name in harmonic_of]]
    return np.concatenate([means, harmonic_mean(chosen)[..., None]], axis=-1)


def _estimates(
    names: Sequence[str], values: np.ndarray, samples: np.ndarray, confidence: float
) -> dict[str, Estimate]:
    return {
        name: Estimate(float(values[place]), *percentile_interval(samples[:, place], confidence))
        for place, name in enumerate(names)
    }
