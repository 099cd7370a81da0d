"""What a batch is compared with: negatives drawn evenly over distances, and batches before."""

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from loss_references import REFERENCES
from test_losses import KINDS, LABELS, ROWS, TASK, make_loss, make_rows, options_of
from torch import Tensor, nn

from stages.losses import Task
from stages.losses.memory import CrossBatchMemory
from stages.losses.mining import Draws, mine_pairs, mine_triplets
from stages.losses.pairwise import Pairs, block_of

# Drawing by distance


def on_sphere(rows: int, dimension: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, dimension, dtype=torch.float64, generator=generator), dim=1)


def as_pairs(rows: Tensor, labels: Tensor) -> Pairs:
    return Pairs(rows, rows, labels, labels, torch.arange(len(rows)))


def make_draws(dimension: int, seed: int = 0) -> Draws:
    torch.manual_seed(seed)
    return Draws(dimension)


def chances(anchor: int, rows: Tensor, labels: Tensor) -> dict[int, float]:
    """Wu et al. 2017, equation 3: q(d) ~ d^(n-2) (1 - d^2 / 4)^((n-3)/2), and a negative is drawn by 1 / q(d);
    distances below 0.5 count as 0.5, and those of 1.4 and more are not drawn unless all are."""
    n = rows.shape[1]
    distances = {
        other: (rows[anchor] - rows[other]).norm().item()
        for other in range(len(rows))
        if labels[other] != labels[anchor]
    }
    near = {other: d for other, d in distances.items() if d < 1.4} or distances
    weights = {}
    for other, d in near.items():
        d = max(0.5, d)
        weights[other] = 1 / (d ** (n - 2) * (1 - d**2 / 4) ** ((n - 3) / 2))
    return {other: weight / sum(weights.values()) for other, weight in weights.items()}


def scene(kind: str, dimension: int) -> tuple[Tensor, Tensor]:
    """Twelve anchors' surroundings: of all distances, all near, or all opposite."""
    rows, labels = on_sphere(24, dimension), torch.arange(24) % 4
    if kind == "near":  # many below 0.5
        rows = nn.functional.normalize(rows + 5 * on_sphere(1, dimension, 9), dim=1)
    if kind == "opposite":
        poles = torch.where(labels[:, None] == 0, 1.0, -1.0) * on_sphere(1, dimension, 9)
        rows = nn.functional.normalize(poles + 0.3 * rows, dim=1)
    return rows, labels


@pytest.mark.parametrize("kind", ["apart", "near", "opposite"])
@pytest.mark.parametrize("dimension", [2, 3, 8, 64])
def test_negatives_are_drawn_evenly_over_distances(kind: str, dimension: int) -> None:
    rows, labels = scene(kind, dimension)
    draws, steps = make_draws(dimension), 400
    counts = np.zeros((24, 24))
    for _ in range(steps):
        draws.advance()
        mined = mine_triplets("distance_weighted", as_pairs(rows, labels), draws)
        assert mined.weight.eq(1).all()
        np.add.at(counts, (mined.anchor.numpy(), mined.negative.numpy()), 1)
    statistic, freedom = 0.0, 0
    for anchor in range(24):
        wanted = chances(anchor, rows, labels)
        total = steps * 5  # of each of five positives one
        assert counts[anchor].sum() == total
        assert set(np.flatnonzero(counts[anchor]).tolist()) <= wanted.keys(), "only what may be drawn"
        rare = 0.0, 0.0
        for other, chance in wanted.items():
            found, expected = counts[anchor, other], total * chance
            if expected < 5:
                rare = rare[0] + found, rare[1] + expected
                continue
            statistic, freedom = statistic + (found - expected) ** 2 / expected, freedom + 1
        if rare[1] >= 5:
            statistic, freedom = statistic + (rare[0] - rare[1]) ** 2 / rare[1], freedom + 1
        freedom -= 1
    # Chi-squared has mean k and variance 2 k for k degrees of freedom; four standard deviations either way.
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_for_each_positive_there_is_one_negative() -> None:
    rows = on_sphere(14, 6)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, -1, -1, 1, 0])
    draws = make_draws(6)
    draws.advance()
    mined = mine_triplets("distance_weighted", as_pairs(rows, labels), draws)
    listed = [*zip(mined.anchor.tolist(), mined.positive.tolist(), strict=True)]
    wanted = [(a, p) for a in range(14) for p in range(14) if a != p and labels[a] == labels[p] >= 0]
    assert sorted(listed) == wanted
    assert all(labels[n] != labels[a] for a, n in zip(mined.anchor, mined.negative, strict=True))
    positive, negative = mine_pairs("distance_weighted", block_of(as_pairs(rows, labels)), torch.arange(14), draws)
    for a in range(14):
        of_triplets = mined.negative[mined.anchor == a]
        assert torch.equal(negative[a], torch.bincount(of_triplets, minlength=14).double()), "the same are drawn"
        assert positive[a].sum() == len(of_triplets)


def test_an_anchor_without_negatives_draws_none() -> None:
    rows, labels = on_sphere(5, 6), torch.zeros(5, dtype=torch.int64)
    mined = mine_triplets("distance_weighted", as_pairs(rows, labels), make_draws(6))
    assert len(mined.anchor) == 20
    assert not mined.weight.any()
    _, negative = mine_pairs("distance_weighted", block_of(as_pairs(rows, labels)), torch.arange(5), make_draws(6))
    assert not negative.any()


def draw(rows: Tensor, labels: Tensor, mine: slice, seed: int = 0, steps: int = 1) -> list[tuple[int, int, int]]:
    """Of a process that has some of the rows: (row of the global batch, positive, negative)."""
    draws = make_draws(rows.shape[1], seed)
    for _ in range(steps):
        draws.advance()
    own = torch.arange(len(rows))[mine]
    mined = mine_triplets("distance_weighted", Pairs(rows[mine], rows, labels[mine], labels, own), draws)
    return [*zip(own[mined.anchor].tolist(), mined.positive.tolist(), mined.negative.tolist(), strict=True)]


def test_draws_do_not_depend_on_processes_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = on_sphere(30, 5), torch.arange(30) % 6
    whole = draw(rows, labels, slice(0, 30))
    for parts in (2, 3, 5):
        shares = [draw(rows, labels, slice(rank * 30 // parts, (rank + 1) * 30 // parts)) for rank in range(parts)]
        assert [*chain.from_iterable(shares)] == whole
    monkeypatch.setattr("stages.losses.pairwise.CHUNK_ROWS", 7)
    assert draw(rows, labels, slice(0, 30)) == whole
    assert [*draw(rows, labels, slice(0, 15)), *draw(rows, labels, slice(15, 30))] == whole
    monkeypatch.undo()
    assert draw(rows, labels, slice(0, 30), steps=2) != whole, "another step"
    assert draw(rows, labels, slice(0, 30), seed=1) != whole, "another seed"


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    draws = make_draws(4)
    found = []
    for _ in range(50):
        draws.advance()
        found.append(draws.uniforms(torch.arange(100), 8))
    numbers = torch.stack(found)  # [steps, rows, turns]
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(numbers.unique()) > 0.9999 * numbers.numel()
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 19 + 5 * math.sqrt(2 * 19)
    for dim in range(3):  # of one step and the next, of one row and the next, of one turn and the next
        size = numbers.shape[dim] - 1
        one, other = numbers.narrow(dim, 0, size).flatten(), numbers.narrow(dim, 1, size).flatten()
        correlation = np.corrcoef(one, other)[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(one.numel())


# Memory


def batches_of(sizes: list[int], dimension: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, dimension, generator=generator), torch.randint(-1, 4, (size,), generator=generator))
        for size in sizes
    ]


def as_list(memory: CrossBatchMemory) -> list[tuple[Any, ...]]:
    rows, labels = memory.rows()
    return sorted((*row, label) for row, label in zip(rows.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("sizes", [[4] * 7, [10], [25], [3, 25, 1, 9, 10, 11, 2], [1] * 30, [20, 20, 20]])
def test_memory_holds_the_last_rows(sizes: list[int]) -> None:
    memory, listed = CrossBatchMemory(10, 3), []
    assert memory.rows()[0].shape == (0, 3)
    for rows, labels in batches_of(sizes):
        memory.add(rows, labels)
        listed += [(*row, label) for row, label in zip(rows.tolist(), labels.tolist(), strict=True)]
        assert as_list(memory) == sorted(listed[-10:])


def test_what_memory_gives_does_not_change_later() -> None:
    memory = CrossBatchMemory(4, 3)
    (first, labels), (second, others) = batches_of([4, 4])
    memory.add(first, labels)
    rows, known = memory.rows()
    memory.add(second, others)
    assert torch.equal(rows, first)
    assert torch.equal(known, labels)


def test_memory_is_part_of_the_state() -> None:
    batches = batches_of([4, 4, 3, 7, 2])
    whole, before, after = (CrossBatchMemory(9, 3) for _ in range(3))
    for number, (rows, labels) in enumerate(batches):
        whole.add(rows, labels)
        if number == 2:
            after.load_state_dict(before.state_dict() | whole.state_dict())
        elif number > 2:
            after.add(rows, labels)
    assert all(torch.equal(after.state_dict()[name], value) for name, value in whole.state_dict().items())
    assert set(whole.state_dict()) == {"embeddings", "labels", "added"}


# Losses with a memory: their partners are the batch and what is remembered


def reference_with_memory(
    settings: dict[str, Any], rows: Tensor, labels: Tensor, remembered: list[tuple[Tensor, int]]
) -> Tensor:
    """The loss of anchors among the batch, whose partners are all rows; plain loops."""
    options = options_of(settings)
    units = [row / row.norm() for row in rows] + [row / row.norm() for row, _ in remembered]
    known = labels.tolist() + [label for _, label in remembered]
    d = [[(units[a] - units[b]).norm() for b in range(len(units))] for a in range(len(rows))]
    found: list[Tensor] = []
    pulled: list[Tensor] = []
    pushed: list[Tensor] = []
    for a in range(len(rows)):
        if known[a] < 0:
            continue
        positives = [b for b in range(len(units)) if b != a and known[b] == known[a]]
        negatives = [b for b in range(len(units)) if known[b] != known[a]]
        if settings["name"] == "contrastive":
            pulled += [d[a][p] ** 2 / 2 for p in positives]
            pushed += [(options["margin"] - d[a][n]) ** 2 / 2 for n in negatives if d[a][n] < options["margin"]]
        elif positives and negatives and options["mining"] == "hard":
            hardest = max(d[a][p] for p in positives), min(d[a][n] for n in negatives)
            found.append((options["margin"] + hardest[0] - hardest[1]).clamp(min=0))
        else:
            violations = [options["margin"] + d[a][p] - d[a][n] for p in positives for n in negatives]
            found += [one for one in violations if one > 0]
    if settings["name"] == "contrastive":
        return torch.stack(pulled).mean() + torch.stack(pushed).mean()
    return torch.stack(found).mean()


WITH_MEMORY: list[dict[str, Any]] = [
    {"name": "contrastive", "margin": 1.2},
    {"name": "triplet", "mining": "hard"},
    {"name": "triplet", "mining": "all", "margin": 0.5},
]


@pytest.mark.parametrize("settings", WITH_MEMORY, ids=lambda one: "-".join(map(str, one.values())))
def test_partners_are_the_batch_and_what_is_remembered(settings: dict[str, Any]) -> None:
    size = 17
    loss_of = make_loss(settings | {"memory": size, "memory_start": 0.5})
    remembered: list[tuple[Tensor, int]] = []
    generator = torch.Generator().manual_seed(4)
    for step, progress in enumerate((0.0, 0.4, 0.5, 0.7, 1.0)):
        start = torch.randn(ROWS, TASK.embedding_size, dtype=torch.float64, generator=generator)
        labels = LABELS.roll(step)
        labels[step] = -1
        rows, wanted_rows = start.clone().requires_grad_(), start.clone().requires_grad_()
        loss, _ = loss_of(rows, labels, progress)
        wanted = reference_with_memory(settings, wanted_rows, labels, remembered if progress >= 0.5 else [])
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
        loss.backward()
        wanted.backward()
        torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-8, atol=1e-11)
        remembered = [*remembered, *zip(start, labels.tolist(), strict=True)][-size:]


@pytest.mark.parametrize("settings", WITH_MEMORY, ids=lambda one: "-".join(map(str, one.values())))
def test_before_the_memory_counts_it_is_the_loss_of_the_batch(settings: dict[str, Any]) -> None:
    loss_of = make_loss(settings | {"memory": 40, "memory_start": 0.5})
    for _ in range(3):
        loss, _ = loss_of(make_rows(), LABELS, 0.49)
        wanted = REFERENCES[settings["name"]](options_of(settings), make_rows(), LABELS.tolist(), {}, TASK.class_counts)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if "memory" in kind.model_fields])
def test_a_loss_that_goes_on_from_its_state_is_that_of_an_uninterrupted_one(name: str) -> None:
    settings = {"name": name, "memory": 20, "memory_start": 0.0}
    if name in ("triplet", "contrastive"):
        settings["mining"] = "distance_weighted"
    whole, other = make_loss(settings), make_loss(settings)
    torch.manual_seed(99)  # what the other draws by itself is not what the state says
    for key, buffer in other.named_buffers():
        if key.endswith("key"):
            buffer.fill_(7)
    batches = [make_rows() * torch.linspace(-1, 2, TASK.embedding_size) + step for step in range(5)]
    for rows in batches[:3]:
        whole(rows, LABELS, 1.0)
    other.load_state_dict(whole.state_dict())
    for rows in batches[3:]:
        losses = [loss_of(rows, LABELS, 1.0)[0] for loss_of in (whole, other)]
        assert torch.equal(*losses)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in whole.state_dict().items())


def test_a_memory_costs_no_gradient() -> None:
    loss_of = make_loss({"name": "contrastive", "memory": 30, "memory_start": 0.0}, Task(5, (4, 3, 3, 2)))
    first, second = make_rows().requires_grad_(), (make_rows() + 1).requires_grad_()
    loss_of(first, LABELS, 1.0)
    loss_of(second, LABELS, 1.0)[0].backward()
    assert first.grad is None
    assert second.grad is not None
