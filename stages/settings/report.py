"""Settings of the stage `report`."""

from typing import ClassVar

from pipeline.settings import StageSettings, artifact, setting


class Report(StageSettings):
    """One HTML file, and report.json with every number in it."""

    stage_version: ClassVar[int] = 7
    lower_for_memory: ClassVar[tuple[str, ...]] = ("health_samples", "neighbour_queries")
    reads_ancestors: ClassVar[bool] = True

    of: tuple[str, ...] = artifact(
        "probe",
        "embed",
        "retrieve",
        min_length=1,
        description="what is compared: probes, retrievals, or features without labels",
    )
    title: str | None = setting(None, "heading; the recipe's name if left out")
    health_samples: int = setting(
        10_000, "training images at most that effective rank and spectrum of features are measured on", ge=2
    )
    neighbour_queries: int = setting(
        8, "images that are shown with their nearest neighbours; of a retrieval the worst queries", ge=1, le=50
    )

    def depends_on_seed(self) -> bool:
        return False
