"""Fine-tuning that signals interrupt, beside one that nobody does."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted
from pipeline.progress import Reporter
from pipeline.run import Input, Run
from pipeline.workplace import Workplace
from stages.finetune import finetune
from stages.settings.finetune import Finetune
from stages.views import Views


def assert_resumed_equals_whole(
    folder: Path, settings: dict[str, Any], shards: Path, stops: Sequence[int], files: set[str]
) -> None:
    """Whatever the stage writes, `files` among it, has the same bytes.

    Args:
        stops: for each attempt that a signal ends, in which of its steps, counted from 1, it comes.
    """
    typed = Finetune.model_validate_json(json.dumps(settings | {"shards": "shards"}))
    _finetune(folder / "whole", typed, shards, None)
    for stop_at in stops:
        with pytest.raises(Interrupted):
            _finetune(folder / "parts", typed, shards, stop_at)
    _finetune(folder / "parts", typed, shards, None)
    names = {path.name for path in (folder / "whole/out").iterdir()}
    assert files <= names
    for name in names:
        assert (folder / "whole/out" / name).read_bytes() == (folder / "parts/out" / name).read_bytes(), name


def _finetune(folder: Path, settings: Finetune, shards: Path, stop_at: int | None) -> None:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    run = Run(
        recipe="test", step="finetune", seed=0, settings=settings,
        inputs={"shards": [Input("shards", "shard", "0" * 64, "0" * 64, shards)]}, ancestors=[],
        out=folder / "out", work=Workplace(folder), trackers=folder, reporter=Reporter("finetune"),
    )  # fmt: skip
    visit: Callable[..., Any] = Views.__call__
    calls = 0

    def watched(self: Views, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            run.receive(15)
        return visit(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "__call__", watched)
        finetune(run, settings)
