"""A store with a thousand versions answers as quickly as an empty one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults.tally import Tally
from pipeline import cli, open_store
from pipeline.manifest import FILES, MANIFEST, canonical_json, sha256_bytes, sha256_file
from pipeline.records import Version
from pipeline.store import Store

VERSIONS = 1000
LIMIT_SECONDS = 0.5
"""Of processor time, for a command that finds everything up to date."""
LIST_SECONDS = 3.0
"""For one that reads all versions."""
pytestmark = pytest.mark.alone
"""All of them, so that the stores are made once."""
RECIPE = """
name: small
steps:
  shards: {stage: shard, source: "folder:images"}
  views: {stage: augment, shards: shards, contact_sheet_images: 1, image_size: 8}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that is up to date."""
    folder = tmp_path_factory.mktemp("many")
    for place in range(4):
        path = folder / "images" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * place, dtype=np.uint8)).save(path)
    (folder / "small.yaml").write_text(RECIPE.replace("folder:images", f"folder:{folder / 'images'}"))
    arguments = ["run", str(folder / "small.yaml"), "--store", str(folder / "one")]
    assert cli.guarded(lambda: cli.app(arguments, standalone_mode=False)) == 0
    return folder


def add_versions(store: Store, like: Version, recipe: str, step: str, count: int) -> None:
    """Versions v1, v2, ... of a step: artifacts of one file each, with records and names as the store keeps them."""
    record = store.record(like.stage, like.key, like.digest)
    for number in range(1, count + 1):
        content = f"{recipe}/{step}, version {number}".encode()
        manifest = canonical_json({"files": {"of.txt": {"size": len(content), "sha256": sha256_bytes(content)}}})
        digest = sha256_bytes(manifest)
        build = store.build(like.stage, digest)
        (build / FILES).mkdir(parents=True)
        (build / FILES / "of.txt").write_bytes(content)
        (build / MANIFEST).write_bytes(manifest)
        mine = {"key": digest[::-1], "digest": digest, "recipe": recipe, "step": step, "size_bytes": len(content)}
        other = asdict(record) | mine
        other["sha256"] = sha256_bytes(canonical_json(other))
        path = store.run_file(like.stage, digest[::-1], digest)
        path.parent.mkdir(parents=True)
        path.write_bytes(canonical_json(other))
        store.pointer(like.stage, digest[::-1]).write_bytes(canonical_json({"digest": digest}))
        version = replace(like, recipe=recipe, step=step, number=number, key=digest[::-1], digest=digest)
        write_name(store, version, f"v{number}.json")
    if (recipe, step) != (like.recipe, like.step):
        write_name(store, version, "latest")


def write_name(store: Store, version: Version, name: str) -> None:
    path = store.path / "names" / version.recipe / version.step / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(canonical_json(asdict(version)))


@pytest.fixture(scope="module", params=[1, 100], ids=["of one step", "of a hundred steps"])
def many(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a thousand versions in the store."""
    steps: int = request.param
    folder = tmp_path_factory.mktemp("store")
    shutil.copytree(made / "one", folder, dirs_exist_ok=True)
    store = open_store(folder)
    last = store.resolve("small/shards")
    if steps == 1:
        add_versions(store, last, "small", "shards", VERSIONS - 1)
        for name in (f"v{VERSIONS}.json", "latest"):
            write_name(store, replace(last, number=VERSIONS), name)
    else:
        for step in range(steps):
            add_versions(store, last, f"recipe{step % 10}", f"step{step}", VERSIONS // steps)
    return folder


def processor_seconds(arguments: Sequence[str], folder: Path, times: int) -> float:
    """The least of several times, which means the same on a busy machine."""
    simclr = str(Path(sys.executable).with_name("simclr"))
    seconds = []
    for _ in range(times):
        child = subprocess.Popen(
            [simclr, *arguments], stdout=subprocess.DEVNULL, env=os.environ | {"SIMCLR_STORE": str(folder)}
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    return min(seconds)


@pytest.mark.parametrize("command", ["run", "status"])
def test_what_is_up_to_date_is_known_within_half_a_second(
    many: Path, made: Path, command: str, tally: Tally, is_whole: bool, request: pytest.FixtureRequest
) -> None:
    times = 5 if is_whole else 3
    seconds = processor_seconds([command, str(made / "small.yaml")], many, times)
    spread = request.node.callspec.id.removesuffix(f"-{command}")
    note = f"{command} with {VERSIONS:,} versions {spread}: {seconds:.2f} s"
    tally.add("cost-versions", tried=1, held=int(seconds < LIMIT_SECONDS), note=note)
    assert seconds < LIMIT_SECONDS, f"the quickest of {times} took {seconds:.2f} s"


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["gc"], ["show", "small/shards"]], ids=" ".join)
def test_all_versions_are_read_within_a_sane_time(many: Path, arguments: list[str], is_whole: bool) -> None:
    times = 2 if is_whole else 1
    seconds = processor_seconds(arguments, many, times)
    assert seconds < LIST_SECONDS, f"the quickest of {times} took {seconds:.2f} s"


def test_they_are_versions_as_the_store_makes_them(many: Path) -> None:
    store = open_store(many)
    versions = [*store.all_versions()]
    assert len(versions) >= VERSIONS
    for version in versions[:: VERSIONS // 10]:
        assert store.verify_version(version) == []
        assert store.current(version.stage, version.key) is not None
        assert sha256_file(store.build(version.stage, version.digest) / MANIFEST) == version.digest
