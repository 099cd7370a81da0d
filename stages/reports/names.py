"""What encoders are called on the page, and which of them make one row of its table."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stages.reports.artifacts import Artifact, Lineage
from stages.reports.formats import value

BASELINES = ("pixels", "random")
"""Encoders that learned nothing."""
FINE_TUNED = "fine-tuned"
LOSSES = {
    "arcface": "ArcFace",
    "cosface": "CosFace",
    "cross_entropy": "cross-entropy",
    "multi_similarity": "multi-similarity",
    "n_pairs": "N-pairs",
    "soft_triple": "SoftTriple",
    "sphereface": "SphereFace",
    "sphereface_original": "original SphereFace",
    "supcon": "SupCon",
}
"""Losses whose name is not their key with spaces."""
LABELS = "label_fraction"
NAMED = {LABELS, "encoder", "loss.name"}
"""Settings that are in the name already, or make the columns of a row."""
LENGTH = {"epochs", "max_steps", "batch_size", "classes_per_batch", "images_per_class", "optimiser.warmup_epochs"}
"""Settings that may follow the number of labels: trainings that differ in them alone are one row all the same."""


@dataclass(frozen=True)
class Named:
    """How features are called on the page.

    Attributes:
        label: 'pixels', 'random encoder', 'pretrained', 'ArcFace from pretrained, 1% of the labels', ...; different
            for each.
        kind: of the encoder, as features.json says it; 'fine-tuned' where labels trained it.
        step: name of the step that is compared.
        backbone: the encoder's architecture, '' for pixels.
        row: the label of its row in the table, 'ArcFace from pretrained', where it is another.
        fraction: share of the labels that the encoder was fine-tuned on.
    """

    label: str
    kind: str
    step: str
    backbone: str
    row: str = ""
    fraction: float = 0.0

    @property
    def learned(self) -> bool:
        return self.kind not in BASELINES

    @property
    def row_label(self) -> str:
        return self.row or self.label


@dataclass(frozen=True)
class Compared:
    """What is to be named.

    Attributes:
        encoder: of features.json.
        step: that is compared.
        features: the artifact of the features; None where it is not known.
        settings: of the step that is compared, where two of the same features may differ in them.
        seed, digest: of what is compared.
    """

    encoder: dict[str, Any]
    step: str
    features: Artifact | None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    digest: str = ""


def name_all(lineage: Lineage, compared: Sequence[Compared]) -> list[Named]:
    """A name for each, no two equal; rows have different labels too: versions of one step are several rows."""
    tuned = {number: one for number, one in enumerate(compared) if _tuning(lineage, one) is not None}
    names = dict(zip(tuned, _name_tuned(lineage, list(tuned.values())), strict=True))
    others = [number for number in range(len(compared)) if number not in names]
    plain = [_name_plain(lineage, compared[number]) for number in others]
    tells = [_tells(compared[number], _maker(lineage, compared[number])) for number in others]
    labels = distinguish([name.label for name in plain], tells)
    names |= {number: replace(name, label=label) for number, name, label in zip(others, plain, labels, strict=True)}
    return [names[number] for number in range(len(compared))]


def name_with_retrievals(
    lineage: Lineage, probes: Sequence[Compared], retrievals: Sequence[Compared]
) -> tuple[list[Named], list[Named]]:
    """Names of probes and of retrievals: a retrieval is called what the first probe of its features is called.

    Several retrievals of the same features are told apart by their steps. A fine-tuning on all labels that is the one
    retrieval of its row has the name of the row.

    Args:
        retrievals: each with its features.
    """
    alone = {one.features.digest: one.features for one in retrievals if one.features}
    for probe in probes:
        if probe.features:
            alone.pop(probe.features.digest, None)
    cards = {one.features.digest: one.encoder for one in retrievals if one.features}
    units = [*probes, *(Compared(cards[key], one.step, one, {}, one.seed, key) for key, one in alone.items())]
    names = name_all(lineage, units)
    by_features: dict[str, Named] = {}
    for one, name in zip(units, names, strict=True):
        if one.features:
            by_features.setdefault(one.features.digest, name)
    own = [replace(by_features[one.features.digest], step=one.step) for one in retrievals if one.features]
    rows = [name.row_label for name in own]
    own = [
        replace(name, label=name.row_label) if name.fraction == 1 and rows.count(name.row_label) == 1 else name
        for name in own
    ]
    labels = distinguish([name.label for name in own], [_tells(one, one.step) for one in retrievals])
    told_apart = [
        replace(name, label=label, row=name.row_label + label.removeprefix(name.label))
        for name, label in zip(own, labels, strict=True)
    ]
    return names[: len(probes)], told_apart


def name_features(encoder: dict[str, Any], step: str) -> Named:
    """A name from the encoder card of features.json."""
    kind = FINE_TUNED if encoder["stage"] == "finetune" or encoder["labels_seen"] else encoder["kind"]
    backbone = "" if kind == "pixels" else str(encoder["name"])
    label = {"random": "random encoder", "timm": f"timm {backbone.removeprefix('timm:')}"}.get(kind, kind)
    return Named(label, kind, step, backbone)


def distinguish(labels: Sequence[str], tells: Sequence[Sequence[str]]) -> list[str]:
    """Where several have one label, add the first of `tells` that all of these differ in, or else the last.

    Args:
        tells: for each label what may be added, in the order of preference.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for number, label in enumerate(labels):
        found[label].append(number)
    result = list(labels)
    for label, members in found.items():
        if len(members) == 1:
            continue
        choices = list(zip(*(tells[number] for number in members), strict=True))
        words = next((words for words in choices if all(words) and len(set(words)) == len(words)), choices[-1])
        for number, word in zip(members, words, strict=True):
            result[number] = f"{label} ({word})"
    return result


def describe_tuning(lineage: Lineage, artifact: Artifact, loss: str) -> str:
    """'ArcFace from pretrained': the loss, where the weights came from, and whether pseudo-labels were learned too."""
    return f"{loss_name(loss)} from {start_name(lineage, artifact)}{_pseudo_labels(lineage, artifact)}"


def _pseudo_labels(lineage: Lineage, artifact: Artifact) -> str:
    if "pseudo_labels" not in artifact.inputs:
        return ""
    made = lineage.input(artifact, "pseudo_labels")
    of_test = made is not None and made.settings.get("include_test")
    return " with pseudo-labels" + (", of test images too" if of_test else "")


def loss_name(loss: str) -> str:
    """'cross_entropy' -> 'cross-entropy', 'triplet+supcon' -> 'triplet + SupCon'."""
    return " + ".join(LOSSES.get(one, one.replace("_", " ")) for one in loss.split("+"))


def start_name(lineage: Lineage, artifact: Artifact) -> str:
    """Where a fine-tuning started: 'pretrained', 'random', 'timm resnet18', 'triplet from pretrained'."""
    start = lineage.input(artifact, "encoder")
    if start is None:
        return str(artifact.settings.get("encoder", "random")).replace("timm:", "timm ")
    if start.stage == "finetune":
        return describe_tuning(lineage, start, str(start.settings.get("loss.name", "cross_entropy")))
    return "pretrained" if len(lineage.of_stage("pretrain")) == 1 else start.step


def share_text(fraction: float) -> str:
    """0.01 -> '1% of the labels', 1 -> 'all labels'."""
    return "all labels" if fraction == 1 else f"{100 * fraction:.4g}% of the labels"


def _tuning(lineage: Lineage, one: Compared) -> Artifact | None:
    """The fine-tuning that made the encoder, where there is one and it is known."""
    encoder = lineage.input(one.features, "encoder") if one.features else None
    return encoder if encoder and encoder.stage == "finetune" and one.encoder["labels_seen"] else None


def _name_plain(lineage: Lineage, one: Compared) -> Named:
    """A name for features of an encoder that is not known to have been fine-tuned in this lineage."""
    name = name_features(one.encoder, one.step)
    encoder = lineage.input(one.features, "encoder") if one.features else None
    if encoder is None or name.kind != FINE_TUNED:
        return name
    if encoder.stage == "finetune":  # of its head alone: the encoder is the one that it started from
        return replace(name, label=f"{start_name(lineage, encoder)}, frozen")
    fraction = float(one.encoder["labels_seen"][-1]["fraction"])
    return replace(name, label=f"pretrained from {start_name(lineage, encoder)}", fraction=fraction)


def _tells(one: Compared, maker: str) -> list[str]:
    """What may tell something from another of the same label, the plainest first; digests differ always."""
    seed = f"seed {one.seed}"
    return [maker, one.step, seed, f"{maker}, {seed}", f"{one.step}, {seed}", one.digest[:12]]


def _maker(lineage: Lineage, one: Compared) -> str:
    """The step that made the encoder, or else the features."""
    encoder = lineage.input(one.features, "encoder") if one.features else None
    return encoder.step if encoder else one.features.step if one.features else ""


def _name_tuned(lineage: Lineage, compared: Sequence[Compared]) -> list[Named]:
    """Fine-tunings that differ in their share of the labels make one row."""
    groups = _rows(lineage, compared)
    first = [compared[members[0]] for members in groups]
    labels = [_describe(lineage, one) for one in first]
    suffixes = _differences(lineage, labels, first)
    rows = [f"{label} ({suffix})" if suffix else label for label, suffix in zip(labels, suffixes, strict=True)]
    rows = distinguish(rows, [_tells(one, one.step) for one in first])
    names = {}
    for members, row in zip(groups, rows, strict=True):
        for number in members:
            one = compared[number]
            fraction = float(one.encoder["labels_seen"][-1]["fraction"])
            whole = fraction == 1 and len(members) == 1
            label = row if whole else f"{row}, {share_text(fraction)}"
            names[number] = Named(label, FINE_TUNED, one.step, str(one.encoder["name"]), row, fraction)
    return [names[number] for number in range(len(compared))]


def _rows(lineage: Lineage, compared: Sequence[Compared]) -> list[list[int]]:
    """Positions that make one row each: equal but for the labels and what follows from their number."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(compared):
        found[_key(lineage, one, LENGTH)].append(number)
    groups = []
    for members in found.values():
        if _tell_apart(compared, members):
            groups.append(members)
            continue
        # Two of one share: then only what is equal in everything but the labels is one row.
        strict: dict[str, list[int]] = defaultdict(list)
        for number in members:
            strict[_key(lineage, compared[number], set())].append(number)
        for part in strict.values():
            groups += [part] if _tell_apart(compared, part) else [[number] for number in part]
    return sorted(groups)


def _tell_apart(compared: Sequence[Compared], members: Sequence[int]) -> bool:
    fractions = [compared[number].encoder["labels_seen"][-1]["fraction"] for number in members]
    return len(set(fractions)) == len(fractions)


def _key(lineage: Lineage, one: Compared, left_out: set[str]) -> str:
    tuning = _tuning(lineage, one)
    assert tuning is not None
    assert one.features is not None
    parts = [_tuning_key(lineage, tuning, left_out), one.features.settings, one.features.inputs.get("shards")]
    return json.dumps([*parts, one.settings], sort_keys=True)


def _tuning_key(lineage: Lineage, tuning: Artifact, left_out: set[str]) -> list[Any]:
    """Everything that made the weights, the share of the labels apart, here and in fine-tunings before."""
    settings = {key: item for key, item in tuning.settings.items() if key not in left_out | {LABELS}}
    inputs: dict[str, Any] = {key: item for key, item in tuning.inputs.items() if key != "encoder"}
    pseudo = lineage.input(tuning, "pseudo_labels")
    if pseudo is not None:  # by a classifier that learned from the same share
        inputs["pseudo_labels"] = [{**pseudo.settings, LABELS: None}, pseudo.inputs, pseudo.seed]
    start = lineage.input(tuning, "encoder")
    before: Any = tuning.inputs.get("encoder")
    if start is not None and start.stage == "finetune":
        before = _tuning_key(lineage, start, left_out)
    return [settings, inputs, before, tuning.seed]


def _describe(lineage: Lineage, one: Compared) -> str:
    tuning = _tuning(lineage, one)
    assert tuning is not None
    return describe_tuning(lineage, tuning, str(one.encoder["labels_seen"][-1]["loss"]))


def _differences(lineage: Lineage, labels: Sequence[str], first: Sequence[Compared]) -> list[str]:
    """For each row the settings in which it differs from others of the same label: 'freeze encoder, margin 0.5'."""
    settings = []
    for one in first:
        tuning = _tuning(lineage, one)
        assert tuning is not None
        assert one.features is not None
        settings.append(tuning.settings | one.features.settings | one.settings)
    suffixes = []
    for label, own in zip(labels, settings, strict=True):
        alike = [other for other, name in zip(settings, labels, strict=True) if name == label]
        differing = [
            key for key in sorted(own) if key not in NAMED and any(other.get(key) != own[key] for other in alike)
        ]
        words = [
            f"{key.removeprefix('loss.').replace('_', ' ').replace('.', ' ')} {value(own[key])}" for key in differing
        ]
        suffixes.append(", ".join(words))
    return suffixes
