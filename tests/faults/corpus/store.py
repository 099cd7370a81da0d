"""Hostile names, records and manifests of a store, and words that are given on the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import hostile_files as files
from faults.corpus.forging import EMBED, SEARCH
from faults.corpus.inputs import Command, Hostile
from faults.world import World, change_json, link_or_fail


def make_names() -> list[Hostile]:
    above = "../../../../../../etc"

    def name(**values: Any) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            change_json(world.name("simclr"), **values)
            return ["show", "toy/simclr"]

        return bring

    def record(**values: Any) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            world.forge_record("simclr", **values)
            return EMBED

        return bring

    def in_place_of(find: Callable[[World], Path], content: bytes, command: Command) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            find(world).write_bytes(content)
            return command

        return bring

    def cycle(world: World) -> Command:
        version = world.version("simclr")
        world.forge_record("simclr", input_runs=[[version.stage, version.key, version.digest]])
        return ["log", "toy/simclr"]

    def changed(world: World) -> Command:
        path = world.record("simclr")
        path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1'))
        return ["show", "toy/simclr"]

    def current(world: World) -> Command:
        change_json(world.record("shards").with_name("current.json"), digest=above)
        return ["run", "toy.yaml", "shards"]

    latest: Callable[[World], Path] = lambda world: world.name("simclr")  # noqa: E731
    stamp: Callable[[World], Path] = lambda world: world.store.path / "format.json"  # noqa: E731
    deep = b"[" * 100_000
    cases: list[tuple[str, Callable[[World], Command], tuple[str, ...]]] = [
        ("name: a stage above", name(stage=above), ("simclr/latest", "stage")),
        ("name: a key above", name(key=above), ("simclr/latest", "key")),
        ("name: a digest that is a path", name(digest="/etc/passwd"), ("simclr/latest", "digest")),
        ("name: of another step", name(step="probe"), ("simclr/latest", "step")),
        ("name: an unknown field", name(run="os.system"), ("simclr/latest", "run")),
        ("name: no number", name(number="1; x"), ("simclr/latest", "number")),
        ("name: nests too deep", in_place_of(latest, deep, ["ls"]), ("simclr/latest", "nests too deep")),
        ("name: a pickle", in_place_of(latest, b"\x80\x04cos\nsystem\n", EMBED), ("simclr/latest", "cannot be read")),
        ("record: changed", changed, ("runs/pretrain", "sha256")),
        ("record: an unknown field", record(run="os.system"), ("runs/pretrain", "run")),
        ("record: a stage above", record(stage=above), ("runs/pretrain", "stage")),
        ("record: an input above", record(input_runs=[["../..", "0" * 64, "0" * 64]]), ("runs/pretrain", "stage")),
        ("record: settings that are none", record(settings=["x"]), ("runs/pretrain", "settings")),
        ("record: attempts that are none", record(attempts=["x"]), ("runs/pretrain", "attempts")),
        ("record: an unknown version", record(stage_version="x"), ("runs/pretrain", "stage_version")),
        ("record: made of itself", cycle, ("runs/pretrain", "input_runs")),
        ("current.json: a digest above", current, ("current.json", "digest")),
        ("format.json: a later format", in_place_of(stamp, b'{"format": 99}', ["ls"]), ("artifacts", "format 99")),
        ("format.json: no number", in_place_of(stamp, b'{"format": "os"}', ["ls"]), ("format.json", "format")),
        ("format.json: nests too deep", in_place_of(stamp, deep, ["status", "toy.yaml"]), ("format.json",)),
    ]
    return [Hostile(name, bring, told, needs_store=True) for name, bring, told in cases]


def make_manifests() -> list[Hostile]:
    def forged(change: Callable[[dict[str, Any]], Any]) -> Callable[[World], Command]:
        """The manifest of an artifact is another, and everything knows its digest."""

        def bring(world: World) -> Command:
            world.forge_manifest("simclr", change)
            return EMBED

        return bring

    def wrong(world: World) -> Command:
        path = world.files("simclr") / "model.json"
        path.write_bytes(path.read_bytes().replace(b"resnet10", b"resnet99"))
        return EMBED

    def digest(world: World) -> Command:
        path = world.files("simclr").with_name("manifest.json")
        path.write_bytes(path.read_bytes().replace(b'"size":', b'"size": '))
        return ["verify", "toy/simclr"]

    def link(world: World) -> Command:
        shutil.move(world.files("simclr") / "model.json", world.top / "home" / "model.json")
        link_or_fail(str(world.top / "home" / "model.json"), world.files("simclr") / "model.json")
        return EMBED

    def folder(world: World) -> Command:
        shutil.move(world.files("simclr"), world.top / "home" / "files")
        link_or_fail(str(world.top / "home" / "files"), world.files("simclr"))
        return ["verify", "toy/simclr"]

    def extra(world: World) -> Command:
        (world.files("simclr") / "evil.pth").write_bytes(files.torch_saved(world.canary))
        return EMBED

    some = {"size": 1, "sha256": "0" * 64}
    cases: list[tuple[str, Callable[[World], Command], tuple[str, ...]]] = [
        (
            "a file above",
            forged(lambda one: one["files"].update({"../../../x": some})),
            ("manifest.json", "'../../../x'"),
        ),
        (
            "an absolute file",
            forged(lambda one: one["files"].update({"/etc/passwd": some})),
            ("manifest.json", "/etc/passwd"),
        ),
        ("an unknown version", forged(lambda one: one.update(version=2)), ("manifest.json", "'version'")),
        ("sizes that are none", forged(lambda one: one["files"].update({"x": 5})), ("manifest.json", "'x'", "size")),
        ("files that are none", forged(lambda one: one.update(files=[1])), ("manifest.json", "files")),
        ("a wrong digest of a file", wrong, ("model.json", "has other content")),
        ("a wrong digest of its own", digest, ("manifest.json", "digest")),
        ("a file that is a link", link, ("model.json", "is a link")),
        ("a folder that is a link", folder, ("model.json", "is a link")),
        ("a file that it does not know", extra, ("evil.pth", "is not in the manifest")),
    ]
    return [Hostile(f"manifest: {name}", bring, told, needs_store=True) for name, bring, told in cases]


def make_words() -> list[Hostile]:
    """What is given on the command line."""
    return [
        Hostile("alias: a path above", lambda _: ["tag", "toy/simclr", "../../evil"], ("../../evil", "alias"), True),
        Hostile(
            "reference: a path above", lambda _: ["show", "../../etc/passwd"], ("../../etc/passwd", "no artifact"), True
        ),
        Hostile(
            "reference: a file", lambda _: ["embed", "./evil.pth", "images", "--out", "o.parquet"], ("evil.pth",), True
        ),
        Hostile("gallery: a file of numpy", _gallery, ("evil.npy", "no artifact"), True),
        Hostile("folder: images that are pickles, embedded", _embedded, ("set", "can be read", "evil.png"), True),
        Hostile("query: a pickle", _query, ("evil.png", "not an image"), True),
    ]


def _gallery(world: World) -> Command:
    world.write("evil.npy", files.npy_of_objects(world.canary))
    return [*SEARCH, "evil.npy"]


def _embedded(world: World) -> Command:
    world.write("set/evil.png", files.pickled(world.canary))
    return ["embed", "toy/simclr", "set", "--out", "out.parquet"]


def _query(world: World) -> Command:
    world.write("evil.png", files.pickled(world.canary))
    return ["search", "toy/simclr", "evil.png", "--gallery", "images"]
