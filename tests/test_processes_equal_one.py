"""Two processes equal one: the stage itself on the recipe's own ResNet, with batch norm over all, LARS and clipping."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from processes import run_in_processes
from safetensors.torch import load_file
from torch import Tensor, distributed

from pipeline.errors import UsageError
from pipeline.launcher import Place
from pipeline.progress import Reporter
from pipeline.ranks import Ranks
from pipeline.run import Input, Run
from pipeline.workplace import Workplace
from stages import pretrain as pretrain_stage
from stages.evaluation import read_features
from stages.models import optimisation
from stages.settings import STAGES

STEPS = 3
PRETRAIN: dict[str, Any] = {
    "shards": "shards",
    "views": "views",
    "architecture": {"backbone": "resnet10", "width": 16},
    "projector": {"layers": 2, "hidden": 128, "dimension": 64},
    "optimiser": {"name": "lars", "learning_rate": 1.0, "weight_decay": 1e-4, "warmup_epochs": 0},
    "gradient_clip": 0.5,
    "temperature": 0.2,
    "batch_size": 126,  # two and three divide it
    "max_steps": STEPS,
    "record_every_steps": 1,
    "device": "cpu",
}

ROUNDED = {torch.float32: {"channels_last": False}}
"""torch sums the batch statistics of maps on the CPU in float64, but in float32 where channels are last in memory: then
ReLUs open otherwise and gradients are 3e-3 from those in float64, whatever the number of processes."""
FEW = {"batch_size": 4, "max_steps": 1}
"""In float32 a single ReLU at its edge, open here and closed there, moves a gradient by 1e-3. Of the millions of a
whole batch some always are, and which ones is the processor's choice; of so few images it is seldom any."""
SEEDS = range(5)


def pretrain(
    folder: Path, peers: Ranks, dtype: torch.dtype, inputs: dict[str, Path], seed: int = 0, **changes: Any
) -> dict[str, Tensor]:
    """The stage in one process among `peers`: ids and gradients of each step, metrics, and what it wrote."""
    found: dict[str, Tensor] = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrain_stage, "load", watched(pretrain_stage.load, found, dtype))
    patch.setattr(optimisation, "clip_gradient", keep_gradients(optimisation.clip_gradient, found))
    for build in ("build_encoder", "build_projector"):
        patch.setattr(pretrain_stage, build, in_float32(getattr(pretrain_stage, build), dtype))
    patch.setattr(pretrain_stage, "evaluation_view", in_float32(pretrain_stage.evaluation_view, dtype))
    torch.set_default_dtype(dtype)
    try:
        run = done("pretrain", folder, peers, inputs, PRETRAIN | ROUNDED.get(dtype, {}) | changes, seed)
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()
    for name in ("encoder", "projector"):
        found |= {f"{name}/{key}": value for key, value in load_file(run.out / f"{name}.safetensors").items()}
    for line in (run.out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found |= {f"{name}/{values['step']}": torch.tensor(value).double() for name, value in values.items()}
    return found


def in_float32(function: Any, dtype: torch.dtype) -> Any:
    """Images and initial weights are made in float32, whatever computes on them."""

    def make(*arguments: Any, **named: Any) -> Any:
        torch.set_default_dtype(torch.float32)
        made = function(*arguments, **named)
        torch.set_default_dtype(dtype)
        return made.to(dtype)

    return make


def watched(load: Any, found: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Views in `dtype`, and the ids of every step kept."""

    def loaded(*arguments: Any) -> Any:
        views = in_float32(load(*arguments), dtype)

        def draw(images: Tensor, ids: Tensor, epoch: int, sizes: Tensor) -> Tensor:
            found[f"ids/{sum(name.startswith('ids') for name in found)}"] = ids
            return views(images, ids, epoch, sizes)

        return draw

    return loaded


def keep_gradients(clip: Any, found: dict[str, Tensor]) -> Any:
    """Clipping, with the gradients of the first step kept as they were before it."""

    def clipped(optimiser: torch.optim.Optimizer, largest: float | None) -> Tensor:
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            found.setdefault(f"gradient/{number}", parameter.grad.clone().contiguous())
        return clip(optimiser, largest)

    return clipped


def done(
    stage: str, folder: Path, peers: Ranks, inputs: dict[str, Path], settings: dict[str, Any], seed: int = 0
) -> Run:
    """The run of a stage in one process among `peers`, after it."""
    out = folder / f"{stage}-{peers.rank}" / "files"
    out.mkdir(parents=True)
    typed: Any = STAGES[stage].settings.model_validate_json(json.dumps(settings))
    run = Run(
        recipe="test", step=stage, seed=seed, settings=typed,
        inputs={name: [Input(name, "", "", "", path)] for name, path in inputs.items()}, ancestors=[], out=out,
        work=Workplace(out.parent), trackers=out, reporter=Reporter(stage, quiet=True), peers=peers,
    )  # fmt: skip
    getattr(importlib.import_module(STAGES[stage].module), stage)(run, typed)
    return run


def embed(folder: Path, peers: Ranks, inputs: dict[str, Path]) -> Path:
    settings = {"shards": "shards", "encoder": "random", "architecture": PRETRAIN["architecture"], "image_size": 8}
    settings |= {"batch_size": 400, "device": "cpu"}
    return done("embed", folder, peers, {"shards": inputs["shards"]}, settings).out


def peers_of(rank: int, folder: Path) -> Ranks:
    size = distributed.get_world_size()
    return Ranks(Place(rank, size, rank, size), distributed.FileStore(str(folder / "store"), size))


def all_of(rank: int, folder: Path, inputs: dict[str, Path]) -> dict[str, Tensor]:
    peers, found = peers_of(rank, folder), {}
    for dtype in (torch.float64, torch.float32):
        part = pretrain(folder / str(dtype), peers, dtype, inputs)
        found |= {f"{dtype}/{name}": value for name, value in part.items()}
    for seed in SEEDS:
        found[f"few/{seed}"] = first_gradient(folder / f"few-{seed}", peers, inputs, seed)
    embed(folder, peers, inputs)
    return found


def first_gradient(folder: Path, peers: Ranks, inputs: dict[str, Path], seed: int) -> Tensor:
    """The whole gradient of the first step on FEW images, in float32."""
    found = pretrain(folder, peers, torch.float32, inputs, seed, **FEW)
    return torch.cat([value.flatten() for name, value in found.items() if name.startswith("gradient/")])


def ids_of(rank: int, folder: Path, inputs: dict[str, Path]) -> dict[str, Tensor]:
    peers = peers_of(rank, folder)
    found = pretrain(folder, peers, torch.float32, inputs, architecture={"backbone": "resnet10", "width": 4})
    refused = r"pretrain\.batch_size: 128 cannot be shared evenly by 3 processes; 126 or 129 can"
    with pytest.raises(UsageError, match=refused):
        done("pretrain", folder / "other", peers, inputs, PRETRAIN | {"batch_size": 128})
    return {name: value for name, value in found.items() if name.startswith("ids")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    shards = done("shard", folder, Ranks(), {}, {"source": "sklearn:digits"}).out
    sheet = {"shards": "shards", "preset": "text", "image_size": 16, "contact_sheet_images": 1}
    return {"shards": shards, "views": done("augment", folder, Ranks(), {"shards": shards}, sheet).out}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def of_two(folder: Path, inputs: dict[str, Path]) -> list[dict[str, Tensor]]:
    return run_in_processes(all_of, folder, folder, inputs)


def compared(
    dtype: torch.dtype, of_two: list[dict[str, Tensor]], inputs: dict[str, Path], folder: Path
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, of two processes, of one) of everything but the ids, which have to be the same."""
    wanted = pretrain(folder, Ranks(), dtype, inputs)
    first, second = ({name.removeprefix(f"{dtype}/"): value for name, value in one.items()} for one in of_two)
    kinds = {name.split("/")[0] for name in wanted}
    assert {"ids", "gradient", "encoder", "projector", "loss", "gradient_norm", "probe_accuracy", "rankme"} <= kinds
    assert wanted["gradient_norm/1"] > 0.5, "it is clipped"
    for name, value in wanted.items():
        if name.startswith("ids"):
            assert torch.equal(torch.cat([first[name], second[name]]), value)
            continue
        assert torch.equal(first[name], second[name]), f"{name} is the same on both"
        assert value.dtype == first[name].dtype
        yield name, first[name].double(), value.double()


@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one(of_two: list[dict[str, Tensor]], inputs: dict[str, Path], tmp_path: Path) -> None:
    for name, found, wanted in compared(torch.float64, of_two, inputs, tmp_path):
        assert (found - wanted).norm() <= 1e-10 * wanted.norm(), name


@pytest.mark.xdist_group("processes")
def test_two_processes_equal_one_in_single_precision(
    of_two: list[dict[str, Tensor]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    """As vectors: single biases have gradients that all but cancel, and rounding is what is left of them."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, found, wanted in compared(torch.float32, of_two, inputs, tmp_path):
        kind = (
            "statistics" if "running" in name else "weights" if name.startswith(("enc", "proj")) else name.split("/")[0]
        )
        pairs.setdefault(kind, []).append((found.flatten(), wanted.flatten()))
    for kind in ("loss", "statistics", "weights"):
        found, wanted = (torch.cat(parts) for parts in zip(*pairs[kind], strict=True))
        assert (found - wanted).norm() <= 1e-5 * wanted.norm(), kind


@pytest.mark.xdist_group("processes")
def test_gradients_of_two_processes_are_those_of_one_in_single_precision(
    of_two: list[dict[str, Tensor]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    errors = []
    for seed in SEEDS:
        found = of_two[0][f"few/{seed}"].double()
        wanted = first_gradient(tmp_path / str(seed), Ranks(), inputs, seed).double()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert median(errors) <= 1e-5, errors


@pytest.mark.xdist_group("processes")
def test_the_order_is_the_same_in_one_two_and_three(
    of_two: list[dict[str, Tensor]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    of_three = run_in_processes(ids_of, tmp_path, tmp_path, inputs, processes=3)
    for step in range(STEPS):
        of_2 = torch.cat([one[f"{torch.float32}/ids/{step}"] for one in of_two])
        of_3 = torch.cat([one[f"ids/{step}"] for one in of_three])
        assert len(of_2) == 126
        assert torch.equal(of_2, of_3)


@pytest.mark.xdist_group("processes")
def test_features_of_two_processes_are_those_of_one(
    of_two: list[dict[str, Tensor]], folder: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    assert of_two
    one = embed(tmp_path, Ranks(), inputs)
    two = folder / "embed-0" / "files"
    assert torch.equal(read_features(one).features, read_features(two).features)
    for name in ("features.parquet", "features.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
