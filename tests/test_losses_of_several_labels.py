"""Losses of rows with several labels each: plain loops over sets, and two processes against one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_references import REFERENCES, LabelSet, negatives_of, positives_of
from processes import run_in_processes
from test_losses import CLASSES, DIMENSION, KINDS, ROWS, make_loss, make_rows, name_of, options_of
from torch import Tensor, nn

from stages.labels import LabelRelation
from stages.losses import Task, sup_con
from stages.losses.combined import Combined, Part
from stages.losses.figures import distance_figures
from stages.losses.loss import Loss, OneLabelOnly
from stages.losses.registry import LOSSES, build_loss

SETS: list[set[int]] = [{0}, {0, 2}, {1}, {0, 1, 2}, {2}, {3}, {1, 2}, set(), {0, 2}, {3, 1}, {1}, {0}]
TARGETS = torch.tensor([[label in one for label in range(CLASSES)] for one in SETS])
COUNTS = tuple(TARGETS.sum(dim=0).tolist())
RELATIONS = [LabelRelation("any"), LabelRelation("all"), LabelRelation("jaccard", 0.5)]
SETTINGS: list[dict[str, Any]] = [
    {"name": "bce"},
    {"name": "bce", "class_weights": "effective_number", "scale": 4.0},
    {"name": "focal", "gamma": 1.5, "alpha": 0.25, "class_weights": "effective_number"},
    {"name": "contrastive", "margin": 1.3},
    {"name": "contrastive", "margin": 1.3, "mining": "hard"},
    {"name": "contrastive", "margin": 1.5, "mining": "multi_similarity"},
    {"name": "margin", "mining": "all", "beta_weight": 0.3},
    {"name": "triplet", "mining": "hard"},
    {"name": "triplet", "mining": "all", "margin": 0.9},
    {"name": "triplet", "mining": "all", "margin": "soft"},
    {"name": "triplet", "mining": "semi_hard"},
    {"name": "triplet", "mining": "easy_positive"},
    {"name": "triplet", "mining": "multi_similarity"},
    {"name": "multi_similarity"},
    {"name": "circle", "scale": 12.0},
    {"name": "supcon"},
]
DRAWN: list[dict[str, Any]] = [{"name": "triplet", "mining": "distance_weighted"}, {"name": "margin"}]
SEVERAL = [name for name, kind in KINDS.items() if kind.several_labels]


def task_of(relation: LabelRelation) -> Task:
    return Task(DIMENSION, COUNTS, relation, ROWS)


def targets_for(settings: dict[str, Any], targets: Tensor = TARGETS) -> Tensor:
    """Of the rows: of two views of each image both have its labels."""
    return targets[: len(targets) // 2].repeat(2, 1) if settings["name"] == "supcon" else targets


def as_sets(targets: Tensor, relation: LabelRelation) -> list[Any]:
    return [LabelSet(frozenset(row.nonzero()[:, 0].tolist()), relation.kind, relation.threshold) for row in targets]


def kind_of(relation: LabelRelation) -> str:
    return relation.kind


@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_value_and_gradients_are_those_of_loops_over_sets(settings: dict[str, Any], relation: LabelRelation) -> None:
    loss_of = make_loss(settings, task_of(relation))
    rows, wanted_rows = make_rows().requires_grad_(), make_rows().requires_grad_()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in loss_of.named_parameters()}
    targets = targets_for(settings)
    loss, figures = loss_of(rows, targets, 1.0)
    loss.backward()
    reference = REFERENCES[settings["name"]]
    wanted = reference(options_of(settings), wanted_rows, as_sets(targets, relation), parameters, COUNTS)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in loss_of.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-11)
    assert all(figure.isfinite() and not figure.requires_grad for figure in figures.values())


def test_the_relations_tell_these_rows_apart() -> None:
    """Else the test above would say less than it seems to."""
    related = [relation.between(TARGETS, TARGETS).sum().item() for relation in RELATIONS]
    assert len(set(related)) == 3


@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
@pytest.mark.parametrize("settings", [*SETTINGS, *DRAWN], ids=name_of)
def test_of_one_label_each_it_is_the_loss_of_one_label(settings: dict[str, Any], relation: LabelRelation) -> None:
    labels = torch.tensor([0, 2, 0, 1, 1, 3, 2, 0, 1, -1, 0, 3])
    if settings["name"] == "supcon":
        labels = labels[: ROWS // 2].repeat(2)
    targets = torch.zeros(ROWS, CLASSES, dtype=torch.bool)
    targets[labels >= 0] = nn.functional.one_hot(labels[labels >= 0], CLASSES).bool()
    wanted, wanted_figures = make_loss(settings, Task(DIMENSION, COUNTS))(make_rows(), labels, 1.0)
    found, figures = make_loss(settings, task_of(relation))(make_rows(), targets, 1.0)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert figures.keys() == wanted_figures.keys()
    for name, figure in figures.items():
        assert figure.item() == pytest.approx(wanted_figures[name].item(), rel=1e-9), name


@pytest.mark.parametrize("settings", [*SETTINGS, *DRAWN], ids=name_of)
def test_a_batch_without_labels_or_with_all_of_them_is_no_fault(settings: dict[str, Any]) -> None:
    for targets in (torch.zeros_like(TARGETS), torch.ones_like(TARGETS)):
        loss_of = make_loss(settings, task_of(LabelRelation()))
        rows = make_rows().requires_grad_()
        loss, figures = loss_of(rows, targets, 1.0)
        loss.backward()
        assert all(one.isfinite() for one in (loss, *figures.values()))
        for one in (rows, *loss_of.parameters()):
            assert one.grad is not None
            assert one.grad.isfinite().all()


@pytest.mark.parametrize("settings", [one for one in [*SETTINGS, *DRAWN] if "memory" in options_of(one)], ids=name_of)
def test_many_rows_are_compared_in_chunks(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, wanted_rows = make_rows().requires_grad_(), make_rows().requires_grad_()
    wanted, wanted_figures = make_loss(settings, task_of(RELATIONS[2]))(wanted_rows, TARGETS, 1.0)
    wanted.backward()
    monkeypatch.setattr("stages.losses.pairwise.CHUNK_ROWS", 5)
    monkeypatch.setattr("stages.losses.figures.ROWS_AT_ONCE", 5)
    loss, figures = make_loss(settings, task_of(RELATIONS[2]))(rows, TARGETS, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-10, atol=1e-13)
    for name, figure in figures.items():
        assert figure.item() == pytest.approx(wanted_figures[name].item(), rel=1e-12)


@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
def test_a_memory_remembers_the_labels_of_each_row(relation: LabelRelation) -> None:
    settings = {"name": "contrastive", "margin": 1.2, "memory": 17, "memory_start": 0.0}
    loss_of = make_loss(settings, task_of(relation))
    generator, remembered = torch.Generator().manual_seed(4), list[tuple[Tensor, Any]]()
    for step in range(4):
        rows = torch.randn(ROWS, DIMENSION, dtype=torch.float64, generator=generator)
        sets = as_sets(TARGETS.roll(step, 0), relation)
        loss, _ = loss_of(rows, TARGETS.roll(step, 0), 1.0)
        units = [row / row.norm() for row in (*rows, *(row for row, _ in remembered))]
        labels = [*sets, *(one for _, one in remembered)]
        pulled = [(units[a] - units[p]).norm() ** 2 / 2 for a in range(ROWS) for p in positives_of(a, labels)]
        near = [1.2 - (units[a] - units[n]).norm() for a in range(ROWS) for n in negatives_of(a, labels)]
        pushed = [one**2 / 2 for one in near if one > 0]
        wanted = torch.stack(pulled).mean() + torch.stack(pushed).mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
        remembered = [*remembered, *zip(rows, sets, strict=True)][-17:]


@pytest.mark.parametrize("relation", RELATIONS, ids=kind_of)
def test_distances_of_the_figures_are_over_all_pairs(relation: LabelRelation) -> None:
    units, sets = nn.functional.normalize(make_rows(), dim=1), as_sets(TARGETS, relation)
    figures = distance_figures(make_rows(), TARGETS, relation)
    for name, others in (("positive_distance", positives_of), ("negative_distance", negatives_of)):
        squares = [(units[a] - units[b]).square().sum() for a in range(ROWS) for b in others(a, sets)]
        assert figures[name].item() == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_logistic_losses_begin_with_the_share_of_images_that_have_a_label(name: str) -> None:
    loss_of = build_loss(name, options_of({"name": name}), Task(DIMENSION, (40, 30, 20, 9), LabelRelation(), 49))
    assert loss_of.trained_head is not None
    probabilities = loss_of.trained_head(torch.zeros(1, DIMENSION)).sigmoid()[0]
    torch.testing.assert_close(probabilities, torch.tensor([0.8, 0.6, 0.4, 0.18]))


def test_right_is_a_row_whose_best_class_is_one_of_its_own() -> None:
    loss_of = make_loss({"name": "bce"}, task_of(LabelRelation()))
    assert loss_of.trained_head is not None
    _, figures = loss_of(make_rows(), TARGETS, 1.0)
    best = loss_of.trained_head(make_rows()).argmax(dim=1).tolist()
    right = [best[row] in one for row, one in enumerate(SETS) if one]
    assert figures["accuracy"].item() == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("name", list(LOSSES))
def test_what_learns_from_one_label_refuses_several(name: str) -> None:
    loss_of: Loss = make_loss({"name": name}, task_of(LabelRelation()))
    assert loss_of.takes_several_labels == (name in SEVERAL)
    if name not in SEVERAL:
        with pytest.raises(OneLabelOnly, match=r"learns from one label a sample, int64 \[N\], not from several"):
            loss_of(make_rows(), TARGETS, 1.0)
        both = Combined([Part("bce", make_loss({"name": "bce"}), 1.0, True), Part(name, loss_of, 1.0, False)], None)
        with pytest.raises(OneLabelOnly):
            both(make_rows(), TARGETS, 1.0)


def test_each_loss_of_several_labels_is_held_against_its_formula() -> None:
    assert {one["name"] for one in SETTINGS} == set(SEVERAL)


def test_labels_of_another_shape_are_refused() -> None:
    views = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"labels are \[N\] or \[N, classes\], not \[4, 2\]"):
        sup_con(views, views, torch.ones(4, 2, dtype=torch.bool), 0.5)


# Several processes

IN_PROCESSES = [
    *SETTINGS,
    *DRAWN,
    *({"name": name, "memory": 20, "memory_start": 0.0} for name in ("contrastive", "margin", "triplet", "circle")),
]


def step(
    rows: Tensor, targets: Tensor, settings: dict[str, Any], wrap: Callable[[nn.Module], nn.Module]
) -> dict[str, Tensor]:
    """Loss, figures and gradients, by the parameters of an encoder and of the loss."""
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Linear(DIMENSION, 8), nn.ReLU(), nn.Linear(8, DIMENSION)).double()
    loss_of = make_loss(settings, task_of(LabelRelation("jaccard", 0.5)))
    if any(True for _ in loss_of.buffers()):  # a batch before this one: to be remembered, or to draw others
        loss_of(-rows, targets, 1.0)
    embed, measure = wrap(encoder), wrap(loss_of) if list(loss_of.parameters()) else loss_of
    loss, figures = measure(embed(rows), targets, 1.0)
    loss.backward()
    parameters = [*encoder.named_parameters(), *loss_of.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return {**gradients, "loss": loss.detach(), **{f"figure {k}": v for k, v in figures.items()}}


def share_of_rank(settings: dict[str, Any], mine: slice) -> tuple[Tensor, Tensor]:
    """Consecutive images; of two views of each both."""
    rows, targets = make_rows(), targets_for(settings)
    if settings["name"] != "supcon":
        return rows[mine], targets[mine]
    mine = slice(mine.start // 2, mine.stop // 2)
    return torch.cat([half[mine] for half in rows.chunk(2)]), targets[mine].repeat(2, 1)


def step_of_rank(rank: int) -> dict[str, Tensor]:
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {}
    for number, settings in enumerate(IN_PROCESSES):
        result = step(*share_of_rank(settings, mine), settings, nn.parallel.DistributedDataParallel)
        found |= {f"{number} {name}": value for name, value in result.items()}
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_in_processes(step_of_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.xdist_group("losses-of-several-labels")
@pytest.mark.parametrize("number", range(len(IN_PROCESSES)), ids=lambda number: name_of(IN_PROCESSES[number]))
def test_two_processes_equal_one(of_ranks: list[dict[str, Tensor]], number: int) -> None:
    settings = IN_PROCESSES[number]
    wanted = step(make_rows(), targets_for(settings), settings, lambda module: module)
    first, second = of_ranks
    assert {name for name in first if name.startswith(f"{number} ")} == {f"{number} {name}" for name in wanted}
    for name, value in wanted.items():
        for found in (first, second):
            assert (found[f"{number} {name}"] - value).norm() <= 1e-10 * max(1.0, value.norm().item()), name
        assert torch.equal(first[f"{number} {name}"], second[f"{number} {name}"]), name
