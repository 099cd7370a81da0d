"""Supervised losses against the papers' formulas as plain loops, and two processes against one."""

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from loss_references import REFERENCES, pair_scores
from processes import run_in_processes
from torch import Tensor, nn

from pipeline.settings import kinds_of
from stages.losses import Loss, Task
from stages.losses.margin_softmax import ArcFace, add_angle, multiply_angle
from stages.losses.mining import mine_triplets
from stages.losses.pairwise import Pairs
from stages.losses.registry import LOSSES, build_loss
from stages.losses.siamese import pair_targets
from stages.losses.triplet import Triplet
from stages.settings.finetune import Finetune
from stages.settings.losses import LOSSES as CHOICES

ROWS, DIMENSION, CLASSES = 12, 5, 4
LABELS = torch.tensor([0, 2, 0, 1, 1, 3, 2, 0, 1, 2, 0, 3])
TASK = Task(DIMENSION, (4, 3, 3, 2))
KINDS = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in CHOICES}
SETTINGS: list[dict[str, Any]] = [
    {"name": "cross_entropy", "label_smoothing": 0.0},
    {"name": "cross_entropy", "label_smoothing": 0.1},
    {"name": "triplet", "margin": 0.3},
    {"name": "triplet", "margin": "soft"},
    {"name": "arcface", "scale": None, "margin": 0.3, "margin_ramp": 0.5},
    {"name": "arcface", "scale": 5.0, "margin": 1.2, "margin_ramp": 0.0},
    {"name": "cross_entropy", "class_weights": "effective_number"},
    {"name": "bce"},
    {"name": "bce", "class_weights": "effective_number"},
    {"name": "bce", "scale": 4.0},
    {"name": "focal"},
    {"name": "focal", "gamma": 1.5, "alpha": 0.25},
    {"name": "pairs_concatenated"},
    {"name": "pairs_difference"},
    {"name": "pairs_cosine"},
    {"name": "contrastive"},
    {"name": "contrastive", "margin": 1.3, "squared": False, "mining": "hard"},
    {"name": "contrastive", "margin": 1.3, "mining": "easy_positive"},
    {"name": "contrastive", "margin": 1.5, "mining": "multi_similarity"},
    {"name": "margin", "mining": "all"},
    {"name": "margin", "mining": "hard", "beta_weight": 0.3},
    {"name": "triplet", "mining": "all"},
    {"name": "triplet", "mining": "all", "margin": 1.1},
    {"name": "triplet", "mining": "all", "margin": "soft"},
    {"name": "triplet", "mining": "semi_hard"},
    {"name": "triplet", "mining": "easy_positive", "margin": "soft"},
    {"name": "triplet", "mining": "multi_similarity"},
    {"name": "arcface", "centres": 3},
    {"name": "cosface"},
    {"name": "cosface", "scale": 64.0, "margin": 0.35},
    {"name": "sphereface"},
    {"name": "sphereface", "margin": 3.7},
    {"name": "sphereface_original"},
    {"name": "n_pairs"},
    {"name": "supcon"},
    {"name": "multi_similarity"},
    {"name": "multi_similarity", "mining": "all"},
    {"name": "circle", "scale": 12.0},
    {"name": "proxy_anchor"},
    {"name": "soft_triple"},
    {"name": "lifted_structure"},
]
DRAWN: list[dict[str, Any]] = [
    {"name": "triplet", "mining": "distance_weighted"},
    {"name": "contrastive", "mining": "distance_weighted", "margin": 1.2},
    {"name": "margin"},
]
"""Whose negatives are drawn: held against their definition further down."""
FINITE = [one for one in SETTINGS if one["name"] != "lifted_structure"]
"""The library's lifted structure loss takes a root at 0, where embeddings are zeros."""


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(map(str, settings.values()))


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    return KINDS[settings["name"]](**settings).options


def make_rows(rows: int = ROWS, dimension: int = DIMENSION) -> Tensor:
    return torch.randn(rows, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def make_loss(settings: dict[str, Any], task: Task = TASK) -> Loss:
    torch.manual_seed(7)
    loss = build_loss(settings["name"], options_of(settings), task).double()
    for parameter in loss.parameters():  # biases off their zeros, weights of a size that matters
        nn.init.normal_(parameter)
    return loss


def labels_for(settings: dict[str, Any], labels: Tensor = LABELS) -> Tensor:
    """Of the rows: of two views of each image both have its label."""
    return labels[: len(labels) // 2].repeat(2) if settings["name"] == "supcon" else labels


def reference(settings: dict[str, Any], rows: Tensor, labels: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return REFERENCES[settings["name"]](options_of(settings), rows, labels.tolist(), parameters, TASK.class_counts)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_value_and_gradients_are_those_of_the_paper(settings: dict[str, Any]) -> None:
    loss_of = make_loss(settings)
    rows, wanted_rows = make_rows().requires_grad_(), make_rows().requires_grad_()
    parameters = {name: value.detach().clone().requires_grad_() for name, value in loss_of.named_parameters()}
    labels = labels_for(settings)
    loss, figures = loss_of(rows, labels, 1.0)
    loss.backward()
    wanted = reference(settings, wanted_rows, labels, parameters)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-9, atol=1e-11)
    for name, parameter in loss_of.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-9, atol=1e-11)
    assert not any(figure.requires_grad for figure in figures.values())


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_under_autocast_it_is_computed_in_single_precision(settings: dict[str, Any]) -> None:
    loss_of = make_loss(settings).float()
    halves = make_rows().bfloat16()
    labels = labels_for(settings)
    wanted, _ = loss_of(halves.float(), labels, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = loss_of(halves, labels, 1.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted)


@pytest.mark.parametrize("settings", FINITE, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_where_embeddings_meet(settings: dict[str, Any], dtype: torch.dtype) -> None:
    loss_of = make_loss(settings).to(dtype)
    for start in (make_rows()[:1].repeat(ROWS, 1), torch.zeros(ROWS, DIMENSION), -make_rows()[:1].repeat(ROWS, 1)):
        rows = start.to(dtype).requires_grad_()
        head = loss_of.trained_head
        if head is not None:  # on a prototype, and opposite to another
            with torch.no_grad():
                for weight in head.parameters():
                    if weight.shape == (CLASSES * head.centres, DIMENSION):
                        weight[0], weight[1] = start[0], -start[0]
        loss, _ = loss_of(rows, labels_for(settings), 1.0)
        loss.backward()
        assert loss.isfinite()
        assert rows.grad is not None
        assert rows.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss_of.parameters())


@pytest.mark.parametrize("settings", [*SETTINGS, *DRAWN], ids=name_of)
def test_a_batch_without_a_label_or_with_a_single_one_is_no_fault(settings: dict[str, Any]) -> None:
    """Of negative-only images, or all of one class: what is trained has a gradient, as several processes need it."""
    for labels in (
        torch.full((ROWS,), -1),
        torch.tensor([2, *[-1] * (ROWS - 1)]),
        torch.zeros(ROWS, dtype=torch.int64),
    ):
        loss_of = make_loss(settings)
        rows = make_rows().requires_grad_()
        loss, figures = loss_of(rows, labels_for(settings, labels), 1.0)
        loss.backward()
        assert loss.isfinite()
        assert all(figure.isfinite() for figure in figures.values())
        for one in (rows, *loss_of.parameters()):
            assert one.grad is not None
            assert one.grad.isfinite().all()


def test_the_registry_and_the_settings_have_the_same_losses_and_options() -> None:
    kinds = kinds_of(Finetune.model_fields["loss"])
    assert list(kinds) == list(LOSSES) == list(REFERENCES)
    assert {one["name"] for one in SETTINGS} == set(LOSSES), "each is held against its formula"
    for name, kind in kinds.items():
        options = list(inspect.signature(LOSSES[name]).parameters)
        assert options == ["task", *(field for field in kind.model_fields if field not in ("name", "weight"))], name
        assert get_args(kind.model_fields["name"].annotation) == (name,)
        assert kind.__doc__


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_logistic_losses_begin_with_the_frequencies_of_the_classes(name: str) -> None:
    loss_of = build_loss(name, options_of({"name": name}), Task(DIMENSION, (40, 30, 20, 9)))
    assert loss_of.trained_head is not None
    probabilities = loss_of.trained_head(torch.zeros(1, DIMENSION)).sigmoid()[0]
    torch.testing.assert_close(probabilities, torch.tensor([0.4, 0.3, 0.2, 0.09]))


# Pairs


@pytest.mark.parametrize("name", ["pairs_concatenated", "pairs_difference", "pairs_cosine"])
def test_graded_targets_of_pairs_are_those_of_the_formula(name: str) -> None:
    loss_of = make_loss({"name": name})
    rows, wanted_rows = make_rows().requires_grad_(), make_rows().requires_grad_()
    parameters = {key: value.detach().clone().requires_grad_() for key, value in loss_of.named_parameters()}
    targets = torch.rand(ROWS // 2, generator=torch.Generator().manual_seed(5))  # float32, as a plan gives them
    targets[0], targets[1] = 0, 1
    loss, figures = loss_of(rows, targets, 1.0)
    loss.backward()
    losses, right = [], 0
    if name == "pairs_cosine":
        for left, other, target in zip(wanted_rows[0::2], wanted_rows[1::2], targets.tolist(), strict=True):
            cosine = left @ other / (left.norm() * other.norm())
            losses.append((cosine - target) ** 2)
            right += (cosine.item() > 0.5) == (target > 0.5)
    else:
        for score, target in zip(pair_scores(name, wanted_rows, parameters), targets.tolist(), strict=True):
            probability = 1 / (1 + (-score).exp())
            losses.append(-target * probability.log() - (1 - target) * (1 - probability).log())
            right += (probability.item() > 0.5) == (target > 0.5)
    torch.stack(losses).mean().backward()
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-9, atol=1e-11)
    for key, parameter in loss_of.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-9, atol=1e-11)
    assert figures["pair_accuracy"].item() == pytest.approx(right / len(targets))
    assert {*figures} == {"pair_accuracy"} | ({"asymmetry"} if name != "pairs_cosine" else set())


@pytest.mark.parametrize("name", ["pairs_concatenated", "pairs_difference", "pairs_cosine"])
def test_targets_of_0_and_1_are_labels_said_otherwise(name: str) -> None:
    loss_of = make_loss({"name": name})
    by_labels, _ = loss_of(make_rows(), LABELS, 1.0)
    by_targets, _ = loss_of(make_rows(), pair_targets(LABELS).float(), 1.0)
    assert torch.equal(by_labels, by_targets)


# Triplet


def as_pairs(rows: Tensor, labels: Tensor) -> Pairs:
    return Pairs(rows, rows, labels, labels, torch.arange(len(rows)))


def test_the_hardest_of_each_kind_is_found() -> None:
    rows = nn.functional.normalize(make_rows(40, 3), dim=1)
    labels = torch.arange(40) % 5
    labels[7] = 9  # alone in its class
    mined = mine_triplets("hard", as_pairs(rows, labels), None)
    assert mined.anchor.tolist() == [*range(40)]
    for a in range(40):
        distances = (rows - rows[a]).norm(dim=1)
        same = (labels == labels[a]).nonzero().flatten().tolist()
        others = [n for n in range(40) if labels[n] != labels[a]]
        assert mined.negative[a] == min(others, key=lambda n: distances[n].item())
        assert mined.weight[a] == (len(same) > 1)
        if len(same) > 1:
            assert mined.positive[a] == max((p for p in same if p != a), key=lambda p: distances[p].item())


def test_rows_without_a_partner_do_not_count() -> None:
    loss_of = make_loss(SETTINGS[2])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    rows = make_rows(6)
    unit = nn.functional.normalize(rows, dim=1)
    losses = []
    for a in range(5):
        positive = max((unit[a] - unit[p]).norm() for p in range(6) if p != a and labels[p] == labels[a])
        negative = min((unit[a] - unit[n]).norm() for n in range(6) if labels[n] != labels[a])
        losses.append((0.3 + positive - negative).clamp(min=0))
    assert loss_of(rows, labels, 1.0)[0].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    for none in (torch.zeros(6, dtype=torch.int64), torch.arange(6)):
        alone = make_rows(6).requires_grad_()
        loss, figures = loss_of(alone, none, 1.0)
        loss.backward()
        assert loss.item() == 0
        assert alone.grad is not None
        assert not alone.grad.any()
        assert all(figure.isfinite() for figure in figures.values())


def test_figures_of_triplets_tell_order_from_collapse() -> None:
    loss_of = make_loss(SETTINGS[2])
    corners = torch.eye(CLASSES, DIMENSION, dtype=torch.float64)[LABELS]
    loss, figures = loss_of(corners, LABELS, 1.0)
    assert loss.item() == 0
    assert {name: value.item() for name, value in figures.items()} == {
        "active_triplets": 0.0,
        "idle": 1.0,
        "positive_distance": 0.0,
        "negative_distance": pytest.approx(math.sqrt(2)),
    }
    loss, figures = loss_of(torch.ones(ROWS, DIMENSION, dtype=torch.float64), LABELS, 1.0)
    assert loss.item() == pytest.approx(0.3)
    assert figures["active_triplets"].item() == 1.0
    assert figures["negative_distance"].item() < 1e-6
    soft, _ = make_loss(SETTINGS[3])(torch.ones(ROWS, DIMENSION, dtype=torch.float64), LABELS, 1.0)
    assert soft.item() == pytest.approx(math.log(2))


def test_distances_of_the_figures_are_root_mean_squares_over_all_pairs() -> None:
    rows = nn.functional.normalize(make_rows(), dim=1)
    pairs = [(i, j) for i in range(ROWS) for j in range(ROWS) if i != j]
    _, figures = make_loss(SETTINGS[2])(make_rows(), LABELS, 1.0)
    for name, is_same in (("positive_distance", True), ("negative_distance", False)):
        distances = [(rows[i] - rows[j]).norm() for i, j in pairs if (LABELS[i] == LABELS[j]) == is_same]
        squares = torch.stack(distances).square()
        assert figures[name].item() == pytest.approx(squares.mean().sqrt().item(), rel=1e-9)


def test_length_of_the_embeddings_does_not_matter() -> None:
    for settings in (SETTINGS[2], SETTINGS[4]):
        loss_of = make_loss(settings)
        assert loss_of(make_rows() * 1e3, LABELS, 1.0)[0].item() == pytest.approx(
            loss_of(make_rows(), LABELS, 1.0)[0].item(), rel=1e-10
        )


BY_CHUNKS = [one for one in [*SETTINGS, *DRAWN] if "memory" in options_of(one)]


@pytest.mark.parametrize("settings", BY_CHUNKS, ids=name_of)
def test_many_rows_are_compared_in_chunks(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, wanted_rows = make_rows().requires_grad_(), make_rows().requires_grad_()
    wanted, wanted_figures = make_loss(settings)(wanted_rows, LABELS, 1.0)
    wanted.backward()
    monkeypatch.setattr("stages.losses.pairwise.CHUNK_ROWS", 5)
    loss, figures = make_loss(settings)(rows, LABELS, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close(rows.grad, wanted_rows.grad, rtol=1e-10, atol=1e-13)
    for name, figure in figures.items():
        assert figure.item() == pytest.approx(wanted_figures[name].item(), rel=1e-12)


# ArcFace


def test_without_a_margin_arcface_is_the_softmax_of_scaled_cosines() -> None:
    loss_of = make_loss({"name": "arcface", "scale": 9.0, "margin": 0.0, "margin_ramp": 0.5})
    assert loss_of.trained_head is not None
    cosines = nn.functional.cosine_similarity(
        make_rows()[:, None], loss_of.trained_head.get_parameter("weight")[None], dim=2
    )
    wanted = nn.functional.cross_entropy(9.0 * cosines, LABELS)
    loss, figures = loss_of(make_rows(), LABELS, 1.0)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert figures["accuracy"].item() == pytest.approx((cosines.argmax(1) == LABELS).double().mean().item())


def test_the_margin_grows_from_nought_and_stays() -> None:
    rows = make_rows()
    whole = make_loss({"name": "arcface", "scale": None, "margin": 0.3, "margin_ramp": 0.0})(rows, LABELS, 0.0)[0]
    none = make_loss({"name": "arcface", "scale": None, "margin": 0.0, "margin_ramp": 0.0})(rows, LABELS, 0.0)[0]
    half = make_loss({"name": "arcface", "scale": None, "margin": 0.15, "margin_ramp": 0.0})(rows, LABELS, 0.0)[0]
    ramped = make_loss({"name": "arcface", "scale": None, "margin": 0.3, "margin_ramp": 0.4})
    values = [ramped(rows, LABELS, progress)[0].item() for progress in (0.0, 0.2, 0.4, 1.0)]
    assert values == pytest.approx([none.item(), half.item(), whole.item(), whole.item()], rel=1e-12)


def test_the_scale_follows_the_number_of_classes() -> None:
    assert ArcFace(Task(4, (1,) * 1000), None, 0.3, 0.5, 1).scale == 16
    assert ArcFace(Task(4, (1,) * 1001), None, 0.3, 0.5, 1).scale == 30
    assert ArcFace(Task(4, (1,) * 1001), 20.0, 0.3, 0.5, 1).scale == 20


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0, 1.5])
def test_the_angle_is_added_and_the_result_falls_with_it_up_to_pi(margin: float) -> None:
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    shifted = add_angle(angles.cos(), margin)
    inside = angles + margin <= math.pi
    torch.testing.assert_close(shifted[inside], (angles + margin).cos()[inside], rtol=0, atol=1e-7)
    assert (shifted.diff() < 0).all(), "monotone, without a jump upwards"
    assert shifted.diff().abs().max() < 2 * math.pi / 2000, "and without one downwards"
    cosines = torch.tensor([-1.0, -math.cos(margin), 0.0, 1.0]).requires_grad_()
    add_angle(cosines, margin).sum().backward()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()
    assert (cosines.grad > 0).all()


@pytest.mark.parametrize("margin", [1.0, 1.35, 2.0, 3.7, 4.0])
def test_the_angle_is_multiplied_and_the_result_falls_with_it(margin: float) -> None:
    angles = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    found = multiply_angle(angles.cos(), margin)
    first = margin * angles <= math.pi
    torch.testing.assert_close(found[first], (margin * angles).cos()[first], rtol=0, atol=1e-6)
    assert (found.diff() < 0).all(), "monotone, without a jump upwards"
    assert found.diff().abs().max() < 1.01 * margin * math.pi / 2000, "and without one downwards"
    cosines = torch.tensor([-1.0, -0.5, 0.0, 0.7, 1.0]).requires_grad_()
    multiply_angle(cosines, margin).sum().backward()
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()
    assert (cosines.grad >= 0).all()


# Several processes


def step(
    rows: Tensor, labels: Tensor, settings: dict[str, Any], wrap: Callable[[nn.Module], nn.Module]
) -> dict[str, Tensor]:
    """Loss, figures and gradients, by rows and by the parameters of an encoder and of the loss."""
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Linear(DIMENSION, 8), nn.ReLU(), nn.Linear(8, DIMENSION)).double()
    loss_of = make_loss(settings)
    if any(True for _ in loss_of.buffers()):  # a batch before this one: to be remembered, or to draw others
        loss_of(-rows, labels, 1.0)
    rows = rows.clone().requires_grad_()
    embed = wrap(encoder)
    measure = wrap(loss_of) if list(loss_of.parameters()) else loss_of
    loss, figures = measure(embed(rows), labels, 1.0)
    loss.backward()
    assert rows.grad is not None
    parameters = [*encoder.named_parameters(), *loss_of.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return {"rows": rows.grad, **gradients, "loss": loss.detach(), **{f"figure {k}": v for k, v in figures.items()}}


IN_PROCESSES = [
    *SETTINGS,
    *DRAWN,
    *({"name": name, "memory": 20, "memory_start": 0.0} for name in ("contrastive", "margin", "triplet", "circle")),
]


def global_batch(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rows, of which one has no class, and labels."""
    labels = LABELS.clone()
    labels[9] = -1
    return make_rows(), labels_for(settings, labels)


def share_of_rank(settings: dict[str, Any], mine: slice) -> tuple[Tensor, Tensor]:
    """Consecutive images; of two views of each both."""
    rows, labels = global_batch(settings)
    if settings["name"] != "supcon":
        return rows[mine], labels[mine]
    mine = slice(mine.start // 2, mine.stop // 2)
    return torch.cat([half[mine] for half in rows.chunk(2)]), labels[mine].repeat(2)


def step_of_rank(rank: int) -> dict[str, Tensor]:
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found = {}
    for number, settings in enumerate(IN_PROCESSES):
        rows, labels = share_of_rank(settings, mine)
        result = step(rows, labels, settings, nn.parallel.DistributedDataParallel)
        found |= {f"{number} {name}": value for name, value in result.items()}
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return run_in_processes(step_of_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.xdist_group("losses")
@pytest.mark.parametrize("number", range(len(IN_PROCESSES)), ids=lambda number: name_of(IN_PROCESSES[number]))
def test_two_processes_equal_one(of_ranks: list[dict[str, Tensor]], number: int) -> None:
    wanted = step(*global_batch(IN_PROCESSES[number]), IN_PROCESSES[number], lambda module: module)
    first, second = of_ranks
    assert {name for name in first if name.startswith(f"{number} ")} == {f"{number} {name}" for name in wanted}
    # Rows are no parameters: nobody averages their gradients, so that each process has twice its share.
    shares = [first[f"{number} rows"], second[f"{number} rows"]]
    if IN_PROCESSES[number]["name"] == "supcon":  # of each view the images of both
        shares = [half for view in zip(*(share.chunk(2) for share in shares), strict=True) for half in view]
    rows = torch.cat(shares) / 2
    assert (rows - wanted.pop("rows")).norm() <= 1e-10
    for name, value in wanted.items():
        for found in (first, second):
            assert (found[f"{number} {name}"] - value).norm() <= 1e-10 * max(1.0, value.norm().item()), name
        assert torch.equal(first[f"{number} {name}"], second[f"{number} {name}"]), name


def test_a_triplet_of_one_image_twice_is_pulled_by_nothing_but_its_negative() -> None:
    """The positive is the anchor's equal: the distance of nought has a derivative of nought."""
    loss_of = Triplet(TASK, 0, 0.0, 2.0, "hard")
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).requires_grad_()
    loss, _ = loss_of(rows, torch.tensor([0, 0, 1, 1]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 - math.sqrt(2))
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
