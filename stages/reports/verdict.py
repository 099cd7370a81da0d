"""The verdict on the probes, in a sentence, with paired comparisons."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.evaluation.groups import are_single
from stages.evaluation.intervals import bootstrap_interval
from stages.reports.formats import ALL_LABELS, capitalised, percent, plural, points, signed
from stages.reports.names import FINE_TUNED, share_text
from stages.reports.probes import Probe, Row, fractions, neighbour_counts, rows_of, share_title
from stages.reports.retrievals import RECALL_AT_1, Retrieval, are_comparable, paired_difference

BOOTSTRAP_SAMPLES = 10_000


def verdict(probes: Sequence[Probe]) -> dict[str, Any]:
    """What the probes say, in a sentence.

    The subject is the recipe's first encoder that was pretrained here (or else a fine-tuned or a published one, or a
    baseline): it is not picked by its score. All are compared where all labels of train are used; of fine-tunings on
    several shares of the labels it is the one that saw the most, and what it did not see is said.

    Returns:
        {"sentence", "fine_tuned", "few_labels", "caveat", "state": better | mixed | worse | same | alone, "subject",
        "comparisons": [{"against", "kind", "saw", "difference", "interval", "state"}],
        "scores": [{"label", "kind", "step", "backbone", "saw", "top1", "interval"}]}
    """
    rows = rows_of(probes)
    subject = min(rows, key=lambda row: (not row.name.learned, row.name.kind == "timm", row.name.kind == FINE_TUNED))
    others = [row for row in rows if row is not subject]
    comparisons = [_compare_rows(subject, other) for other in sorted(others, key=lambda row: row.name.learned)]
    plain = [item for item in comparisons if item["kind"] != FINE_TUNED]
    top1, (low, high) = _top1(subject.fullest), subject.fullest.metrics["linear"]["top1_ci95"]
    sentence = (
        f"{capitalised(subject.label)}{_seen(_saw(subject))} reaches {percent(top1)} top-1 with a linear probe "
        f"(95% interval {points(low)} to {points(high)})"
    )
    if plain:
        sentence += ": " + _join([_comparison_text(item) for item in plain])
    states = {item["state"] for item in plain or comparisons}
    state = "alone" if not states else states.pop() if len(states) == 1 else "mixed"
    return {
        "sentence": sentence + ".",
        "fine_tuned": _fine_tuned_text(
            subject.label,
            [item for item in comparisons if item["kind"] == FINE_TUNED],
            "With all labels, by linear probe",
        ),
        "few_labels": _few_labels(subject, others),
        "caveat": _caveat(probes, subject.fullest),
        "state": state,
        "subject": subject.label,
        "comparisons": comparisons,
        "scores": [_score(row) for row in (subject, *others)],
    }


def retrieval_verdict(retrievals: Sequence[Retrieval]) -> dict[str, Any]:
    """What the retrievals say, as `verdict` does: by recall@1, with paired comparisons, of a subject chosen alike."""
    subject = min(
        retrievals,
        key=lambda one: (not one.name.learned, one.name.kind == "timm", one.name.kind == FINE_TUNED),
    )
    others = [one for one in retrievals if one is not subject]
    comparisons = [_compare_retrievals(subject, other) for other in sorted(others, key=lambda one: one.name.learned)]
    plain = [item for item in comparisons if item["kind"] != FINE_TUNED]
    value, (low, high) = subject.figure(RECALL_AT_1)
    sentence = (
        f"With {subject.name.label} the nearest image is of the right class for {percent(value)} of "
        f"{len(subject.groups):,} queries (95% interval {points(low)} to {points(high)})"
    )
    if plain:
        sentence += ": " + _join([_comparison_text(item, "queries") for item in plain])
    states = {item["state"] for item in plain or comparisons}
    tuned = [item for item in comparisons if item["kind"] == FINE_TUNED]
    return {
        "sentence": sentence + ".",
        "fine_tuned": _fine_tuned_text(subject.name.label, tuned, "By the nearest image", "queries"),
        "few_labels": None,
        "caveat": _retrieval_caveat(retrievals, subject),
        "state": "alone" if not states else states.pop() if len(states) == 1 else "mixed",
        "subject": subject.name.label,
        "comparisons": comparisons,
        "scored": "Recall@1",
        "scores": [_retrieval_score(one) for one in (subject, *others)],
    }


def _compare_retrievals(subject: Retrieval, other: Retrieval) -> dict[str, Any]:
    interval = None
    if subject.is_comparable_with(other):
        difference, interval = paired_difference(subject, other, RECALL_AT_1)
    else:
        difference = round(subject.figure(RECALL_AT_1)[0] - other.figure(RECALL_AT_1)[0], 6)
    found = {"against": other.name.label, "difference": difference, "interval": interval, "state": _state(interval)}
    return found | {"kind": other.name.kind, "saw": None}


def _retrieval_caveat(retrievals: Sequence[Retrieval], subject: Retrieval) -> str:
    """What the figures of retrieval do not say."""
    protocol = subject.metrics["protocol"]
    seeds = len({one.seed for one in retrievals})
    text = (
        f"Queries of {plural(protocol['identities'], 'class', 'classes')} among {protocol['gallery']:,} images, "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}: the intervals hold for other "
        f"{'queries' if subject.several_labels else 'classes'}, not for another training run."
    )
    if not are_comparable(retrievals):
        text += " Not all have the same queries and gallery: see the protocol."
    flattered = [one.name.label for one in retrievals if one.transductive]
    if flattered:
        text += (
            f" Transductive: {_join(flattered)}, trained on query images or on images of their classes, so that "
            "classes never seen may be found less well."
        )
    return text


def _retrieval_score(one: Retrieval) -> dict[str, Any]:
    value, interval = one.figure(RECALL_AT_1)
    card = {"label": one.name.label, "kind": one.name.kind, "step": one.name.step, "backbone": one.name.backbone}
    return card | {"saw": None, "top1": value, "interval": [*interval]}


def _caveat(probes: Sequence[Probe], subject: Probe) -> str:
    """What the scores do not say."""
    protocol = subject.metrics["protocol"]
    seeds = len({probe.seed for probe in probes})
    text = (
        f"On these {protocol['test']:,} test images, {'one seed' if seeds == 1 else f'{seeds} seeds'}: the intervals "
        "hold for other test images, not for another training run."
    )
    shared = (protocol.get("groups") or {}).get("test_images_shared", 0)
    if shared:
        text += f" {shared:,} of the test images are of groups that have training images too: the scores flatter."
    others = [probe.name.label for probe in probes if probe.metrics["protocol"].get("encoder_saw_other_labels")]
    if others:
        text += (
            f" {_join(others)} learned from labels that are not among those at hand: where test images of this page "
            "were among them, the score flatters."
        )
    return text


def compare(probe: Probe, other: Probe) -> dict[str, Any]:
    """Difference of two probes in top-1 with its 95% interval, a paired bootstrap over the test images.

    A resampling draws the counts of images that only the one, only the other, and both or neither got right: the
    same distribution as drawing the images. Where images form groups, whole groups are drawn. Without the same test
    images there is no interval.
    """
    difference = _top1(probe) - _top1(other)
    interval = None
    if probe.scored_on_those_of(other):
        gains = probe.correct.astype(np.int64) - other.correct.astype(np.int64)
        if probe.groups is not None and not are_single(probe.groups):
            bounds = bootstrap_interval(gains, BOOTSTRAP_SAMPLES, groups=probe.groups)
        else:
            shares = [np.mean(gains == sign) for sign in (1, -1, 0)]
            drawn = np.random.default_rng(0).multinomial(len(gains), shares, size=BOOTSTRAP_SAMPLES)
            bounds = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(gains), [0.025, 0.975])
        interval = [round(float(bound), 6) for bound in bounds]
    found = {"against": other.name.row_label, "difference": round(difference, 6), "interval": interval}
    return found | {"state": _state(interval)}


def _compare_rows(subject: Row, other: Row) -> dict[str, Any]:
    return compare(subject.fullest, other.fullest) | {"kind": other.name.kind, "saw": _saw(other)}


def _saw(row: Row) -> float | None:
    """Share of the labels that trained the encoder, where it is compared beside all labels and saw others."""
    curve = row.fullest.metrics["label_curve"][ALL_LABELS]
    return None if curve["encoder_saw_exactly"] else curve["encoder_saw"]


def _score(row: Row) -> dict[str, Any]:
    probe, name = row.fullest, row.name
    card = {"label": row.label, "kind": name.kind, "step": probe.name.step, "backbone": name.backbone}
    return card | {"saw": _saw(row), "top1": _top1(probe), "interval": probe.metrics["linear"]["top1_ci95"]}


def _state(interval: list[float] | None) -> str:
    if interval is None:
        return "unpaired"
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "same"


def _comparison_text(item: dict[str, Any], images: str = "test images") -> str:
    size = points(abs(item["difference"]))
    against = f"the {item['against']}" if item["against"].startswith("random encoder") else item["against"]
    against += _seen(item["saw"])
    if item["interval"] is None:
        return f"{size} points {'above' if item['difference'] >= 0 else 'below'} {against} (other {images})"
    low, high = sorted(abs(bound) for bound in item["interval"])
    if item["state"] == "same":
        return f"not told apart from {against} ({signed(item['difference'])} points)"
    return f"{item['state']} than {against} by {size} points ({points(low)} to {points(high)})"


FOUND = {
    "worse": "better than {subject}",  # the subject's state; the sentence is about the others
    "same": "not told apart from {subject}",
    "better": "worse than {subject}",
    "unpaired": "measured on other {images}",
}


def _fine_tuned_text(
    subject: str, comparisons: Sequence[dict[str, Any]], begin: str, images: str = "test images"
) -> str | None:
    """A sentence about the fine-tuned encoders: those that are better than the subject first."""
    parts = []
    for state, words in FOUND.items():
        found = [item for item in comparisons if item["state"] == state]
        listed = [f"{item['against']} ({_gain(item)})" for item in found]
        if listed:
            verb = "is" if len(listed) == 1 else "are"
            parts.append(f"{_join(listed)} {verb} {words.format(subject=subject, images=images)}")
    return f"{begin}: {'; '.join(parts)}." if parts else None


def _gain(item: dict[str, Any]) -> str:
    """'+4.2 points': by how much what was compared is above the subject, and what it saw where that is less."""
    saw = "" if item["saw"] is None else f", saw {share_text(item['saw'])}"
    return f"{signed(-item['difference'])} points{saw}"


def _few_labels(subject: Row, others: Sequence[Row]) -> str | None:
    """A sentence about the smallest share of the labels, by the first of the neighbours (which fits nothing).

    Means over subsets are compared with one another; an encoder that was fine-tuned on one subset is compared on it.
    """
    metrics = subject.fullest.metrics
    share, k = fractions(metrics)[0], neighbour_counts(metrics)[0]
    if share == ALL_LABELS:
        return None
    title = share_title([metrics], share)
    plain = [row for row in (subject, *others) if row.name.kind != FINE_TUNED]
    cells = [(row.label, row.cell(k, share)) for row in plain]
    scores = [(label, percent(one.value)) for label, one in cells if one and one.value is not None]
    text = ""
    neighbours = plural(int(k), "nearest neighbour")
    reach = "reaches" if k == "1" else "reach"
    if plain and plain[0] is subject and len(scores) == len(cells):
        labels = metrics["label_curve"][share]["labels"]
        text = f"With {title} of the labels ({labels:,}), {neighbours} {reach} {scores[0][1]}"
        against = [f"{score} ({label})" for label, score in scores[1:]]
        text += f", against {_join(against)}." if against else "."
    tuned = [(row, one) for row in (subject, *others) if (one := _tuned_cell(row, k, share))]
    same = [(row, one) for row, one in tuned if one[0] == tuned[0][1][0]]
    if not same:
        return text or None
    index = same[0][1][0]
    listed = [f"{percent(score)} ({row.label})" for row, (_, score) in same]
    text += " " if text else f"With {title} of the labels, by {neighbours}: "
    text += f"Fine-tuned on one such subset: {_join(listed)}"
    own = _on_subset(subject, k, share, index)
    return text + (f"; {subject.label} reaches {percent(own)} with the same labels." if own is not None else ".")


def _tuned_cell(row: Row, k: str, share: str) -> tuple[int, float] | None:
    """Subset and score of an encoder that was fine-tuned on exactly this share."""
    one = row.cell(k, share) if row.name.kind == FINE_TUNED else None
    if one is None or one.value is None or one.saw is not None or one.subset is None:
        return None
    return one.subset, one.value


def _on_subset(row: Row, k: str, share: str, index: int) -> float | None:
    """The score of an encoder without labels on one subset."""
    curve = row.fullest.metrics["label_curve"].get(share)
    if row.name.kind == FINE_TUNED or curve is None or index not in curve["subset_indices"]:
        return None
    return curve["knn"][k]["by_subset"][curve["subset_indices"].index(index)]


def _seen(saw: float | None) -> str:
    """' (saw 10% of the labels)', or nothing where these are the labels that count."""
    return "" if saw is None else f" (saw {share_text(saw)})"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _top1(probe: Probe) -> float:
    return probe.metrics["linear"]["top1"]
