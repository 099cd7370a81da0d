"""What a stage is given, beside what test_runner.py shows of it in a store."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_stages
from torch import nn

from pipeline.errors import Interrupted, NotFinite, UsageError
from pipeline.progress import Progress, Reporter
from pipeline.run import Run
from pipeline.settings import StageSettings
from pipeline.training import Training
from pipeline.workplace import Workplace
from stages.models import build_optimiser
from stages.settings import STAGES


def given(folder: Path, settings: StageSettings) -> Run:
    out = folder / "out"
    out.mkdir()
    return Run(
        recipe="test", step="step", seed=0, settings=settings, inputs={}, ancestors=[], out=out, work=Workplace(folder),
        trackers=folder, reporter=Reporter("step"),
    )  # fmt: skip


def train_settings(**values: Any) -> toy_stages.Train:
    return toy_stages.Train(numbers="numbers", **values)


def test_lines_of_progress_say_what_a_user_waits_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = given(tmp_path, train_settings(log_every_seconds=0.0, steps=6))
    with Training(run, {}, steps=6, steps_per_epoch=6, images_per_step=10) as training:
        for step, _ in training.steps(lambda step: step):
            training.record(loss=float(step))
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"step 6/6 steps, loss 4\.0000, [\d,]+ images/s, \d+% waiting for data, 0s left", line)


def test_metrics_are_means_of_what_was_recorded_in_between(tmp_path: Path) -> None:
    run = given(tmp_path, train_settings(record_every_steps=2, steps=5))
    with Training(run, {}, steps=5, steps_per_epoch=4, images_per_step=1) as training:
        for step, _ in training.steps(lambda step: step):
            training.record(loss=torch.tensor(float(step)))
            if training.line_is_due:
                training.record(rare=7.0)
                training.write_line(own=step)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    means = [line for line in lines if "loss" in line]
    assert [(line["step"], line["epoch"], line["loss"], line["rare"]) for line in means] == [
        (2, 0.5, 0.5, 7.0),
        (4, 1.0, 2.5, 7.0),
        (5, 1.25, 4.0, 7.0),
    ]
    assert [(line["step"], line["own"]) for line in lines if "own" in line] == [(2, 1), (4, 3), (5, 4)]
    assert training.latest == {"loss": 4.0, "rare": 7.0}


def test_a_value_that_is_not_finite_ends_the_training_and_says_where(tmp_path: Path) -> None:
    run = given(tmp_path, train_settings(record_every_steps=2))

    def loop() -> None:
        with Training(run, {}, steps=9, steps_per_epoch=9, images_per_step=1) as training:
            for step, _ in training.steps(lambda step: step):
                training.record(loss=torch.nan if step == 2 else 1.0)

    with pytest.raises(NotFinite, match="loss became nan within steps 3 to 4"):
        loop()
    assert not (run.out / "metrics.jsonl").exists()


def train(
    folder: Path, optimiser_name: Any, memory_format: torch.memory_format, stop_at: int
) -> dict[str, torch.Tensor]:
    """Seven steps of a small network; a signal comes in step `stop_at`, and a second run goes on."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    module = module.to(memory_format=memory_format)
    optimiser = build_optimiser(optimiser_name, [([module], 1.0)], 0.05, 0.9, 1e-3)
    folder.mkdir(exist_ok=True)
    run = given(folder, train_settings())
    images = torch.rand(7, 5, 3, 6, 6)
    state = {"module": module, "optimiser": optimiser}
    with Training(run, state, steps=7, steps_per_epoch=7, images_per_step=5) as training:
        for step, batch in training.steps(lambda step: images[step]):
            if step == stop_at:
                run.receive(15)
            loss = module(batch.contiguous(memory_format=memory_format)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            training.record(loss=loss)
    return module.state_dict()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars", "muon"])
def test_every_optimiser_resumes_to_the_same_bytes(
    tmp_path: Path, optimiser: str, memory_format: torch.memory_format
) -> None:
    expected = train(tmp_path / "whole", optimiser, memory_format, -1)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", optimiser, memory_format, 3)
    (tmp_path / "cut" / "out").rmdir()
    found = train(tmp_path / "cut", optimiser, memory_format, -1)
    attempts = (tmp_path / "cut" / "attempts.jsonl").read_text()
    assert '"first_step":4' in attempts
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_outside_a_training_loop_a_signal_ends_the_stage_at_once(tmp_path: Path) -> None:
    run = given(tmp_path, train_settings())
    with pytest.raises(Interrupted) as interruption:
        run.receive(2)
    assert interruption.value.exit_code == 130


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    settings = STAGES["embed"].settings.model_validate({"shards": "s", "encoder": "pixels", "device": "mps"})
    with pytest.raises(UsageError, match=r"step\.device: there is no mps device here; cpu or auto will do"):
        _ = given(tmp_path, settings).device


def test_a_tracker_that_is_not_there_is_refused(tmp_path: Path) -> None:
    values = {"shards": "s", "views": "v", "trackers": ("mlflow",)}
    settings = STAGES["pretrain"].settings.model_validate(values)
    with pytest.raises(UsageError, match="trackers: mlflow is not installed here; installed: none"):
        _ = given(tmp_path, settings).accelerator


def test_bf16_is_of_the_encoder_only_where_asked(tmp_path: Path) -> None:
    run = given(tmp_path, train_settings())
    matrix = torch.rand(3, 3)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with run.autocast(precision):
            assert (matrix @ matrix).dtype == dtype


def test_words_are_kept_for_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = given(tmp_path, train_settings())
    run.say("3 images [of] 4")
    run.warn("one is <missing>")
    run.count(images=3)
    run.count(name="x")
    assert run.reporter.messages == ["3 images [of] 4", "warning: one is <missing>"]
    assert run.counts == {"images": 3, "name": "x"}
    assert capsys.readouterr().err.splitlines() == ["step 3 images [of] 4", "step warning: one is <missing>"]


def test_long_waits_are_told_in_minutes_and_hours(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Reporter("step"), 10_000_000, "images", every_seconds=0.0) as progress:
        progress._started -= 100.0
        progress.advance(100_000)
    assert "100,000/10,000,000 images, 2h45m left" in capsys.readouterr().err
