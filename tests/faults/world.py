"""Where hostile inputs are tried: a folder with a home, a store and room for files, and a store that can be forged."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.hostile_files import png
from faults.zygote import Zygote
from pipeline.manifest import FILES, MANIFEST, canonical_json, seal, sha256_bytes
from pipeline.records import Version
from pipeline.store import Store

RECIPE = """
name: toy
steps:
  shards:   {stage: shard, source: "folder:images", test_fraction: 0.25}
  views:    {stage: augment, shards: shards, image_size: 8, contact_sheet_images: 1}
  simclr:   {stage: pretrain, shards: shards, views: views, architecture: {backbone: resnet10, width: 4},
             projector: {hidden: 8, dimension: 4}, epochs: 1, batch_size: 4, device: cpu, checkpoint_every_steps: 1}
  features: {stage: embed, shards: shards, encoder: simclr, device: cpu}
  found:    {stage: retrieve, features: features, gallery: train, index: hnsw, bootstrap_samples: 100}
  probe:    {stage: probe, features: features, label_fractions: [], subsets: [], bootstrap_samples: 100}
"""
LONGER = ["run", "toy.yaml", "simclr", "--set", "simclr.epochs=2"]
"""Of this one the store has a checkpoint."""
KILLED_AFTER = "checkpoint.committed:2"


@dataclass(frozen=True)
class World:
    """A folder of one trial.

    Attributes:
        top: holds all of it.
        here: the working directory: toy.yaml, images/, and artifacts/ where the trial has a store.
        canary: what a payload makes.
    """

    top: Path

    @property
    def here(self) -> Path:
        return self.top / "here"

    @property
    def canary(self) -> Path:
        return self.top / "canary"

    @property
    def store(self) -> Store:
        return Store(self.here / "artifacts")

    def environment(self) -> dict[str, str]:
        """A home of its own, and no way out: what would be downloaded is refused at once."""
        home = str(self.top / "home")
        nowhere = "http://127.0.0.1:9"
        return {
            "HOME": home,
            "TMPDIR": str(self.top / "tmp"),
            "TORCH_HOME": f"{home}/torch",
            "HF_HOME": f"{home}/hf",
        } | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere)

    def write(self, name: str, content: bytes | str) -> Path:
        """A file in the working directory."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def outside(self) -> dict[str, list[int]]:
        """Everything but the store: kind, size and time."""
        found = {}
        for path in sorted(self.top.rglob("*")):
            relative = path.relative_to(self.top).as_posix()
            if not relative.startswith("here/artifacts"):
                status = path.lstat()
                size = status.st_size if not path.is_dir() else 0
                found[relative] = [status.st_mode, size, status.st_mtime_ns if not path.is_dir() else 0]
        return found

    # The store

    def version(self, step: str) -> Version:
        return self.store.resolve(f"toy/{step}")

    def files(self, step: str) -> Path:
        """The files of an artifact."""
        version = self.version(step)
        return self.store.files(version.stage, version.digest)

    def record(self, step: str) -> Path:
        version = self.version(step)
        return self.store.path / "runs" / version.stage / version.key / f"{version.digest}.json"

    def name(self, step: str, label: str = "latest") -> Path:
        return self.store.path / "names" / "toy" / step / label

    def forge(self, step: str, edit: Callable[[Path], None]) -> None:
        """Change the files of an artifact and then all that knows of it, as whoever makes a store would: every hash
        fits."""
        build = self.files(step).parent
        edit(build / FILES)
        self._take(step, seal(build))

    def forge_manifest(self, step: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the manifest of an artifact, and then all that knows of it."""
        path = self.files(step).with_name(MANIFEST)
        manifest = json.loads(path.read_bytes())
        change(manifest)
        path.write_bytes(canonical_json(manifest))
        self._take(step, sha256_bytes(path.read_bytes()))

    def _take(self, step: str, digest: str) -> None:
        """An artifact that was changed has this digest from here on."""
        version = self.version(step)
        build = self.store.build(version.stage, version.digest)
        place = self.store.build(version.stage, digest)
        place.parent.mkdir(parents=True, exist_ok=True)
        build.rename(place)
        for path in [*(self.store.path / "runs").rglob("*.json"), *(self.store.path / "names").rglob("*")]:
            if path.is_file() and version.digest in (text := path.read_text()):
                path.write_text(text.replace(version.digest, digest))
                if version.digest in path.name:
                    path = path.rename(path.with_name(path.name.replace(version.digest, digest)))
                sign(path)
        shutil.rmtree(self.store.path / "whole", ignore_errors=True)

    def forge_record(self, step: str, **changes: Any) -> None:
        """Change fields of the record of a run, and sign it."""
        path = self.record(step)
        path.write_bytes(canonical_json(json.loads(path.read_bytes()) | changes))
        sign(path)

    def checkpoint(self) -> Path:
        """The newest checkpoint of what was interrupted."""
        return sorted((self.store.path / "work").rglob("step-*"))[-1]

    def forge_checkpoints(self, edit: Callable[[Path], None]) -> None:
        """Change the files of all checkpoints, and seal them."""
        for place in sorted((self.store.path / "work").rglob("step-*")):
            edit(place / FILES)
            seal(place)


def sign(path: Path) -> None:
    """Write the hash of a record anew; whatever has none stays."""
    data = json.loads(path.read_bytes())
    if "sha256" in data:
        del data["sha256"]
        path.write_bytes(canonical_json(data | {"sha256": sha256_bytes(canonical_json(data))}))


def change_json(path: Path, **values: Any) -> None:
    """Set some of the values of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_world(top: Path) -> World:
    """A folder with images and a recipe, and nothing made of it."""
    world = World(top)
    for name in ("home", "tmp", "here"):
        (top / name).mkdir(parents=True)
    for number in range(16):
        world.write(f"images/{'leaf' if number % 2 else 'stone'}/{number}.png", png(number))
    world.write("toy.yaml", RECIPE)
    return world


def make_finished(top: Path, zygote: Zygote) -> World:
    """The same, with a store in which the recipe ran to its end, and a longer training of it was killed."""
    world = make_world(top)
    code, said = zygote.run(["run", "toy.yaml"], world.here, environment=world.environment(), output=top / "said")
    assert code == 0, said
    code, said = zygote.run(
        LONGER, world.here, environment=world.environment(), output=top / "said", failpoint=KILLED_AFTER
    )
    assert code < 0, said
    (top / "said").unlink()
    return world


def copy_world(world: World, top: Path) -> World:
    """A world of one's own, equal to another."""
    shutil.copytree(world.top, top, symlinks=True, copy_function=shutil.copy2)
    return World(top)


def link_or_fail(target: str, path: Path) -> None:
    """A symbolic link in the place of whatever is there."""
    path.unlink(missing_ok=True)
    os.symlink(target, path)
