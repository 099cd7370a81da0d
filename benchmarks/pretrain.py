"""Views per second of SimCLR's training step: the real stage, the bare encoder, lightly.

    python -m benchmarks.pretrain [--quick] [--data data/cifar10]

- ours: the stage `pretrain` as `simclr run` runs it, from shards on disk, with views, loss, online probe and metrics;
  read from the rates that the run keeps (`simclr show --json`), start-up, first window and last window aside. By the
  default recipe, whose views are the Kornia engine's, and with those of the fused engine.
- bare: the encoder alone on views at rest in memory: forward, mean of squares, backward, fused SGD. It is what the
  hardware allows; neither projector nor loss is in it.
- lightly: its transform, head and loss on the same encoder and batch, at the fastest of workers 0, 1, 2 and both memory
  formats.

Each runs in a process of its own. `simclr` changes how its process waits and keeps freed memory (pipeline/host.py),
which makes any training on a CPU faster; the last two run so as well, which is what `limit` and `lightly` are against,
and as Python starts them.

A thin ResNet-10 at 32 pixels, and a ResNet-18 at 96 pixels; the first also as two processes. DIR holds
train/<class>/*.jpg of 32 pixels; the images of 96 pixels are made.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import lightly_simclr
from benchmarks.harness import Comparison, Row, arguments, in_own_process, report, simclr
from benchmarks.image_files import cifar10, make
from stages.models import build_encoder

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
OURS, FUSED, BARE, LIGHTLY = "ours", "ours, fused views", "bare encoder", "lightly"
AS_IS = ", plain process"
WARM_UP = 2
LIGHTLY_WARM_UP = 8
"""Steps until lightly's workers have no batches left that they made before they were timed."""


@dataclass(frozen=True)
class Case:
    name: str
    backbone: str
    width: int
    image_size: int
    batch_size: int
    images: Path
    windows: int
    window_steps: int
    engine: str = "kornia"

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of `build_encoder`."""
        return {
            "backbone": self.backbone, "width": self.width, "small_stem_up_to": 64, "pretrained": False,
            "image_size": self.image_size,
        }  # fmt: skip

    @property
    def recipe(self) -> lightly_simclr.Recipe:
        """For lightly."""
        return lightly_simclr.Recipe(self.image_size, self.batch_size, 0.1, 0.5, MEAN, STD)

    @property
    def steps(self) -> int:
        """Of each contender in one run, counted ones."""
        return self.windows * self.window_steps


def ours(case: Case, store: Path, seed: int, device: str, processes: int = 1) -> float:
    """Views per second of the stage, of all processes together."""
    recipe = {
        "name": case.name,
        "seed": 0,
        "steps": {
            "shards": {
                "stage": "shard", "source": f"folder:{case.images.resolve()}", "splits": "drawn", "test_fraction": 0.0,
                "val_fraction": 0.0, "near_duplicates": False,
            },
            "views": {
                "stage": "augment", "shards": "shards", "preset": "natural", "image_size": case.image_size,
                "engine": case.engine,
            },
            "simclr": {
                "stage": "pretrain", "shards": "shards", "views": "views",
                "architecture": {"backbone": case.backbone, "width": case.width},
                "optimiser": {"name": "sgd", "learning_rate": 0.1},
                "batch_size": case.batch_size, "max_steps": (case.windows + 2) * case.window_steps,
                "record_every_steps": case.window_steps, "health_every_epochs": 1000, "device": device,
            },
        },
    }  # fmt: skip
    path = store.parent / f"{case.name}.json"  # JSON is YAML
    path.write_text(json.dumps(recipe))
    simclr("run", path, "simclr", "--seed", seed, "--processes", processes, "--store", store)
    shown = json.loads(simclr("show", f"{case.name}/simclr@latest", "--store", store, "--json"))
    lines = shown["timing"][:-1]  # the last one has the final measurements in it
    first, last = lines[0], lines[-1]
    return 2 * case.batch_size * (last["step"] - first["step"]) / (last["at"] - first["at"])


def bare(case: Case, device: str) -> float:
    """Views per second of the encoder alone."""
    encoder = build_encoder(**case.architecture)
    encoder.to(device).to(memory_format=torch.channels_last)
    views = torch.randn(2 * case.batch_size, 3, case.image_size, case.image_size, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(encoder.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    before = 0.0
    for step in range(WARM_UP + case.steps):
        if step == WARM_UP:
            _wait_for(views)
            before = time.perf_counter()
        optimiser.zero_grad()
        encoder(views).square().mean().backward()
        optimiser.step()
    _wait_for(views)
    return len(views) * case.steps / (time.perf_counter() - before)


def _wait_for(views: torch.Tensor) -> None:
    if views.is_cuda:
        torch.cuda.synchronize()


def lightly(case: Case, way: lightly_simclr.Way) -> float:
    """Views per second of lightly's SimCLR."""
    encoder = build_encoder(**case.architecture)
    batches = lightly_simclr.loader(case.images, case.recipe, way.workers)
    clock = [
        *lightly_simclr.train(
            encoder, encoder.embedding_size, batches, case.recipe, way, LIGHTLY_WARM_UP + case.steps, lambda _: 0.1
        )
    ][LIGHTLY_WARM_UP:]
    return 2 * case.batch_size * case.steps / (clock[-1] - clock[0])


def measure(case: Case, store: Path, runs: int, device: str) -> Row:
    """Medians of alternating runs."""
    fused = replace(case, engine="fused")
    contenders: dict[str, Callable[[int], float]] = {
        OURS: lambda seed: ours(case, store, seed, device),
        FUSED: lambda seed: ours(fused, store, seed, device),
        BARE: lambda _: in_own_process(bare, case, device, like_simclr=True),
        BARE + AS_IS: lambda _: in_own_process(bare, case, device),
    }
    settings = {}
    if device == "cpu":
        way = in_own_process(
            lightly_simclr.fastest_way, case.architecture, case.images, case.recipe, 9, like_simclr=True
        )
        settings[LIGHTLY] = str(way)
        for name, like_simclr in ((LIGHTLY, True), (LIGHTLY + AS_IS, False)):
            contenders[name] = lambda _, like_simclr=like_simclr: in_own_process(
                lightly, case, way, like_simclr=like_simclr
            )
    ours(replace(case, windows=1, window_steps=1), store, 0, device)  # the shards are made
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for seed in range(1, runs + 1):
        for name, rate in contenders.items():
            rates[name].append(rate(seed))
    return Row(case.name, {name: median(taken) for name, taken in rates.items()}, settings)


def growth_with_processes(case: Case, store: Path, runs: int, device: str) -> Row:
    """One process against two that share the cores (or have a GPU each), alternating."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for seed in range(100, 100 + runs):
        for processes, taken in rates.items():
            taken.append(ours(case, store, seed + 100 * processes, device, processes))
    return Row(f"{case.name}, processes", {"ours": median(rates[1]), "ours, 2 processes": median(rates[2])})


def main() -> None:
    given = arguments(__doc__)
    runs, windows = (1, 2) if given.quick else (3, 4)
    with tempfile.TemporaryDirectory() as temporary:
        folder, images = Path(temporary), cifar10(given.data)
        small = images / "train" if images else make(folder / "small", 2048, 32, 32)
        large = make(folder / "large", 256, 128, 128)
        cases = [
            Case("resnet10-width-16-32px", "resnet10", 16, 32, 256, small, windows, 8),
            Case("resnet18-96px", "resnet18", 64, 96, 32 if given.quick else 64, large, windows, 2),
        ]
        rows = [measure(case, folder / "store", runs, given.device) for case in cases]
        processes = [] if given.quick else [growth_with_processes(cases[0], folder / "store", runs, given.device)]
    comparison = Comparison(
        "pretrain", "views/s", rows[0].case, [*rows, *processes], limit=rows[0].values[BARE], runs=runs,
        device=given.device,
    )  # fmt: skip
    ratio = comparison.ratio
    for case, row in zip(cases, rows, strict=True):
        size = case.image_size
        ratio |= {f"limit_{size}": row.values[OURS] / row.values[BARE],
                  f"limit_fused_{size}": row.values[FUSED] / row.values[BARE],
                  f"limit_plain_{size}": row.values[OURS] / row.values[BARE + AS_IS]}  # fmt: skip
        if LIGHTLY in row.values:
            ratio |= {f"lightly_{size}": row.values[OURS] / row.values[LIGHTLY],
                      f"lightly_plain_{size}": row.values[OURS] / row.values[LIGHTLY + AS_IS]}  # fmt: skip
    ratio["limit"] = min(ratio[f"limit_{case.image_size}"] for case in cases)
    if "lightly_32" in ratio:
        ratio["lightly"] = ratio["lightly_32"]
    report(comparison)


if __name__ == "__main__":
    main()
