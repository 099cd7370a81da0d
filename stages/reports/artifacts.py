"""What a report knows of the artifacts it was made of, and how it reads their small files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnreadableArtifact(ValueError):
    """A file of an artifact is missing or is not what its stage writes."""

    exit_code = 4


@dataclass(frozen=True)
class Artifact:
    """One artifact on the way from images to the report.

    Attributes:
        stage, step: what made it, and under which name.
        digest: 64 hexadecimal digits.
        version: of the stage.
        seed: of the run, or None where it does not change the result.
        settings: by dotted key, those that change the result and differ from their default.
        inputs: by name of the setting, the digests of what it read; `foreign:...` for what came from outside.
        files: the folder that holds its files.
    """

    stage: str
    step: str
    digest: str
    version: int
    seed: int | None
    settings: dict[str, Any]
    inputs: dict[str, tuple[str, ...]]
    files: Path


class Lineage:
    """Every artifact that a report was made of, sources first; runs that gave equal bytes are one artifact."""

    def __init__(self, artifacts: Sequence[Artifact]):
        self._by_digest = {artifact.digest: artifact for artifact in artifacts}
        self.artifacts = tuple(self._by_digest.values())

    def of_files(self, files: Path) -> Artifact:
        """The artifact whose files lie there."""
        return next(artifact for artifact in self.artifacts if artifact.files == files)

    def of_stage(self, *stages: str) -> list[Artifact]:
        return [artifact for artifact in self.artifacts if artifact.stage in stages]

    def input(self, artifact: Artifact, field: str) -> Artifact | None:
        """The artifact that one setting names; None where it holds a word such as `random`."""
        digests = artifact.inputs.get(field, ())
        return self._by_digest.get(digests[0]) if digests else None

    def inputs(self, artifact: Artifact) -> list[Artifact]:
        digests = (digest for field in artifact.inputs.values() for digest in field)
        return [self._by_digest[digest] for digest in digests if digest in self._by_digest]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UnreadableArtifact."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableArtifact(f"cannot read {path}: {error}; `simclr verify` says what is damaged") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; raises UnreadableArtifact."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableArtifact(f"cannot read {path}: {error}; `simclr verify` says what is damaged") from error
