"""Stages without images, to test the machinery: numbers from files -> a model trained on them -> a table."""

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from pipeline.run import Run
from pipeline.settings import ForeignInput, Settings, StageSettings, artifact, setting
from pipeline.stage import Stage
from pipeline.training import Training


class Group(Settings):
    shift: float = setting(0.0, "added to every number")


class Numbers(StageSettings):
    """Read numbers."""

    stage_version: ClassVar[int] = 1
    source: str = setting(..., "folder:PATH", hashed=False)
    scale: float = setting(1.0, "multiplies every number", gt=0)
    group: Group = setting(Group(), "a nested group")
    workers: int = setting(1, "cannot change the result", hashed=False)

    def depends_on_seed(self) -> bool:
        return False

    def foreign_inputs(self) -> dict[str, ForeignInput]:
        return {"source": ForeignInput("folder", (Path(self.source.removeprefix("folder:")),), frozenset({".txt"}))}


class Train(StageSettings):
    """Fit a line."""

    stage_version: ClassVar[int] = 1
    numbers: str = artifact("numbers", description="what to fit")
    steps: int = setting(20, "of training", ge=1)
    learning_rate: float = setting(0.1, "of SGD", gt=0)
    record_every_steps: int = setting(3, "steps of a line", ge=1)
    log_every_seconds: float = setting(10.0, "between lines", hashed=False)
    checkpoint_every_steps: int = setting(4, "between checkpoints", hashed=False)
    stop_at: int = setting(0, "a signal comes in this step", hashed=False)


class Table(StageSettings):
    """Show what was trained."""

    stage_version: ClassVar[int] = 1
    reads_ancestors: ClassVar[bool] = True
    of: tuple[str, ...] = artifact("train", "numbers", description="what is shown")


def numbers(run: Run, settings: Numbers) -> None:
    folder = Path(settings.source.removeprefix("folder:"))
    values = [float(word) for path in sorted(folder.glob("*.txt")) for word in path.read_text().split()]
    scaled = [round(value * settings.scale + settings.group.shift, 6) for value in values]
    (run.out / "numbers.json").write_text(json.dumps(scaled))
    run.count(samples=len(scaled))


def train(run: Run, settings: Train) -> None:
    data = torch.tensor(json.loads((run.input("numbers") / "numbers.json").read_text()))
    torch.manual_seed(run.seed)
    model = nn.Linear(1, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)
    state = {"model": model, "optimiser": optimiser}
    with Training(run, state, steps=settings.steps, steps_per_epoch=5, images_per_step=1) as training:
        for step, x in training.steps(lambda step: data[step % len(data)]):
            if step + 1 == settings.stop_at:
                run.receive(15)
            noise = torch.rand(())  # so that the state of the generator matters
            loss = (model(x.reshape(1, 1)) - 2 * x + noise).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            training.record(loss=loss)
            if training.line_is_due:
                training.record(noise=noise)
    (run.out / "model.json").write_text(json.dumps([float(p.detach().sum()) for p in model.parameters()]))


def table(run: Run, settings: Table) -> None:
    rows = [[one.step, one.stage, one.digest[:8]] for one in run.ancestors()]
    (run.out / "table.json").write_text(json.dumps({"table": {"columns": ["step", "stage", "digest"], "rows": rows}}))
    (run.out / "table.html").write_text("<p>table</p>")


STAGES = {
    name: Stage(name, settings, "toy_stages")
    for name, settings in {"numbers": Numbers, "train": Train, "table": Table}.items()
}
