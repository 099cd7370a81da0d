"""Fixtures that several test modules share."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import open_store, runner
from pipeline.progress import Reporter
from pipeline.recipe import load_recipe
from pipeline.run import Ancestor, Input, Run
from pipeline.workplace import Workplace
from stages.settings import STAGES

torch.set_num_threads(1)  # byte equality is promised for equal threads; and tests run beside one another


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/faults, known before any of its files is read."""
    parser.addoption("--all-faults", action="store_true", help="all trials of tests/faults, rather than a part of them")
    parser.addoption("--tally", type=Path, default=None, help="file to append the counts of tests/faults to")


RunStage = Callable[..., Path]
MADE_FROM: dict[Path, dict[str, str]] = {}
"""By the files of what a stage runner made: the digests of its inputs."""


@pytest.fixture
def run_stage(tmp_path: Path) -> RunStage:
    """Runs a stage's function with a real Run, outside any store; returns the folder of the files it wrote."""
    return stage_runner(tmp_path)


def stage_runner(folder: Path) -> RunStage:
    """The same for fixtures of a wider scope, that have a folder of their own."""
    made = 0

    def run(
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Path | list[Path]] | None = None,
        seed: int = 0,
        ancestors: list[Ancestor] | None = None,
    ) -> Path:
        nonlocal made
        made += 1
        work = folder / f"{made}-{stage}"
        out = work / "files"
        out.mkdir(parents=True)
        groups = {
            field: [
                Input(path.parent.name, "", "0" * 64, _digest(path), path, MADE_FROM.get(path, {}))
                for path in _listed(paths)
            ]
            for field, paths in (inputs or {}).items()
        }
        named = {
            field: [one.name for one in groups[field]] if isinstance(paths, list) else groups[field][0].name
            for field, paths in (inputs or {}).items()
        }
        typed = STAGES[stage].settings.model_validate_json(json.dumps({**named, **settings}), strict=True)
        given = Run(
            recipe="test",
            step=stage,
            seed=seed,
            settings=typed,
            inputs=groups,
            ancestors=ancestors or [],
            out=out,
            work=Workplace(work),
            trackers=work,
            reporter=Reporter(stage),
        )
        module = __import__(STAGES[stage].module, fromlist=[stage])
        getattr(module, stage)(given, typed)
        MADE_FROM[out] = {field: _digest(path) for field, path in (inputs or {}).items() if isinstance(path, Path)}
        return out

    return run


def run_recipe(folder: Path, text: str) -> Callable[[str], Path]:
    """Run a whole recipe in a store below `folder`; gives the files of each of its steps."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    store = open_store(folder / "store")
    finished = runner.run(runner.Planner(store, load_recipe(path, STAGES), print), (), lambda _: None)
    files = {one.planned.step.name: store.files(one.record.stage, one.record.digest) for one in finished}
    return lambda step: files[step]


def _digest(files: Path) -> str:
    """Another one for each place: to these tests it is what an artifact is told apart by."""
    return hashlib.sha256(str(files).encode()).hexdigest()


def _listed(paths: Path | list[Path]) -> list[Path]:
    return paths if isinstance(paths, list) else [paths]
