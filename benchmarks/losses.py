"""Supervised losses, forward and backward, beside pytorch-metric-learning's: seconds, and MiB added at the peak.

    python -m benchmarks.losses [--quick] [--device cuda]

D = 128, float32, batches of 256, 1,024 and 4,096 rows in classes of 4 (P x K), in a process that keeps freed memory, as
`simclr` does: from that the library gains most. Its ways that give our value are taken, and the quicker reducer where
two give it. That values and gradients are equal is measured first (a note); where definitions differ a note says how.
Ours also finds the figures of a batch that training records. Memory is what one pass forward and back adds at its peak,
in a process of its own that has loss and embeddings already; of a few MiB much is code that is loaded late.

Some of the library's ways take memory by the cube of the batch: it lists all triplets, and it draws from the weights of
all pairs once more for each class. What a batch needs is reckoned beforehand (constants here are measured), and where
that is more than 4 GiB the largest batch that needs less is compared, and a note says so.

Further ratios: `pml_triplet` is our batch-hard at the largest batch against all triplets at the library's largest, by
anchor (wanted: 10); `pml_arcface` is ArcFace with 100,000 classes at 256 rows (wanted: 1); `arcface_products` is how
many times as long as the bare matrix products (one forward, two backward, the faster of two ways) ours takes there:
less is better (wanted: 1.3). Left out: SphereFace, where theirs is another loss, and what ours takes from the library.
Embeddings are made ones, between random and trained: --data is not used.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from benchmarks.harness import Comparison, Row, Work, alternate, arguments, fastest, peak_bytes, report
from pipeline.host import give_freed_memory_back, keep_freed_memory
from stages.losses import Task
from stages.losses.prototype_softmax import classes_at_once
from stages.losses.registry import build_loss
from stages.settings.losses import (
    ArcFace,
    Circle,
    Contrastive,
    CosFace,
    LossSettings,
    Margin,
    MultiSimilarity,
    NPairs,
    SupCon,
    Triplet,
)

DIMENSION, IMAGES_PER_CLASS, MANY_CLASSES = 128, 4, 100_000
RUNS = {256: 50, 1024: 15, 4096: 5}
QUICK_RUNS = {256: 9, 1024: 3}
PEER = "pytorch-metric-learning"
MOST_BYTES = 4 * 2**30
"""That a peer may need for a batch."""
BYTES_OF_TRIPLET = 62
"""Of each that the library lists, in all."""
MOST_LISTED_AT_ONCE = 2**31 - 1
"""Elements of a cube [N, N, N] of bytes that it lists triplets from; larger ones are gone through by anchor."""
MIB = 2**20
ROWS_CHECKED = 256


class Ours(nn.Module):
    """Ours under the one adapter signature: embeddings [N, D], labels int64 [N] -> a scalar."""

    def __init__(self, settings: LossSettings, classes: int):
        super().__init__()
        task = Task(DIMENSION, (IMAGES_PER_CLASS,) * classes)
        self.loss = build_loss(settings.title, settings.options, task)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.loss(embeddings, labels, 1.0)[0]


class Theirs(nn.Module):
    """The library's under the same signature."""

    def __init__(self, loss: nn.Module, miner: nn.Module | None = None):
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.miner is None:
            return self.loss(embeddings, labels)
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


@dataclass(frozen=True)
class Case:
    """One loss that both have.

    Attributes:
        settings: of ours.
        theirs: number of classes -> the library's.
        differs: how its definition is another, if it is: then values are not compared.
        has_views: whether the second half of a batch are other views of the images of the first.
        bytes_of_peer: rows -> what the library needs, where that is not plainly less than MOST_BYTES.
    """

    settings: LossSettings
    theirs: Callable[[int], Theirs]
    differs: str = ""
    has_views: bool = False
    bytes_of_peer: Callable[[int], int] = lambda rows: 0


def bytes_of_triplets(rows: int) -> int:
    cube = rows**3 if rows**3 < MOST_LISTED_AT_ONCE else 0
    return cube + rows * (IMAGES_PER_CLASS - 1) * (rows - IMAGES_PER_CLASS) * BYTES_OF_TRIPLET


def bytes_of_draws(rows: int) -> int:
    """[N, N] float32 for each class: each is freed, but its place is not used again."""
    return 4 * rows**2 * (rows // IMAGES_PER_CLASS)


def _degrees(radians: float) -> float:
    return float(torch.rad2deg(torch.tensor(radians, dtype=torch.float64)))


OWN_DRAWS = "both draw negatives, each its own; theirs draws positives too, where ours takes each once"
CASES: Mapping[str, Case] = {
    "triplet hard": Case(
        Triplet(name="triplet"),
        lambda classes: Theirs(losses.TripletMarginLoss(margin=0.3, reducer=MeanReducer()), miners.BatchHardMiner()),
    ),
    "triplet all": Case(
        Triplet(name="triplet", mining="all"),
        lambda classes: Theirs(losses.TripletMarginLoss(margin=0.3)),
        bytes_of_peer=bytes_of_triplets,
    ),
    "triplet semi_hard": Case(
        Triplet(name="triplet", mining="semi_hard"),
        lambda classes: Theirs(
            losses.TripletMarginLoss(margin=0.3, reducer=MeanReducer()),
            miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard"),
        ),
        differs="theirs takes every negative that is farther than the positive by less than the margin, ours the "
        "nearest that is farther, else the farthest (Schroff et al. 2015)",
        bytes_of_peer=bytes_of_triplets,
    ),
    "contrastive all": Case(
        Contrastive(name="contrastive", margin=1.0, squared=False),
        lambda classes: Theirs(losses.ContrastiveLoss(pos_margin=0, neg_margin=1.0)),
    ),
    "contrastive distance_weighted": Case(
        Contrastive(name="contrastive", margin=1.0, squared=False, mining="distance_weighted"),
        lambda classes: Theirs(
            losses.ContrastiveLoss(pos_margin=0, neg_margin=1.0), miners.DistanceWeightedMiner()
        ),
        differs=OWN_DRAWS,
        bytes_of_peer=bytes_of_draws,
    ),
    "margin distance_weighted": Case(
        Margin(name="margin"),
        lambda classes: Theirs(
            losses.MarginLoss(margin=0.2, beta=1.2, learn_beta=True, num_classes=classes),
            miners.DistanceWeightedMiner(),
        ),
        differs=OWN_DRAWS,
        bytes_of_peer=bytes_of_draws,
    ),
    "multi_similarity": Case(
        MultiSimilarity(name="multi_similarity"),
        lambda classes: Theirs(
            losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5), miners.MultiSimilarityMiner(epsilon=0.1)
        ),
    ),
    "circle": Case(
        Circle(name="circle"),
        lambda classes: Theirs(losses.CircleLoss(m=0.4, gamma=80, reducer=MeanReducer())),
    ),
    "supcon": Case(
        SupCon(name="supcon"),
        lambda classes: Theirs(losses.SupConLoss(temperature=0.1, reducer=MeanReducer())),
        has_views=True,
    ),
    "n_pairs": Case(
        NPairs(name="n_pairs", temperature=1.0),  # theirs has none
        lambda classes: Theirs(losses.NPairsLoss(distance=CosineSimilarity())),
        differs="ours makes pairs of all images of a class, theirs one of the first two: half as many here",
    ),
    "arcface": Case(
        ArcFace(name="arcface", scale=30.0),
        lambda classes: Theirs(losses.ArcFaceLoss(classes, DIMENSION, margin=_degrees(0.3), scale=30)),
    ),
    "arcface, 3 centres": Case(
        ArcFace(name="arcface", scale=30.0, centres=3),
        lambda classes: Theirs(
            losses.SubCenterArcFaceLoss(
                num_classes=classes, embedding_size=DIMENSION, margin=_degrees(0.3), scale=30, sub_centers=3
            )
        ),
    ),
    "cosface": Case(
        CosFace(name="cosface", scale=30.0),
        lambda classes: Theirs(losses.CosFaceLoss(classes, DIMENSION, margin=0.2, scale=30)),
    ),
}  # fmt: skip


def make_batch(case: Case, rows: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] and labels: cosines are some 0.7 within a class and 0.5 between, as in mid-training."""
    labels = torch.arange(rows) // IMAGES_PER_CLASS
    if case.has_views:
        labels = (torch.arange(rows // 2) // (IMAGES_PER_CLASS // 2)).repeat(2)
    generator = torch.Generator().manual_seed(0)
    common, centres, own = (
        torch.randn(count, DIMENSION, generator=generator) for count in (1, rows // IMAGES_PER_CLASS, rows)
    )
    embeddings = common + 0.63 * centres[labels] + 0.77 * own
    return embeddings.to(device, dtype).requires_grad_(), labels.to(device)


def make_losses(case: Case, classes: int, device: str) -> tuple[Ours, Theirs]:
    """Both, with the same prototypes where they have some."""
    torch.manual_seed(0)
    ours, theirs = Ours(case.settings, classes), case.theirs(classes)
    if ours.loss.trained_head is not None:
        with torch.no_grad():
            theirs.loss.get_parameter("W").copy_(ours.loss.trained_head.get_parameter("weight").T)
    return ours.to(device), theirs.to(device)


def both_ways(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; the loss."""
    embeddings.grad = None
    loss.zero_grad(set_to_none=True)
    value = loss(embeddings, labels)
    value.backward()
    return value.detach()


def works_of(case: Case, rows: int, classes: int, device: str) -> dict[str, Work]:
    embeddings, labels = make_batch(case, rows, device)
    ours, theirs = make_losses(case, classes, device)
    return {
        "ours": lambda: both_ways(ours, embeddings, labels),
        PEER: lambda: both_ways(theirs, embeddings, labels),
    }


def products(rows: int, classes: int, at_once: int, device: str) -> Work:
    """The matrix products that no softmax over all classes does without, so many classes at a time."""
    embeddings, weight = torch.randn(rows, DIMENSION, device=device), torch.randn(classes, DIMENSION, device=device)
    parts = [slice(first, first + at_once) for first in range(0, classes, at_once)]
    logits, to_weight = torch.zeros(classes, rows, device=device), torch.zeros_like(weight)

    def work() -> None:
        for part in parts:
            torch.mm(weight[part], embeddings.T, out=logits[part])
        to_embeddings = torch.zeros_like(embeddings)
        for part in parts:
            to_embeddings.addmm_(logits[part].T, weight[part])
            torch.mm(logits[part], embeddings, out=to_weight[part])

    return work


def is_drawn(case: Case) -> bool:
    """Whether ours draws at random: each device has other draws."""
    return case.settings.options.get("mining") == "distance_weighted"


def largest_of_peer(case: Case, rows: int) -> int:
    """Of batches of up to `rows`, in steps of 256, the largest that the library holds in MOST_BYTES."""
    return max(size for size in range(256, rows + 1, 256) if case.bytes_of_peer(size) <= MOST_BYTES)


def one_pass(loss: nn.Module, embeddings: Tensor, labels: Tensor, warm_up: bool) -> None:
    """What `peak_bytes` measures in a process of its own."""
    for shared in (embeddings, *loss.parameters()):
        shared.detach().sum()  # what came from the parent is mapped when it is touched
    rows = 2 * IMAGES_PER_CLASS if warm_up else len(labels)
    both_ways(loss, embeddings[:rows].clone().requires_grad_(), labels[:rows])
    if warm_up:
        loss.zero_grad(set_to_none=True)


def added_mib(case: Case, rows: int, classes: int, device: str) -> dict[str, float]:
    embeddings, labels = make_batch(case, rows, device)
    found = {}
    for name, loss in zip(("ours", PEER), make_losses(case, classes, device), strict=True):
        if device == "cpu":
            found[name] = peak_bytes(one_pass, loss, embeddings.detach(), labels) / MIB
            continue
        both_ways(loss, embeddings, labels)
        loss.zero_grad(set_to_none=True)
        embeddings.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both_ways(loss, embeddings, labels)
        found[name] = (torch.cuda.max_memory_allocated() - before) / MIB
    return found


def outcome(loss: nn.Module, case: Case, rows: int, device: str) -> list[Tensor | None]:
    """Value, gradient of the embeddings, and of prototypes, float64."""
    embeddings, labels = make_batch(case, rows, device, torch.float64)
    value = both_ways(loss.double(), embeddings, labels)
    return [value, embeddings.grad, *(prototypes.grad for prototypes in loss.parameters())]


def apart(found: list[Tensor | None], wanted: list[Tensor | None]) -> float:
    """Relative error of two outcomes, the largest."""
    pairs = [(one.cpu(), other.cpu()) for one, other in zip(found, wanted, strict=True)
             if one is not None and other is not None]  # fmt: skip
    shaped = [(one, other if one.shape == other.shape else other.T) for one, other in pairs]  # [C, D] and [D, C]
    return max(float((one - other).norm() / other.norm()) for one, other in shaped)


def note_definitions(comparison: Comparison, device: str) -> None:
    for name, case in CASES.items():
        ours, theirs = (
            outcome(loss, case, ROWS_CHECKED, device)
            for loss in make_losses(case, ROWS_CHECKED // IMAGES_PER_CLASS, device)
        )
        told = case.differs or f"value and gradients {apart(ours, theirs):.1e} apart, float64, {ROWS_CHECKED} rows"
        if device != "cpu" and not is_drawn(case):
            on_host, _ = make_losses(case, ROWS_CHECKED // IMAGES_PER_CLASS, "cpu")
            told += f"; ours {apart(ours, outcome(on_host, case, ROWS_CHECKED, 'cpu')):.1e} from ours on the host"
        comparison.notes.append(f"{name}: {told}")


def compare(comparison: Comparison, name: str, rows: int, runs: int, device: str, *, with_memory: bool) -> None:
    """A row of seconds and one of MiB."""
    case = CASES[name]
    size = largest_of_peer(case, rows)
    if size < rows:
        needed = case.bytes_of_peer(rows) / 2**30
        comparison.notes.append(f"{name}: {rows:,} rows need {needed:.0f} GiB in the library; compared at {size:,}")
    classes, key = size // IMAGES_PER_CLASS, f"{name}_{size}".replace(", ", "_").replace(" ", "_")
    values = alternate(works_of(case, size, classes, device), runs, device=device, most_seconds=60)
    give_freed_memory_back()
    comparison.rows.append(Row(f"{name}, {size:,} rows", values))
    comparison.ratio[key] = values[PEER] / values["ours"]
    if with_memory:
        memory = added_mib(case, size, classes, device)
        comparison.rows.append(Row(f"{name}, {size:,} rows", memory, unit="MiB"))
        comparison.ratio[f"memory_{key}"] = memory[PEER] / memory["ours"]


def compare_many_classes(comparison: Comparison, runs: int, device: str) -> None:
    """ArcFace with very many classes: beside theirs, and beside the matrix products alone."""
    case, rows = CASES["arcface"], 256
    part = classes_at_once(torch.device(device))
    ways = {"all classes at once": MANY_CLASSES, f"{part:,} at a time": part}
    setting, limit = fastest(
        {name: products(rows, MANY_CLASSES, at_once, device) for name, at_once in ways.items()}, device
    )
    values = alternate(works_of(case, rows, MANY_CLASSES, device) | {"products": limit}, runs, device=device)
    give_freed_memory_back()
    comparison.rows.append(Row(comparison.headline, values, {"products": setting}))
    comparison.limit = values["products"]
    comparison.ratio["arcface_products"] = values["ours"] / values["products"]
    comparison.ratio["pml_arcface"] = values[PEER] / values["ours"]
    memory = added_mib(case, rows, MANY_CLASSES, device)
    comparison.rows.append(Row(comparison.headline, memory, unit="MiB"))
    comparison.ratio["memory_pml_arcface"] = memory[PEER] / memory["ours"]


def main() -> None:
    given = arguments(__doc__)
    device = given.device
    sizes = QUICK_RUNS if given.quick else RUNS
    runs, largest = 3 if given.quick else 7, max(sizes)
    comparison = Comparison("losses", "s", f"arcface, {MANY_CLASSES:,} classes, 256 rows", runs=runs, device=device)
    note_definitions(comparison, device)
    keep_freed_memory()  # from here on: it cannot be undone
    for name in CASES:
        for rows in sizes:
            compare(comparison, name, rows, sizes[rows], device, with_memory=rows == largest or not given.quick)
    hard = next(row for row in comparison.rows if row.case == f"triplet hard, {largest:,} rows")
    listed = largest_of_peer(CASES["triplet all"], largest)
    every = next(row for row in comparison.rows if row.case == f"triplet all, {listed:,} rows")
    comparison.ratio["pml_triplet"] = (every.values[PEER] / listed) / (hard.values["ours"] / largest)
    compare_many_classes(comparison, runs, device)
    report(comparison)


if __name__ == "__main__":
    main()
