"""How far a figure would move on another test set of the same size."""

from collections.abc import Iterator

import numpy as np

from stages.evaluation.groups import number_groups

CHUNK_ELEMENTS = 2**22


def bootstrap_interval(
    values: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95, groups: np.ndarray | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over test samples (Efron 1979); see `bootstrap_means`.

    Returns:
        The (1 - level) / 2 and (1 + level) / 2 quantiles of the resampled means.
    """
    return interval_of(bootstrap_means(values, samples, seed, groups), level)


def interval_of(means: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The (1 - level) / 2 and (1 + level) / 2 quantiles of resampled means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values: np.ndarray, samples: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Means over test samples that are drawn with replacement, float64 [samples].

    Samples of a group are no independent evidence: where there are groups, whole ones are drawn, as many as there are
    (the cluster bootstrap: Davison and Hinkley 1997, section 3.8), and each resampling is the mean over its samples.

    Args:
        values: [N], one number a test sample: right (1) or wrong (0), or a difference of two such for a paired
            comparison.
        samples: resamplings.
        groups: int64 [N], equal numbers are one group; None: every sample stands for itself.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number a test sample, not of shape {values.shape}")
    if groups is None:
        sums, sizes = values, np.ones(len(values))
    else:
        group = number_groups(groups)
        sums, sizes = np.bincount(group, weights=values), np.bincount(group).astype(np.float64)
    random = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(samples)
    chunk = max(1, CHUNK_ELEMENTS // len(sums))
    for begin in range(0, samples, chunk):
        count = min(chunk, samples - begin)
        drawn = random.integers(0, len(sums), (count, len(sums)))
        means[begin : begin + count] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return means


def resamplings(number: int, samples: int, seed: int, groups: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """For figures that are no means: how often each test sample is drawn, a few of the resamplings at a time.

    The draws are those of `bootstrap_means`.

    Args:
        number: N, test samples.

    Yields:
        int32 [B, N]; `samples` rows in all.
    """
    group = np.arange(number) if groups is None else number_groups(groups)
    units = int(group.max()) + 1
    random = np.random.Generator(np.random.PCG64(seed))
    chunk = max(1, CHUNK_ELEMENTS // units)
    for begin in range(0, samples, chunk):
        count = min(chunk, samples - begin)
        drawn = random.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
        yield times.astype(np.int32)[:, group]
