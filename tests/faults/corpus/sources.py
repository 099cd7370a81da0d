"""Hostile images and lists of them: what a stage shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import hostile_files as files
from faults.corpus.inputs import Command, Hostile
from faults.corpus.tars import TARS
from faults.hostile_files import member, png, tar
from faults.world import World


def _tar(make: Callable[[Path], bytes]) -> Callable[[World], Command]:
    def bring(world: World) -> Command:
        world.write("evil.tar", make(world.canary))
        return shard(world, "wds:evil.tar")

    return bring


def shard(world: World, source: str, **settings: Any) -> Command:
    """A recipe that shards a source."""
    step = {"stage": "shard", "source": source, "test_fraction": 0, "near_duplicates": False, "workers": 1} | settings
    world.write("one.yaml", json.dumps({"name": "one", "steps": {"shards": step}}))
    return ["run", "one.yaml"]


def _source(source: str, **settings: Any) -> Callable[[World], Command]:
    return lambda world: shard(world, source.format(canary=world.canary), **settings)


def _file(name: str, make: Callable[[Path], bytes], source: str, **settings: Any) -> Callable[[World], Command]:
    """A file of that name, and the source that it is, or is in."""

    def bring(world: World) -> Command:
        world.write(name, make(world.canary))
        return shard(world, source, **settings)

    return bring


def _json_too_deep(world: World) -> Command:
    world.write("evil.tar", tar(member("a.png", png()), member("a.json", b'{"x":' + b"[" * 100_000)))
    return shard(world, "wds:evil.tar", columns={"label": "json.x"})


def _not_an_array(world: World) -> Command:
    world.write("evil.tar", tar(member("a.npy", files.npy_of_objects(world.canary)), member("a.cls", b"1")))
    return shard(world, "wds:evil.tar", columns={"image": "npy"})


def _parquet(make: Callable[[World, Path], None]) -> Callable[[World], Command]:
    def bring(world: World) -> Command:
        make(world, world.here / "evil.parquet")
        return shard(world, "parquet:evil.parquet")

    return bring


def _set_of_torchvision(name: str, path: str, make: Callable[[Path], bytes]) -> Callable[[World], Command]:
    def bring(world: World) -> Command:
        for one in path.split():
            world.write(f"sets/{one}", make(world.canary))
        return shard(world, f"torchvision:{name}", download_folder="sets")

    return bring


def _csv(cell: str) -> Callable[[Path], bytes]:
    return lambda _: f'path,label\nimages/stone/0.png,a\n"{cell}",b\n'.encode()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch CANARY) (w) file closefile\nshowpage\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def make_sources() -> list[Hostile]:
    found = [Hostile(f"tar: {name}", _tar(make), ("evil.tar", *told)) for name, (make, told) in TARS.items()]
    found += [
        Hostile(
            "tar: json that nests too deep, as label", _json_too_deep, ("evil.tar, sample a", "json cannot be read")
        ),
        Hostile("tar: npy of objects, as image", _not_an_array, ("evil/a.npy", "not an image")),
        Hostile("url: wds:pipe:", _source("wds:pipe:touch {canary}"), ("one.yaml", "shards.source", "no command")),
        Hostile("url: wds:file:", _source("wds:file:/etc/passwd"), ("one.yaml", "shards.source", "no URL")),
        Hostile("url: wds:http:", _source("wds:http://127.0.0.1:9/a.tar"), ("one.yaml", "shards.source", "no URL")),
        Hostile("url: csv:pipe:", _source("csv:pipe:touch {canary}"), ("one.yaml", "shards.source", "no command")),
        Hostile("url: parquet:s3:", _source("parquet:s3://a/b.parquet"), ("one.yaml", "shards.source", "no URL")),
        Hostile("url: folder:file:", _source("folder:file:///etc"), ("one.yaml", "shards.source", "no URL")),
        Hostile("url: pipe:", _source("pipe:touch {canary}"), ("one.yaml", "shards.source", "write folder:PATH")),
    ]
    cells = {
        "above": ("../../../etc/passwd", "leads out of the folder"),
        "above, further on": ("images/../../evil.png", "leads out of the folder"),
        "absolute": ("/etc/passwd", "leads out of the folder"),
        "with a zero": ("images/\0.png", "leads out of the folder"),
    }
    found += [
        Hostile(f"csv: a path {name}", _file("evil.csv", _csv(cell), "csv:evil.csv"), ("evil.csv, line 3: path", told))
        for name, (cell, told) in cells.items()
    ]
    for cell in ("pipe:touch evil", "file:///etc/passwd", "http://127.0.0.1:9/a.png"):
        bring = _file("evil.csv", _csv(cell), "csv:evil.csv")
        found.append(
            Hostile(f"csv: {cell.partition(':')[0]}: as path", bring, (cell.partition(":")[0], "cannot be opened"))
        )
    found += [
        Hostile(
            "csv: a cell of a megabyte", _file("evil.csv", _csv("x" * 2**20), "csv:evil.csv"), ("evil.csv", "field")
        ),
        Hostile("csv: a pickle", _file("evil.csv", files.pickled, "csv:evil.csv"), ("evil.csv", "is not UTF-8")),
        Hostile(
            "csv: a .bin of torch.save", _file("evil.bin", files.torch_saved, "csv:evil.bin"), ("evil.bin", "not UTF-8")
        ),
        Hostile(
            "parquet: a path above",
            _parquet(lambda _, path: files.parquet_of_paths(path, ["images/stone/0.png", "../../etc/passwd"])),
            ("evil.parquet, row 1: path", "leads out of the folder"),
        ),
        Hostile(
            "parquet: an absolute path",
            _parquet(lambda _, path: files.parquet_of_paths(path, ["/etc/passwd"])),
            ("evil.parquet, row 0: path", "leads out of the folder"),
        ),
        Hostile(
            "parquet: a type that is a pickle",
            _parquet(lambda world, path: files.parquet_with_pickled_type(path, world.canary)),
            ("evil.parquet", "column 'image'"),
        ),
        Hostile("parquet: a pickle", _file("evil.pkl", files.pickled, "parquet:evil.pkl"), ("evil.pkl", "as Parquet")),
        Hostile(
            "parquet: an .npz", _file("evil.npz", files.npz_of_objects, "parquet:evil.npz"), ("evil.npz", "as Parquet")
        ),
        Hostile(
            "folder: an .npy", _file("evil.npy", files.npy_of_objects, "folder:evil.npy"), ("evil.npy", "is a file")
        ),
    ]
    images: dict[str, Callable[[Path], bytes]] = {
        "a pickle": files.pickled,
        "a file of torch.save": files.torch_saved,
        "an .npy of objects": files.npy_of_objects,
        "PostScript": lambda canary: POSTSCRIPT.replace(b"CANARY", str(canary).encode()),
        "HTML": lambda _: b"<html><script>alert(1)</script></html>",
        "SVG": lambda _: SVG,
    }
    found += [
        Hostile(
            f"folder: {name} named .png", _file("set/a/evil.png", make, "folder:set"), ("a/evil.png", "not an image")
        )
        for name, make in images.items()
    ]
    cifar = " ".join(
        f"cifar-10-batches-py/{name}"
        for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6)))
    )
    found += [
        Hostile(
            "torchvision: CIFAR10 of pickles", _set_of_torchvision("CIFAR10", cifar, files.pickled), ("CIFAR10", "sets")
        ),
        Hostile(
            "torchvision: MNIST of torch.save",
            _set_of_torchvision("MNIST", "MNIST/processed/training.pt MNIST/processed/test.pt", files.torch_saved),
            ("torchvision:MNIST", "looked in sets"),
        ),
        Hostile(
            "torchvision: LSUN",
            _set_of_torchvision("LSUN", "_cache_", files.pickled),
            ("torchvision:LSUN", "unpickles"),
        ),
    ]
    return found
