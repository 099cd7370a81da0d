"""The stages and their settings. Torch-free: the command line reads it to validate recipes and to write the schema."""

import importlib
from collections.abc import Iterator, Mapping
from functools import cache

from pipeline.stage import Stage

__all__ = ["STAGES"]


class _Stages(Mapping[str, Stage]):
    """Stages by name. The settings of one are imported when it is asked for: a recipe has some, and a type of settings
    takes milliseconds to be made."""

    def __init__(self, settings: Mapping[str, str]):
        self._settings = settings

    def __getitem__(self, name: str) -> Stage:
        return _stage(name, self._settings[name])

    def __contains__(self, name: object) -> bool:
        return name in self._settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


@cache
def _stage(name: str, settings: str) -> Stage:
    module = importlib.import_module(f"stages.settings.{name}")
    return Stage(name, getattr(module, settings), module=f"stages.{name}")


STAGES: Mapping[str, Stage] = _Stages(
    {
        "shard": "Shard",
        "augment": "Augment",
        "pretrain": "Pretrain",
        "finetune": "Finetune",
        "embed": "Embed",
        "pseudo_label": "PseudoLabel",
        "probe": "Probe",
        "retrieve": "Retrieve",
        "report": "Report",
    }
)
"""Every stage by name, with the class of its settings; adding one is a file here, a file in stages/, and a line."""
