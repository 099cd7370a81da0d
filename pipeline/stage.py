"""What the machinery knows of a stage: its name, its settings, and where its function is."""

from dataclasses import dataclass

from pipeline.settings import StageSettings


@dataclass(frozen=True)
class Stage:
    """One kind of work.

    Attributes:
        name: as recipes say it in `stage:`.
        settings: typed settings; their docstring documents the stage, `stage_version` versions it.
        module: imported by name in the worker; holds a function of the stage's name, (run, settings) -> None.
    """

    name: str
    settings: type[StageSettings]
    module: str

    @property
    def version(self) -> int:
        return self.settings.stage_version
