"""What checkpoints and hashes cost, as shares of the time of the same run."""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faults.tally import Tally
from pipeline import checkpoint, manifest, open_store, provenance, runner
from pipeline.progress import Reporter
from pipeline.recipe import Recipe, load_recipe
from pipeline.run import Run
from pipeline.training import CHECKPOINT_EVERY_STEPS, CHECKPOINT_SHARE, Training
from pipeline.workplace import Workplace
from stages.images import index
from stages.losses import nt_xent
from stages.models import Optimisation, build_encoder, build_projector
from stages.settings import STAGES
from stages.settings.pretrain import Pretrain

LARGEST_SHARE = 0.02
BATCH_PART = 16
"""The whole batch would take a minute a step; what a step costs grows with its images, but for the optimiser."""


@pytest.mark.alone
def test_a_checkpoint_at_the_default_cadence_takes_little_of_the_time(
    tmp_path: Path, is_whole: bool, tally: Tally
) -> None:
    """ResNet-18 at 32 pixels and all else at its default: a checkpoint of 94 MB for each 200 steps of 512 images."""
    settings = Pretrain(shards="shards", views="views")
    assert settings.batch_size is not None
    encoder = build_encoder("resnet18", 64, 64, False, 32)
    projector = build_projector(encoder.embedding_size, **settings.projector.model_dump())
    optimisation = Optimisation(
        settings.optimiser, [([encoder, projector], 1.0)], batch_size=settings.batch_size, steps=1000,
        steps_per_epoch=100, gradient_clip=None,
    )  # fmt: skip
    images, optimiser = torch.rand(2 * BATCH_PART, 3, 32, 32), optimisation.optimiser
    gradients, updates, stalls = [], [], []
    for step in range(6 if is_whole else 3):
        began = time.perf_counter()
        optimiser.zero_grad()
        view_a, view_b = projector(encoder(images)).chunk(2)
        nt_xent(view_a, view_b, settings.temperature).backward()
        gradients.append(time.perf_counter() - began)
        began = time.perf_counter()
        optimisation.step(step)
        updates.append(time.perf_counter() - began)
        began = time.perf_counter()
        state = {"encoder": encoder.state_dict(), "projector": projector.state_dict(), "o": optimiser.state_dict()}
        checkpoint.save(tmp_path / "checkpoints", step + 1, state)
        stalls.append(time.perf_counter() - began)
    stall = statistics.median(stalls)
    step_seconds = statistics.median(gradients) * settings.batch_size / BATCH_PART + statistics.median(updates)
    share = stall / (stall + CHECKPOINT_EVERY_STEPS * step_seconds)
    assert share <= LARGEST_SHARE
    rate = settings.batch_size * CHECKPOINT_EVERY_STEPS * CHECKPOINT_SHARE / (1 - CHECKPOINT_SHARE) / stall
    note = f"{share:.3%} of the time; {stall:.2f} s each, put off where more than {rate:,.0f} images a second are done"
    tally.add("cost-checkpoint", tried=len(stalls), held=len(stalls), note=note)


@pytest.mark.alone
def test_checkpoints_are_put_off_where_steps_are_quick(tmp_path: Path, tally: Tally) -> None:
    """Where 200 steps take a fraction of a second, a checkpoint for each 200 would take most of the time."""
    stalls, begins = [], []
    save: Callable[..., Path] = checkpoint.save

    def timed(*arguments: Any) -> Path:
        begins.append(time.perf_counter())
        place = save(*arguments)
        stalls.append(time.perf_counter() - begins[-1])
        return place

    settings = Pretrain(shards="shards", views="views", record_every_steps=1000)
    out = tmp_path / "out"
    out.mkdir()
    run = Run(
        recipe="test", step="quick", seed=0, settings=settings, inputs={}, ancestors=[], out=out,
        work=Workplace(tmp_path / "work"), trackers=tmp_path, reporter=Reporter("quick"),
    )  # fmt: skip
    model = torch.nn.Linear(300, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", timed)
        began = time.perf_counter()
        with Training(run, {"model": model}, steps=2**40, steps_per_epoch=1000, images_per_step=1) as training:
            for _ in training.steps(lambda step: step):
                if len(stalls) == 4:
                    break
        took = time.perf_counter() - began
    assert training.done > 3 * CHECKPOINT_EVERY_STEPS
    for stall, before, after in zip(stalls, begins, begins[1:], strict=False):
        assert after - before >= stall / CHECKPOINT_SHARE
    # The first is made before anybody knows what it costs.
    share = statistics.median(stalls) * (len(stalls) - 1) / took
    assert share <= LARGEST_SHARE
    tally.add("cost-checkpoint", tried=len(stalls), held=len(stalls), note=f"{share:.1%} where steps take no time")


@dataclass
class Spent:
    """Seconds on the hashes of files; those of samples are counted elsewhere.

    Attributes:
        hashing: on the hash of what is read.
        reading_too: the same, with opening and reading the files for it.
        measuring: on finding out the first of them.
    """

    hashing: float = 0.0
    reading_too: float = 0.0
    measuring: float = 0.0


@contextmanager
def hashing_timed() -> Iterator[Spent]:
    spent = Spent()

    def timed(hashing: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def call(path: Path) -> Any:
            began = time.perf_counter()
            found = hashing(path)
            read = time.perf_counter()
            content = path.read_bytes()
            again = time.perf_counter()
            hashlib.sha256(content).hexdigest()
            ended = time.perf_counter()
            spent.hashing += ended - again
            spent.reading_too += read - began
            spent.measuring += ended - read
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "sha256_file", timed(manifest.sha256_file))
        patch.setattr(provenance, "sha256_file", timed(provenance.sha256_file))
        patch.setattr(index, "require_published", timed(index.require_published))
        yield spent


RECIPE = """
name: hashed
steps:
  shards: {stage: shard, source: "folder:images", splits: drawn, workers: 1}
  views: {stage: augment, shards: shards, preset: natural, image_size: 32}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {backbone: resnet10, width: 16}
    optimiser: {name: sgd, learning_rate: 0.1}
    projector: {layers: 2, hidden: 128, dimension: 64}
    epochs: 1
    batch_size: 128
  features: {stage: embed, shards: shards, encoder: simclr}
"""


@pytest.mark.alone
def test_hashes_take_little_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool, tally: Tally
) -> None:
    """Of the source, of what is sealed, and of inputs, each of which is read again here as if nobody had read it."""
    monkeypatch.chdir(tmp_path)
    count = 10_000 if is_whole else 1_500
    _write_images(tmp_path / "images", count)
    Path("hashed.yaml").write_text(RECIPE)
    recipe = load_recipe(Path("hashed.yaml"), STAGES)
    # Of the least time an image, and measured several times for that.
    trials = [_shares(Path(f"store-{number}"), recipe, "shards") for number in range(3)]
    shares = {"shards": sorted(trials)[1]}
    for step in ("views", "simclr", "features"):
        shares[step] = _shares(Path("store-0"), recipe, step)
    assert max(hashing for hashing, _ in shares.values()) <= LARGEST_SHARE, shares
    assert max(shares[step][1] for step in ("simclr", "features")) <= LARGEST_SHARE, shares
    # Held is what holds with reading as well: of sharding small images, whose files are opened for their hash alone, it
    # does not.
    held = sum(reading_too <= LARGEST_SHARE for _, reading_too in shares.values())
    parts = [f"{step} {hashing:.2%} ({reading_too:.2%})" for step, (hashing, reading_too) in shares.items()]
    note = f"{count:,} images of 32 pixels: {', '.join(parts)}; in brackets with opening and reading the files for that"
    note += f", which is within the limit in {held} of {len(shares)} stages"
    tally.add("cost-hash", tried=len(shares), held=held, note=note)


def _shares(store: Path, recipe: Recipe, step: str) -> tuple[float, float]:
    """Of the time that a step takes, how much is spent on hashes; and on reading files for them as well."""
    for seen in store.glob("whole/*/*.json"):
        seen.unlink()
    began = time.perf_counter()
    with hashing_timed() as spent:
        runner.run(runner.Planner(open_store(store), recipe, print), [step], lambda _: None)
    took = time.perf_counter() - began - spent.measuring
    return spent.hashing / took, spent.reading_too / took


def _write_images(folder: Path, count: int) -> None:
    """JPEGs of 32 pixels, in two classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(random.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((4, 4, 1), dtype=np.uint8))
        Image.fromarray(pixels).save(place, quality=90)
