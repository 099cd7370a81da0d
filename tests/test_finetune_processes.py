"""Fine-tuning in two processes equals one: order, views, loss, figures and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import stage_runner
from processes import run_in_processes
from safetensors.torch import load_file
from torch import Tensor, distributed

from pipeline.errors import UsageError
from pipeline.launcher import Place
from pipeline.progress import Reporter
from pipeline.ranks import Ranks
from pipeline.run import Input, Run
from pipeline.workplace import Workplace
from stages import finetune as finetune_stage
from stages.images import open_shards
from stages.settings.finetune import Finetune

LOSSES: list[dict[str, Any]] = [
    {"name": "cross_entropy", "label_smoothing": 0.1},
    {"name": "triplet"},
    {"name": "arcface", "margin_ramp": 0.0},
]
PAIRS = "pairs.csv"
SETTINGS: dict[str, Any] = {
    "shards": "shards",
    "encoder": "random",
    "architecture": {"backbone": "resnet10", "width": 4},
    "image_size": 8,
    "label_fraction": 0.0487,
    "batch_size": 90,  # more than there are: 70
    "classes_per_batch": 5,
    "images_per_class": 6,  # half of a class's images on either side
    "gradient_clip": 1.0,
    "max_steps": 3,
    "record_every_steps": 1,
    "channels_last": False,  # channels last, torch sums the statistics of maps in float32
    "device": "cpu",
}


def finetune(folder: Path, peers: Ranks, shards: Path, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The stage in one process among `peers`: ids and views of each step, metrics, and what it wrote."""
    changes = changes | ({"pairs": str(shards.parent / changes["pairs"])} if "pairs" in changes else {})
    settings = Finetune.model_validate_json(json.dumps(SETTINGS | changes))
    out = folder / str(peers.rank) / "files"
    out.mkdir(parents=True)
    inputs = {"shards": [Input("shards", "", "", "", shards)]}
    run = Run(
        recipe="test", step="finetune", seed=0, settings=settings, inputs=inputs, ancestors=[], out=out,
        work=Workplace(out.parent), trackers=out, reporter=Reporter("finetune", quiet=True), peers=peers,
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    load = finetune_stage.load

    def watched(*arguments: Any, **named: Any) -> Any:
        views = load(*arguments, **named)

        def draw(images: Tensor, ids: Tensor, visits: Tensor, sizes: Tensor) -> Tensor:
            found[f"ids/{len(found)}"] = ids
            made = views(images, ids, visits, sizes)
            found[f"views/{len(found)}"] = made[0]
            return made

        return draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_stage, "load", watched)
        finetune_stage.finetune(run, settings)
    for path in out.glob("*.safetensors"):
        found |= {f"{path.stem}/{name}": value for name, value in load_file(path).items()}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found |= {f"metric/{name}/{values['step']}": torch.tensor(value).double() for name, value in values.items()}
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"loss": {"name": "pairs_cosine"}, "pairs": PAIRS, "label_fraction": 1.0, "batch_size": 400},
        "finetune.batch_size: 158 (no more are there) cannot be shared evenly by 2 processes; 156 can",
    ),
    (
        {"loss": {"name": "pairs_cosine"}, "batch_size": 90},
        "finetune.batch_size: 90 cannot be shared evenly by 2 processes; 88 or 92 can",
    ),
    ({"batch_size": 15}, "finetune.batch_size: 15 cannot be shared evenly by 2 processes; 14 or 16 can"),
    (
        {"sampler": "balanced", "batch_size": 71},
        "finetune.batch_size: 71 cannot be shared evenly by 2 processes; 70 or 72 can",
    ),
    (
        {"loss": {"name": "triplet"}, "images_per_class": 5},
        "finetune.classes_per_batch x images_per_class: 25 cannot be shared evenly by 2 processes; 24 or 26 can",
    ),
]
"""Before anything is computed, so that one process may say what two would."""


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_batch_that_cannot_be_shared_is_refused(
    shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    peers = Ranks(Place(0, 2, 0, 2), distributed.HashStore())
    with pytest.raises(UsageError) as caught:
        finetune(tmp_path, peers, shards, changes)
    assert str(caught.value) == message


def variants() -> dict[str, dict[str, Any]]:
    losses = {loss["name"]: {"loss": loss} for loss in LOSSES}
    drawn = {"name": "triplet", "mining": "distance_weighted", "memory": 50, "memory_start": 0.0}
    both = [{"name": "circle", "scale": 16.0}, {"name": "bce", "weight": 0.5}]
    negatives = {"negative_only": ["3"], "negatives_per_batch": 4, "flip_is_new_class": True}
    return losses | {
        "head": {"loss": LOSSES[2], "freeze": "encoder"},
        "part": {"loss": LOSSES[1], "freeze": "layer1"},
        "pairs": {"loss": {"name": "pairs_difference"}, "batch_size": 60},
        "given pairs": {
            "loss": {"name": "pairs_concatenated"},
            "pairs": PAIRS,
            "batch_size": 60,
            "label_fraction": 1.0,
        },
        "supcon": {"loss": {"name": "supcon"}, "projection": {"layers": 2, "hidden": 16, "dimension": 8}},
        "memory": {"loss": drawn},
        "neck": {"loss": both, "neck": "bn", "layer_decay": 0.7, "classes_per_batch": 6} | negatives,
    }


def all_of(rank: int, folder: Path, shards: Path) -> dict[str, Tensor]:
    size = distributed.get_world_size()
    peers = Ranks(Place(rank, size, rank, size), distributed.FileStore(str(folder / "store"), size))
    return {
        f"{variant}/{name}": value
        for variant, changes in variants().items()
        for name, value in finetune(folder / variant, peers, shards, changes).items()
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With pairs beside them: graded, and some images in several."""
    files = stage_runner(tmp_path_factory.mktemp("made"))("shard", {"source": "sklearn:digits"})
    keys = open_shards(files, "train").keys
    rows = [f"{keys[7 * row % 90]},{keys[11 * row % 90]},{row % 11 / 10}" for row in range(1, 80)]
    (files.parent / PAIRS).write_text("\n".join(["a,b,target", *rows]))
    return files


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two")
    return run_in_processes(all_of, folder, folder, shards)


@pytest.mark.xdist_group("finetune-processes")
@pytest.mark.parametrize("variant", list(variants()))
def test_two_processes_equal_one(of_two: list[dict[str, Tensor]], shards: Path, tmp_path: Path, variant: str) -> None:
    wanted = finetune(tmp_path, Ranks(), shards, variants()[variant])
    first, second = (
        {name.removeprefix(f"{variant}/"): value for name, value in found.items() if name.startswith(f"{variant}/")}
        for found in of_two
    )
    assert first.keys() == second.keys() == wanted.keys()
    assert sum(name.startswith("ids") for name in wanted) == 3
    for name, value in wanted.items():
        if name.startswith(("ids", "views")):
            both = torch.cat([first[name], second[name]])
            assert torch.equal(both, value) if name.startswith("ids") else torch.allclose(both, value, atol=1e-5)
        else:
            for found in (first, second):
                difference = (found[name].double() - value.double()).norm()
                assert difference <= 1e-5 * max(1.0, value.double().norm().item()), name
