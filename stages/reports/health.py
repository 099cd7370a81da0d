"""Whether a representation uses its dimensions: spectrum, effective rank, dead and constant dimensions, an alarm."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluation.representation import count_dimensions, rankme, singular_spectrum
from stages.reports.formats import percent

COLLAPSED_SHARE, COLLAPSED_RANK = 0.02, 2.0
"""Below this share of its dimension, or this many dimensions, an effective rank counts as collapsed. No publication
gives a threshold; a collapsed encoder is near 1, and these are low, so that the alarm is rare and right."""
SAMPLES_PER_DIMENSION = 10
"""Fewer, and the effective rank is an underestimate (RankMe asks for many more samples than dimensions)."""
SPECTRUM_POINTS = 200


def sample_positions(available: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, evenly spaced: rows are sorted by class folder, so each class has its share."""
    if len(available) <= most:
        return available
    return available[np.linspace(0, len(available) - 1, most).astype(np.int64)]


def thin_spectrum(values: NDArray[np.float64]) -> dict[str, list[float]]:
    """The spectrum as shares of its largest value, at evenly spaced ranks on a logarithmic axis.

    Returns:
        {"rank": from 1, "value": from 1 down}; nothing where all is zero.
    """
    if len(values) == 0 or values[0] <= 0:
        return {"rank": [], "value": []}
    ranks = np.unique(np.round(np.geomspace(1, len(values), SPECTRUM_POINTS)).astype(np.int64))
    shares = values[ranks - 1] / values[0]
    # What lies below the precision of the features is noise.
    seen = shares > 1e-7
    return {
        "rank": [int(rank) for rank in ranks[seen]],
        "value": [float(f"{share:.4g}") for share in shares[seen]],
    }


def alarm(rank: float, dimension: int, constant: int, samples: float = math.inf) -> str | None:
    """A sentence with the likely cause, where the features of so many images look collapsed."""
    if constant == dimension:
        return (
            "Collapsed: every image has the same features. Likely causes: a learning rate so high that the weights "
            "became useless, or numbers that left the range of the precision; look at loss and gradient norm."
        )
    low = max(COLLAPSED_RANK, COLLAPSED_SHARE * dimension)
    if rank < low < dimension and samples >= SAMPLES_PER_DIMENSION * low:  # a handful spans few dimensions anyway
        return (
            f"Looks collapsed: the features of all images lie in about {rank:.1f} of {dimension:,} dimensions. Likely "
            "causes: views so weak that colour alone tells images apart, too high a temperature, or too high a "
            "learning rate."
        )
    if constant > dimension / 2:
        return (
            f"{constant:,} of {dimension:,} dimensions say nothing. Likely cause: a learning rate so high that units "
            "died behind their ReLU."
        )
    return None


def health(features: NDArray[np.float32], learned: bool) -> dict[str, Any]:
    """Everything the page says of the health of one set of features [N, D], as plain data.

    Args:
        learned: whether the encoder was trained: only then an alarm makes sense.
    """
    rows = torch.from_numpy(features)
    # The triangle of a QR decomposition has the singular values of the features, and is small.
    triangle = torch.linalg.qr(rows.double(), mode="r").R
    rank = rankme(triangle)
    samples, dimension = features.shape
    counts = count_dimensions(rows)
    return {
        "samples": samples,
        "dimension": dimension,
        "few_samples": samples < SAMPLES_PER_DIMENSION * dimension,
        "rankme": float(f"{rank:.5g}"),
        "rankme_share": float(f"{rank / dimension:.4g}"),
        "dead": counts.dead,
        "constant": counts.constant,
        "spectrum": thin_spectrum(singular_spectrum(triangle).numpy()),
        "alarm": alarm(rank, dimension, counts.constant, samples) if learned else None,
    }


def health_table(sets: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a terminal shows where there are no labels: {"columns": [...], "rows": [[...], ...]}, all text."""
    columns = ["encoder", "effective rank", "of dimensions", "constant dimensions", "images measured"]
    rows = [
        [one["label"], f"{one['rankme']:.1f}", f"{one['dimension']:,}", f"{one['constant']:,}", f"{one['samples']:,}"]
        for one in sets
    ]
    return {"columns": columns, "rows": rows}


def health_verdict(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict where nothing is scored: what can be said of the first encoder that learned something."""
    subject = next((one for one in sets if one["kind"] not in ("pixels", "random")), sets[0])
    label = subject["label"][:1].upper() + subject["label"][1:]
    sentence = (
        f"{label}: an effective rank of {subject['rankme']:.1f} in {subject['dimension']:,} dimensions "
        f"({percent(subject['rankme_share'], 0)}), {subject['constant'] or 'none'} of them constant."
    )
    caveat = "Without a probe of labels nothing is scored: look at the neighbours."
    if subject["few_samples"]:
        caveat += (
            f" Measured on {subject['samples']:,} images, fewer than ten a dimension: the rank is an underestimate."
        )
    state = "collapsed" if subject["alarm"] else "alone"
    return {
        "sentence": sentence,
        "caveat": caveat,
        "fine_tuned": None,
        "few_labels": None,
        "state": state,
        "subject": subject["label"],
        "scores": [],
    }
