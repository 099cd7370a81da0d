"""The supervised losses as their papers' formulas, in plain loops: what tests hold ours against."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class LabelSet:
    """Several labels of a row, and the relation: any shared, all shared, or a Jaccard index from a threshold on."""

    names: frozenset[int]
    kind: str = "any"
    threshold: float = 0.5

    def belongs_to(self, other: "LabelSet") -> bool:
        shared, either = len(self.names & other.names), len(self.names | other.names)
        if shared == 0:
            return False
        return {"any": True, "all": shared == either, "jaccard": shared / either >= self.threshold}[self.kind]


Label = int | LabelSet
"""Of a row; a number below 0 and an empty set are none."""


def classes_of(label: Any) -> list[int]:
    if isinstance(label, LabelSet):
        return sorted(label.names)
    return [label] if label >= 0 else []


def together(one: Any, other: Any) -> bool:
    return one.belongs_to(other) if isinstance(one, LabelSet) else one == other and one >= 0


def unit(rows: Tensor) -> list[Tensor]:
    return [row / row.norm() for row in rows]


def distance(left: Tensor, right: Tensor) -> Tensor:
    return (left - right).norm()


def positives_of(a: int, labels: list[Any]) -> list[int]:
    return [p for p in range(len(labels)) if p != a and together(labels[p], labels[a])]


def negatives_of(a: int, labels: list[Any]) -> list[int]:
    return [n for n in range(len(labels)) if n != a and classes_of(labels[a]) and not together(labels[n], labels[a])]


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def softmax_loss(logits: list[Tensor], label: int, smoothing: float = 0.0) -> Tensor:
    """-sum_k q_k log p_k with q = (1 - e) onehot + e / K (Szegedy et al. 2016, section 7)."""
    normaliser = torch.stack([logit.exp() for logit in logits]).sum().log()
    target = [(1 - smoothing) * (k == label) + smoothing / len(logits) for k in range(len(logits))]
    return -torch.stack([q * (logit - normaliser) for q, logit in zip(target, logits, strict=True)]).sum()


# Classification


def class_weights(options: Options, counts: tuple[int, ...]) -> list[float]:
    """Cui et al. 2019, equation 4, with weights of 1 on average."""
    if options["class_weights"] == "none":
        return [1.0] * len(counts)
    raw = [(1 - 0.999) / (1 - 0.999**count) for count in counts]
    return [weight * len(raw) / sum(raw) for weight in raw]


def cross_entropy(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    weights, losses = class_weights(options, counts), []
    for row, label in zip(rows, labels, strict=True):
        if label < 0:
            continue
        logits = [w @ row + b for w, b in zip(p["head.weight"], p["head.bias"], strict=True)]
        losses.append(weights[label] * softmax_loss(logits, label, options["label_smoothing"]))
    return mean(losses)


def bce(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """-sum_k [t_k log p_k + (1 - t_k) log(1 - p_k)], p_k = 1 / (1 + exp(-z_k)); focal with gamma and alpha
    (Lin et al. 2017, equation 5)."""
    gamma, alpha = options.get("gamma", 0.0), options.get("alpha")
    weights, losses = class_weights(options, counts), []
    for row, label in zip(rows, labels, strict=True):
        row = row if options.get("scale") is None else options["scale"] * row / row.norm()
        parts = []
        for k, (w, b) in enumerate(zip(p["head.weight"], p["head.bias"], strict=True)):
            probability = 1 / (1 + (-(w @ row + b)).exp())
            of_truth = probability if k in classes_of(label) else 1 - probability
            balance = 1.0 if alpha is None else alpha if k in classes_of(label) else 1 - alpha
            parts.append(-weights[k] * balance * (1 - of_truth) ** gamma * of_truth.log())
        losses.append(torch.stack(parts).sum())
    return mean(losses)


# Margin softmax


def angle(left: Tensor, right: Tensor) -> Tensor:
    return torch.acos(left @ right / (left.norm() * right.norm()))


def nearest_angles(options: Options, row: Tensor, weight: Tensor, classes: int) -> list[Tensor]:
    """To each class's nearest centre (Deng et al. 2020)."""
    centres = options.get("centres", 1)
    return [torch.stack([angle(w, row) for w in weight[k * centres : (k + 1) * centres]]).min() for k in range(classes)]


def psi(theta: Tensor, margin: float) -> Tensor:
    """Liu et al. 2017, equation 7: (-1)^k cos(m theta) - 2 k for theta in [k pi / m, (k + 1) pi / m]."""
    k = math.floor(margin * theta.item() / math.pi)
    return (-1) ** k * torch.cos(margin * theta) - 2 * k


def own_score(name: str, theta: Tensor, margin: float) -> Tensor:
    if name == "cosface":
        return torch.cos(theta) - margin  # Wang et al. 2018, equation 4
    if name == "sphereface":
        return psi(theta, margin)
    if theta + margin > math.pi:  # as decided here
        return torch.cos(theta) - 1 + math.cos(margin)
    return torch.cos(theta + margin)  # Deng et al. 2019, equation 3


def margin_softmax(name: str) -> Callable[..., Tensor]:
    def loss(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
        losses, scale = [], options["scale"] or 16.0
        for row, label in zip(rows, labels, strict=True):
            if label < 0:
                continue
            angles = nearest_angles(options, row, p["head.weight"], len(counts))
            logits = [scale * torch.cos(theta) for theta in angles]
            logits[label] = scale * own_score(name, angles[label], options["margin"])
            losses.append(softmax_loss(logits, label))
        return mean(losses)

    return loss


def sphereface_original(
    options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]
) -> Tensor:
    """Liu et al. 2017, equations 6 to 8, with lambda at its end."""
    losses, plain = [], options["anneal_to"]
    for row, label in zip(rows, labels, strict=True):
        if label < 0:
            continue
        angles = [angle(w, row) for w in p["head.weight"]]
        logits = [row.norm() * torch.cos(theta) for theta in angles]
        own = (plain * torch.cos(angles[label]) + psi(angles[label], options["margin"])) / (1 + plain)
        logits[label] = row.norm() * own
        losses.append(softmax_loss(logits, label))
    return mean(losses)


# Pairs of a batch


def mined_pairs(
    options: Options, rows: Tensor, labels: list[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(anchor, positive) and (anchor, negative) that count; see `mine_pairs`."""
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for a in range(len(rows)):
        positives, negatives = positives_of(a, labels), negatives_of(a, labels)
        s = {k: (rows[a] @ rows[k]).item() for k in range(len(rows))}
        match options["mining"]:
            case "hard":
                positives = [min(positives, key=s.__getitem__)] if positives else []
                negatives = [max(negatives, key=s.__getitem__)] if negatives else []
            case "easy_positive":
                positives = [max(positives, key=s.__getitem__)] if positives else []
                negatives = [max(negatives, key=s.__getitem__)] if negatives else []
            case "multi_similarity":  # Wang et al. 2019, section 4.1
                least = min((s[p] for p in positives), default=math.inf)
                most = max((s[n] for n in negatives), default=-math.inf)
                positives, negatives = (
                    [p for p in positives if s[p] < most + 0.1],
                    [n for n in negatives if s[n] > least - 0.1],
                )
        found[0].extend((a, p) for p in positives)
        found[1].extend((a, n) for n in negatives)
    return found


def contrastive(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Hadsell et al. 2006, equation 4; negatives beyond the margin are not in the mean."""
    units = torch.stack(unit(rows))
    positives, negatives = mined_pairs(options, units, labels)
    power, factor = (2, 0.5) if options["squared"] else (1, 1.0)
    pulled = [factor * distance(units[a], units[b]) ** power for a, b in positives]
    near = [options["margin"] - distance(units[a], units[b]) for a, b in negatives]
    return mean(pulled) + mean([factor * one**power for one in near if one > 0])


def margin(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Wu et al. 2017, equations 6 to 8: over pairs that have a loss."""
    units = torch.stack(unit(rows))
    positives, negatives = mined_pairs(options, units, labels)
    losses = []
    for pairs, sign in ((positives, 1), (negatives, -1)):
        for a, b in pairs:
            beta = torch.stack([p["beta"][k] for k in classes_of(labels[a])]).mean()
            loss = options["alpha"] + sign * (distance(units[a], units[b]) - beta)
            if loss > 0:
                losses.append(loss + options["beta_weight"] * beta)
    return mean(losses)


def multi_similarity(
    options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]
) -> Tensor:
    """Wang et al. 2019, equation 10."""
    units = torch.stack(unit(rows))
    positives, negatives = mined_pairs(options, units, labels)
    alpha, beta, base = options["alpha"], options["beta"], options["base"]
    losses = []
    for a in range(len(rows)):
        if not classes_of(labels[a]):
            continue
        pulled = sum(((-alpha * (units[a] @ units[b] - base)).exp() for x, b in positives if x == a), torch.tensor(0.0))
        pushed = sum(((beta * (units[a] @ units[b] - base)).exp() for x, b in negatives if x == a), torch.tensor(0.0))
        losses.append((1 + pulled).log() / alpha + (1 + pushed).log() / beta)
    return mean(losses)


def circle(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Sun et al. 2020, equations 5, 6 and 8; the weights have no gradient."""
    units, m, gamma = torch.stack(unit(rows)), options["margin"], options["scale"]
    losses = []
    for a in range(len(rows)):
        positives, negatives = positives_of(a, labels), negatives_of(a, labels)
        if not positives or not negatives:
            continue
        total = torch.zeros((), dtype=torch.float64)
        for n in negatives:
            for q in positives:
                s_n, s_p = units[a] @ units[n], units[a] @ units[q]
                a_n, a_p = max(0.0, s_n.item() + m), max(0.0, 1 + m - s_p.item())
                total = total + (gamma * (a_n * (s_n - m) - a_p * (s_p - (1 - m)))).exp()
        losses.append((1 + total).log())
    return mean(losses)


def lifted_structure(
    options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]
) -> Tensor:
    """Hermans et al. 2017, equation 7."""
    kept = [a for a in range(len(rows)) if labels[a] >= 0]
    units, labels = [unit(rows)[a] for a in kept], [labels[a] for a in kept]
    losses = []
    for a in range(len(units)):
        pulled = sum(distance(units[a], units[q]).exp() for q in positives_of(a, labels))
        pushed = sum((options["margin"] - distance(units[a], units[n])).exp() for n in negatives_of(a, labels))
        losses.append((torch.as_tensor(pulled).log() + torch.as_tensor(pushed).log()).clamp(min=0))
    return mean(losses)


# Triplets


def mined_triplets(options: Options, units: Tensor, labels: list[int]) -> list[tuple[int, int, int]]:
    """(anchor, positive, negative); see `mine_triplets`."""
    found = []
    for a in range(len(units)):
        positives, negatives = positives_of(a, labels), negatives_of(a, labels)
        d = {k: distance(units[a], units[k]).item() for k in range(len(units))}
        if not positives or not negatives:
            continue

        def beyond(q: int, d: dict[int, float] = d, negatives: list[int] = negatives) -> int:
            """Schroff et al. 2015, section 3.2: the nearest negative that is farther than the positive."""
            farther = [n for n in negatives if d[n] > d[q]]
            return min(farther, key=d.__getitem__) if farther else max(negatives, key=d.__getitem__)

        match options["mining"]:
            case "all":
                found += [(a, q, n) for q in positives for n in negatives]
            case "hard":  # Hermans et al. 2017, equation 5
                found.append((a, max(positives, key=d.__getitem__), min(negatives, key=d.__getitem__)))
            case "semi_hard":
                found += [(a, q, beyond(q)) for q in positives]
            case "easy_positive":  # Xuan et al. 2020
                easiest = min(positives, key=d.__getitem__)
                found.append((a, easiest, beyond(easiest)))
            case "multi_similarity":
                kept = mined_pairs(options, units, labels)
                found += [(a, q, n) for x, q in kept[0] for y, n in kept[1] if x == y == a]
    return found


def triplet(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    units = torch.stack(unit(rows))
    losses = []
    for a, q, n in mined_triplets(options, units, labels):
        violation = distance(units[a], units[q]) - distance(units[a], units[n])
        if options["margin"] == "soft":
            losses.append((1 + violation.exp()).log())
        elif options["mining"] != "all" or options["margin"] + violation > 0:
            losses.append((options["margin"] + violation).clamp(min=0))
    return mean(losses)


# Given pairs, and pairs of classes


def pair_scores(name: str, rows: Tensor, p: Parameters) -> list[Tensor]:
    scores = []
    for left, right in zip(rows[0::2], rows[1::2], strict=True):
        if name == "pairs_concatenated":
            both = torch.cat([left, right])
            hidden = (p["head.layers.0.weight"] @ both + p["head.layers.0.bias"]).clamp(min=0)
            scores.append((p["head.layers.2.weight"] @ hidden + p["head.layers.2.bias"])[0])
        else:
            scores.append((p["head.linear.weight"] @ (left - right).abs() + p["head.linear.bias"])[0])
    return scores


def pair_classifier(name: str) -> Callable[..., Tensor]:
    def loss(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
        losses = []
        for score, left, right in zip(pair_scores(name, rows, p), labels[0::2], labels[1::2], strict=True):
            probability = 1 / (1 + (-score).exp())
            losses.append(-probability.log() if left == right >= 0 else -(1 - probability).log())
        return mean(losses)

    return loss


def pairs_cosine(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    losses = []
    for left, right, a, b in zip(rows[0::2], rows[1::2], labels[0::2], labels[1::2], strict=True):
        losses.append((left @ right / (left.norm() * right.norm()) - float(a == b >= 0)) ** 2)
    return mean(losses)


def n_pairs(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Sohn 2016, equation 6, over cosines at a temperature: log(1 + sum_j exp(a.p_j - a.p))."""
    units = unit(rows)
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    losses = []
    for first in range(0, len(rows), 2):  # images 0 and 1 of each class, then 2 and 3, ...
        pairs = [found[first : first + 2] for label, found in places.items() if label >= 0 and len(found) > first + 1]
        for anchor, own in pairs:
            total = torch.ones((), dtype=torch.float64)
            for _, other in pairs:
                if other != own:
                    gap = units[anchor] @ units[other] - units[anchor] @ units[own]
                    total = total + (gap / options["temperature"]).exp()
            losses.append(total.log())
    return mean(losses)


def supcon(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Khosla et al. 2020, equation 2 (L_out); the second half of the rows are other views of the first."""
    units, half = unit(rows), len(rows) // 2
    losses = []
    for i in range(len(rows)):
        logits = {a: units[i] @ units[a] / options["temperature"] for a in range(len(rows)) if a != i}
        normaliser = torch.stack([logit.exp() for logit in logits.values()]).sum().log()
        alike = [q for q in logits if q % half == i % half or together(labels[q % half], labels[i % half])]
        losses.append(-torch.stack([logits[q] - normaliser for q in alike]).mean())
    return mean(losses)


# Proxies


def proxy_anchor(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Kim et al. 2020, equation 4."""
    units, proxies = unit(rows), unit(p["loss.proxies"])
    alpha, delta = options["alpha"], options["margin"]
    pulled, pushed = [], []
    for k, proxy in enumerate(proxies):
        own = [x for x, label in zip(units, labels, strict=True) if label == k]
        rest = [x for x, label in zip(units, labels, strict=True) if label != k and label >= 0]
        if own:
            pulled.append((1 + torch.stack([(-alpha * (x @ proxy - delta)).exp() for x in own]).sum()).log())
        pushed.append((1 + torch.stack([(alpha * (x @ proxy + delta)).exp() for x in rest]).sum()).log())
    return mean(pulled) + mean(pushed)


def soft_triple(options: Options, rows: Tensor, labels: list[int], p: Parameters, counts: tuple[int, ...]) -> Tensor:
    """Qian et al. 2019, equations 4 and 5."""
    units, centres = unit(rows), unit(p["loss.fc"].T)
    losses, per_class = [], options["centres"]
    for x, label in zip(units, labels, strict=True):
        if label < 0:
            continue
        logits = []
        for k in range(len(counts)):
            s = torch.stack([x @ w for w in centres[k * per_class : (k + 1) * per_class]])
            weights = (s / options["gamma"]).exp() / (s / options["gamma"]).exp().sum()
            logits.append(options["scale"] * ((weights * s).sum() - options["margin"] * (k == label)))
        losses.append(softmax_loss(logits, label))
    return mean(losses)


REFERENCES: dict[str, Callable[[Options, Tensor, list[int], Parameters, tuple[int, ...]], Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "focal": bce,
    "pairs_concatenated": pair_classifier("pairs_concatenated"),
    "pairs_difference": pair_classifier("pairs_difference"),
    "pairs_cosine": pairs_cosine,
    "contrastive": contrastive,
    "margin": margin,
    "triplet": triplet,
    "arcface": margin_softmax("arcface"),
    "cosface": margin_softmax("cosface"),
    "sphereface": margin_softmax("sphereface"),
    "sphereface_original": sphereface_original,
    "n_pairs": n_pairs,
    "supcon": supcon,
    "multi_similarity": multi_similarity,
    "circle": circle,
    "proxy_anchor": proxy_anchor,
    "soft_triple": soft_triple,
    "lifted_structure": lifted_structure,
}
