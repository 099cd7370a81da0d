"""The verdict on the probes, in a sentence, with paired comparisons."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.reports.formats import ALL_LABELS, capitalised, percent, points, share_name
from stages.reports.probes import Probe, cell, fractions, named, neighbour_counts

BOOTSTRAP_SAMPLES = 10_000


def verdict(probes: Sequence[Probe]) -> dict[str, Any]:
    """What the probes say, in a sentence.

    The subject is the recipe's first encoder that was trained here (or else a published one, or a baseline): it is
    not picked by its score.

    Returns:
        {"sentence", "few_labels", "caveat", "state": better | mixed | worse | same | alone, "subject",
        "comparisons": [{"against", "difference", "interval", "state"}],
        "scores": [{"label", "kind", "step", "backbone", "top1", "interval"}]}
    """
    subject = min(probes, key=lambda probe: (not probe.name.learned, probe.name.kind == "timm"))
    others = [probe for probe in probes if probe is not subject]
    comparisons = [compare(subject, other) for other in sorted(others, key=lambda probe: probe.name.learned)]
    top1, (low, high) = _top1(subject), subject.metrics["linear"]["top1_ci95"]
    sentence = (
        f"{capitalised(subject.name.label)} reaches {percent(top1)} top-1 with a linear probe "
        f"(95% interval {points(low)} to {points(high)})"
    )
    if comparisons:
        sentence += ": " + _join([_comparison_text(item) for item in comparisons])
    states = {item["state"] for item in comparisons}
    state = "alone" if not states else states.pop() if len(states) == 1 else "mixed"
    test = subject.metrics["protocol"]["test"]
    return {
        "sentence": sentence + ".",
        "few_labels": _few_labels(subject, others),
        "caveat": f"On these {test:,} test images, one seed: the intervals hold for other test images, "
        "not for another training run.",
        "state": state,
        "subject": subject.name.label,
        "comparisons": comparisons,
        "scores": [
            {**named(probe.name), "top1": _top1(probe), "interval": probe.metrics["linear"]["top1_ci95"]}
            for probe in (subject, *others)
        ],
    }


def compare(probe: Probe, other: Probe) -> dict[str, Any]:
    """Difference of two probes in top-1 with its 95% interval, a paired bootstrap over the test images.

    A resampling draws the counts of images that only the one, only the other, and both or neither got right: the
    same distribution as drawing the images. Without the same test images there is no interval.
    """
    difference = _top1(probe) - _top1(other)
    interval = None
    if np.array_equal(probe.ids, other.ids):
        gains = probe.correct.astype(np.int64) - other.correct.astype(np.int64)
        shares = [np.mean(gains == sign) for sign in (1, -1, 0)]
        drawn = np.random.default_rng(0).multinomial(len(gains), shares, size=BOOTSTRAP_SAMPLES)
        differences = (drawn[:, 0] - drawn[:, 1]) / len(gains)
        interval = [round(float(bound), 6) for bound in np.quantile(differences, [0.025, 0.975])]
    found = {"against": other.name.label, "difference": round(difference, 6), "interval": interval}
    return found | {"state": _state(interval)}


def _state(interval: list[float] | None) -> str:
    if interval is None:
        return "unpaired"
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "same"


def _comparison_text(item: dict[str, Any]) -> str:
    size = points(abs(item["difference"]))
    against = f"the {item['against']}" if item["against"].startswith("random encoder") else item["against"]
    if item["interval"] is None:
        return f"{size} points {'above' if item['difference'] >= 0 else 'below'} {against} (other test images)"
    low, high = sorted(abs(bound) for bound in item["interval"])
    if item["state"] == "same":
        return f"not told apart from {against} ({item['difference'] * 100:+.1f} points)"
    return f"{item['state']} than {against} by {size} points ({points(low)} to {points(high)})"


def _few_labels(subject: Probe, others: Sequence[Probe]) -> str | None:
    """A sentence about the smallest share of the labels, by the first of the neighbours (which fits nothing)."""
    share, k = fractions(subject.metrics)[0], neighbour_counts(subject.metrics)[0]
    cells = [(probe.name.label, cell(probe.metrics, k, share)) for probe in (subject, *others)]
    scores = [(label, percent(one.value)) for label, one in cells if one]
    if share == ALL_LABELS or len(scores) < len(cells):
        return None
    labels = subject.metrics["label_curve"][share]["labels"]
    text = f"With {share_name(share)} of the labels ({labels:,}), {k} nearest neighbours reach {scores[0][1]}"
    against = [f"{score} ({label})" for label, score in scores[1:]]
    return text + (f", against {_join(against)}." if against else ".")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _top1(probe: Probe) -> float:
    return probe.metrics["linear"]["top1"]
