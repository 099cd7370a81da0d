"""How far a figure would move on another test set of the same size."""

import numpy as np

CHUNK_ELEMENTS = 2**22


def bootstrap_interval(
    values: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over test samples (Efron 1979).

    Args:
        values: [N], one number a test sample: right (1) or wrong (0), or a difference of two such for a paired
            comparison.
        samples: resamplings.

    Returns:
        The (1 - level) / 2 and (1 + level) / 2 quantiles of the resampled means.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number a test sample, not of shape {values.shape}")
    random = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(samples)
    size = max(1, CHUNK_ELEMENTS // len(values))
    for begin in range(0, samples, size):
        count = min(size, samples - begin)
        means[begin : begin + count] = values[random.integers(0, len(values), (count, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
