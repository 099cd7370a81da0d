"""Hostile inputs, each with the command by which it would come in and the words by which it has to be refused."""

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from faults import hostile_files as files
from faults.hostile_files import entry, member, pax, png, safetensors, tar
from faults.world import LONGER, World, change_json, link_or_fail

Command = list[str]


@dataclass(frozen=True)
class Hostile:
    """An input that must not get in.

    Attributes:
        bring: writes it and gives the command by which a user would bring it in.
        told: words that the refusal has to have: the file and the field.
        needs_store: a recipe has to have run before.
    """

    name: str
    bring: Callable[[World], Command]
    told: tuple[str, ...]
    needs_store: bool = False


# Tars, by source wds:

GOOD = member("good.png", png()) + member("good.cls", b"1")
TARS: dict[str, tuple[Callable[[Path], bytes], tuple[str, ...]]] = {
    "a name above the folder": (
        lambda _: tar(GOOD, member("../../evil.png", png())),
        ("'../../evil.png'", "leads out"),
    ),
    "a name above, further on": (
        lambda _: tar(GOOD, member("a/../../evil.png", png())),
        ("a/../../evil.png", "leads out"),
    ),
    "an absolute name": (lambda _: tar(GOOD, member("/tmp/evil.png", png())), ("'/tmp/evil.png'", "leads out")),
    "a name above in a pax header": (
        lambda _: tar(GOOD, pax({"path": "../evil.png"}), member("a.png", png())),
        ("'../evil.png'", "leads out"),
    ),
    "a link to a file outside": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.SYMTYPE, link="/etc/passwd")),
        ("'a.png'", "a link"),
    ),
    "a hard link to a file outside": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.LNKTYPE, link="../../etc/passwd")),
        ("'a.png'", "a link"),
    ),
    "a character device": (lambda _: tar(GOOD, member("a.png", kind=tarfile.CHRTYPE)), ("'a.png'", "a device")),
    "a block device": (lambda _: tar(GOOD, member("a.png", kind=tarfile.BLKTYPE)), ("'a.png'", "a device")),
    "a pipe": (lambda _: tar(GOOD, member("a.png", kind=tarfile.FIFOTYPE)), ("'a.png'", "a pipe")),
    "a kind that nobody knows": (lambda _: tar(GOOD, member("a.png", kind=b"Z")), ("'a.png'", "no plain file")),
    "a sparse file of GNU": (
        lambda _: tar(GOOD, member("a.png", kind=tarfile.GNUTYPE_SPARSE)),
        ("'a.png'", "a sparse file"),
    ),
    "a sparse file of a petabyte in pax": (
        lambda _: tar(GOOD, pax({"GNU.sparse.size": str(2**50), "GNU.sparse.numblocks": "0"}), member("a.png", png())),
        ("'a.png'", "a sparse file"),
    ),
    "sparse numbers that are none": (
        lambda _: tar(GOOD, pax({"GNU.sparse.map": "0,1024,x"}), member("a.png", png())),
        ("cannot be read as a tar", "'x'"),
    ),
    "a size in pax beyond the tar": (
        lambda _: tar(GOOD, pax({"size": str(2**62)}), member("a.png", png())),
        ("'a.png'", "the tar ends before"),
    ),
    "a size in pax below zero": (
        lambda _: tar(GOOD, pax({"size": "-1024"}), member("a.png", png())),
        ("'a.png'", "-1,024 bytes"),
    ),
    "a size below zero, which goes in a circle": (
        lambda _: tar(GOOD, member("a.png", size=-1024)),
        ("'a.png'", "-1,024 bytes"),
    ),
    "a size beyond the tar": (lambda _: tar(GOOD, member("a.png", size=2**62)), ("'a.png'", "the tar ends before")),
    "a pax header longer than memory": (
        lambda _: tar(GOOD, member("pax", kind=tarfile.XHDTYPE, size=2**62)),
        ("cannot be read as a tar", "MemoryError"),
    ),
    "a long name longer than memory": (
        lambda _: tar(GOOD, member("name", kind=tarfile.GNUTYPE_LONGNAME, size=2**62)),
        ("cannot be read as a tar", "MemoryError"),
    ),
    "a pax header of less than nothing": (
        lambda _: tar(GOOD, member("pax", kind=tarfile.XHDTYPE, size=-1024)),
        ("cannot be read as a tar", "non-negative"),
    ),
    "long names within one another": (
        lambda _: tar(GOOD, member("name", b"a.png\0", tarfile.GNUTYPE_LONGNAME) * 3000, member("a.png", png())),
        ("cannot be read as a tar", "recursion"),
    ),
    "a member twice": (lambda _: tar(GOOD, member("good.cls", b"2")), ("'good.cls'", "stands twice")),
    "a key in two places": (
        lambda _: tar(GOOD, member("other.png", png()), member("good.json", b"{}")),
        ("'good.json'", "stands twice"),
    ),
    "a member named .pyd": (
        lambda canary: tar(GOOD, member("good.pyd", files.pickled(canary))),
        ("'good.pyd'", "is a pickle"),
    ),
    "a member named .pickle": (
        lambda canary: tar(GOOD, member("good.pickle", files.pickled(canary))),
        ("'good.pickle'", "is a pickle"),
    ),
    "a member named .pkl": (
        lambda canary: tar(GOOD, member("good.pkl", files.pickled(canary))),
        ("'good.pkl'", "is a pickle"),
    ),
    "a member named .pth": (
        lambda canary: tar(GOOD, member("good.pth", files.torch_saved(canary))),
        ("'good.pth'", "is a pickle"),
    ),
    "a member named .PT": (
        lambda canary: tar(GOOD, member("good.PT", files.torch_saved_before(canary))),
        ("'good.PT'", "is a pickle"),
    ),
    "a second tar behind the end": (
        lambda canary: tar(GOOD) + tar(member("evil.pyd", files.pickled(canary))),
        ("is damaged, or several tars in one",),
    ),
    "a file of torch.save in its place": (files.torch_saved, ("cannot be read as a tar",)),
    "a pickle in its place": (files.pickled, ("cannot be read as a tar",)),
}


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


def _sources() -> list[Hostile]:
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


# Recipes


def _recipe(text: str) -> Callable[[World], Command]:
    def bring(world: World) -> Command:
        world.write("evil.yaml", text.replace("CANARY", str(world.canary)))
        return ["run", "evil.yaml"]

    return bring


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
STEPS = 'name: evil\nsteps:\n  shards: {stage: shard, source: "folder:images"}\n'
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a call of os.system": (
        "steps: !!python/object/apply:os.system ['touch CANARY']\n",
        ("python/object/apply:os.system", "line 1"),
    ),
    "a call of subprocess": (
        "name: x\nsteps: !!python/object/apply:subprocess.Popen [['touch', 'CANARY']]\n",
        ("subprocess.Popen", "line 2"),
    ),
    "an object of Python": ("steps: !!python/object/new:os.system ['touch CANARY']\n", ("python/object/new", "line 1")),
    "a name of Python": ("name: !!python/name:os.system\nsteps: {}\n", ("python/name:os.system", "line 1")),
    "a module of Python": ("name: !!python/module:os\nsteps: {}\n", ("python/module:os", "line 1")),
    "a tag of its own": ("steps: !exec 'touch CANARY'\n", ("!exec", "line 1")),
    "a bomb of aliases": (f"{BOMB}steps: *a8\n", ("values", "line")),
    "an alias within itself": ("steps: &a {x: *a}\n", ("stands within what it means", "line 1")),
    "100,000 lists within one another": (f"steps: {'[' * 100_000}", ("nests more than", "line 1")),
    "a key twice": (f"{STEPS}steps: {{}}\n", ("key stands twice: steps",)),
    "an import path as stage": ("steps: {x: {stage: os.system}}\n", ("x.stage", "no stage 'os.system'")),
    "a file as stage": ("steps: {x: {stage: ../../evil.py}}\n", ("x.stage", "no stage")),
    "an import path as loss": (
        f"{STEPS}  x: {{stage: finetune, shards: shards, encoder: random, loss: {{name: torch.hub.load}}}}\n",
        ("x.loss.name", "torch.hub.load"),
    ),
    "an import path as optimiser": (
        f"{STEPS}  x: {{stage: pretrain, shards: shards, views: shards, optimiser: {{name: os.system}}}}\n",
        ("x.optimiser.name", "os.system"),
    ),
    "an import path as tracker": (
        f"{STEPS}  v: {{stage: augment, shards: shards}}\n"
        "  x: {stage: pretrain, shards: shards, views: v, trackers: ['os.system']}\n",
        ("x.trackers", "os.system"),
    ),
    "an import path as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, architecture: {{backbone: os.system}}}}\n",
        ("x: no backbone 'os.system'",),
    ),
    "a repository as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, "
        "architecture: {backbone: 'timm:hf_hub:e/x'}}\n",
        ("x: no backbone 'timm:hf_hub:e/x'",),
    ),
    "a folder as backbone": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: random, "
        "architecture: {backbone: 'timm:local-dir:/tmp'}}\n",
        ("x: no backbone 'timm:local-dir:/tmp'",),
    ),
    "a repository as encoder": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: 'timm:hf-hub:evil/x'}}\n",
        ("x", "timm:hf-hub:evil/x"),
    ),
    "weights as encoder": (
        f"{STEPS}  x: {{stage: embed, shards: shards, encoder: ../evil.pth}}\n",
        ("x.encoder", "../evil.pth"),
    ),
    "a name above": (STEPS.replace("evil", "../../evil"), ("name", "'../../evil'")),
    "a step with a name above": (STEPS.replace("  shards:", "  ../../x:"), ("../../x", "name of a step")),
    "an unknown field": (f"{STEPS}import: os\n", ("import", "name, seed and steps only")),
    "an unknown setting": (STEPS.replace("source", "command"), ("shards.command", "no such setting")),
}


def _recipes() -> list[Hostile]:
    found = [Hostile(f"recipe: {name}", _recipe(text), told) for name, (text, told) in RECIPES.items()]

    def binary(name: str, make: Callable[[Path], bytes]) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            world.write(name, make(world.canary))
            return ["run", name]

        return bring

    tagged = "shards.labels=!!python/object/apply:os.system ['touch x']"
    return [
        *found,
        Hostile("recipe: a pickle", binary("evil.pkl", files.pickled), ("evil.pkl", "not a YAML file")),
        Hostile("recipe: a file of torch.save", binary("evil.pt", files.torch_saved), ("evil.pt", "not a YAML file")),
        Hostile(
            "recipe: a tag on the command line",
            lambda _: ["run", "toy.yaml", "--set", tagged],
            ("--set shards.labels",),
        ),
    ]


# A store from elsewhere, where every hash fits

EMBED = ["embed", "toy/simclr", "images", "--out", "out.parquet"]
SEARCH = ["search", "toy/simclr", "images/stone/0.png", "--gallery"]
AUGMENT = ["run", "toy.yaml", "views", "--set", "views.contact_sheet_images=16"]
PROBE = ["run", "toy.yaml", "probe", "--set", "probe.bootstrap_samples=101"]
PRETRAIN = ["run", "toy.yaml", "simclr", "--set", "simclr.temperature=0.3"]


def _forged(step: str, edit: Callable[[Path, Path], Any], command: Command) -> Callable[[World], Command]:
    """The files of a step are changed, and then read."""

    def bring(world: World) -> Command:
        world.forge(step, lambda folder: edit(folder, world.canary))
        return command

    return bring


def _put(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], Any]:
    return lambda folder, canary: (folder / name).write_bytes(make(canary))


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Any]:
    return lambda folder, _: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _set(name: str, **values: Any) -> Callable[[Path, Path], Any]:
    return lambda folder, _: change_json(folder / name, **values)


def _column(name: str, column: str, value: Any) -> Callable[[Path, Path], Any]:
    """The first cell of a column of a Parquet file is another."""

    def edit(folder: Path, _: Path) -> None:
        table = pq.read_table(folder / name)
        cells = [value, *table[column].to_pylist()[1:]]
        kind = table.schema.field(column).type
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, table.schema.field(column), pa.array(cells, kind)), folder / name)

    return edit


HEADERS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a pickle": (files.pickled, "no safetensors"),
    "a file of torch.save": (files.torch_saved, "no safetensors"),
    "a file of an older torch.save": (files.torch_saved_before, "no safetensors"),
    "an .npy of objects": (files.npy_of_objects, "no safetensors"),
    "an .npz of objects": (files.npz_of_objects, "no safetensors"),
    "a header longer than the file": (lambda _: safetensors({"a": entry(0, 8)}, bytes(8), 2**60), "no safetensors"),
    "a header of 90 megabytes": (lambda _: safetensors(b"{}" + b" " * 90_000_000, b""), "no safetensors"),
    "tensors over one another": (
        lambda _: safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "invalid offset",
    ),
    "a tensor beyond the file": (lambda _: safetensors({"a": entry(0, 800)}, bytes(8)), "not fully covered"),
    "a size that overflows": (
        lambda _: safetensors({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
        "overflow",
    ),
    "a shape below zero": (
        lambda _: safetensors({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, bytes(8)),
        "-2",
    ),
    "objects": (
        lambda _: safetensors({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        "unknown variant",
    ),
    "bytes that nobody names": (lambda _: safetensors({"a": entry(0, 8)}, bytes(16)), "not fully covered"),
    "a header that nests too deep": (lambda _: safetensors(b'{"a":' + b"[" * 100_000, b""), "recursion"),
    "a header that is no object": (lambda _: safetensors(b"[]", b""), "no JSON object"),
}


def _weights() -> list[Hostile]:
    name = "encoder.safetensors"
    found = [
        Hostile(f"weights: {what}", _forged("simclr", _put(name, make), EMBED), (name, told), needs_store=True)
        for what, (make, told) in HEADERS.items()
    ]
    changes = {
        "a name twice": (_rewrite(name, files.doubled), (name, "stands twice")),
        "a field that means nothing": (_rewrite(name, files.with_field), (name, "says other things")),
        "of another model": (
            _put(name, lambda _: safetensors({"../../x": entry(0, 8)}, bytes(8))),
            (name, "does not fit the model"),
        ),
    }
    cards: dict[str, tuple[dict[str, Any], str]] = {
        "an unknown field": ({"import": "os.system"}, "import"),
        "another format": ({"format": 99}, "format"),
        "an import path as backbone": (
            {"architecture": {"backbone": "os.system", "width": 64, "small_stem_up_to": 64, "pretrained": False}},
            "no backbone 'os.system'",
        ),
        "a repository as backbone": (
            {"architecture": {"backbone": "timm:hf_hub:e/x", "width": 64, "small_stem_up_to": 64, "pretrained": True}},
            "no backbone 'timm:hf_hub:e/x'",
        ),
        "more parameters": ({"parameters": 10**12}, "parameters"),
        "another embedding size": ({"embedding_size": 2**40}, "embedding_size"),
    }
    found += [
        Hostile(f"weights: {what}", _forged("simclr", edit, EMBED), told, needs_store=True)
        for what, (edit, told) in changes.items()
    ]
    found += [
        Hostile(
            f"model.json: {what}",
            _forged("simclr", _set("model.json", **values), EMBED),
            ("model.json", told),
            needs_store=True,
        )
        for what, (values, told) in cards.items()
    ]
    for backbone, file in (("resnet18", "resnet18-f37072fd.pth"), ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth")):
        told = (file, "pretrained: /", f"holds no weights of {backbone}")
        found.append(Hostile(f"torch's cache: {backbone}", _cached(backbone, file), told, needs_store=True))
    return found


def _cached(backbone: str, file: str) -> Callable[[World], Command]:
    """Weights in the cache of torch.hub, where torchvision would take them from."""

    def bring(world: World) -> Command:
        place = world.top / "home" / "torch" / "hub" / "checkpoints"
        place.mkdir(parents=True)
        (place / file).write_bytes(files.torch_saved_before(world.canary))
        architecture = f"simclr.architecture={{backbone: {backbone}, pretrained: true, small_stem_up_to: 0}}"
        return ["run", "toy.yaml", "simclr", "--set", architecture]

    return bring


def _artifacts() -> list[Hostile]:
    objects = _put("index.faiss", files.pickled)
    rows = "gallery.parquet"

    def indexed(**values: Any) -> Callable[[Path, Path], Any]:
        def edit(folder: Path, _: Path) -> None:
            card = json.loads((folder / "metrics.json").read_text())
            change_json(folder / "metrics.json", index=card["index"] | values)

        return edit

    def of(
        step: str, command: Command, *cases: tuple[str, Callable[[Path, Path], Any], tuple[str, ...]]
    ) -> list[Hostile]:
        return [Hostile(name, _forged(step, edit, command), told, needs_store=True) for name, edit, told in cases]

    return [
        *of(
            "shards",
            AUGMENT,
            ("shards.json: another format", _set("shards.json", format=99), ("shards.json", "format 99")),
            ("shards.json: nests too deep", _put("shards.json", lambda _: b"[" * 100_000), ("shards.json",)),
            ("shards.json: a pickle", _put("shards.json", files.pickled), ("shards.json",)),
            (
                "shards.json: classes that are no texts",
                _set("shards.json", classes=[{"a": 1}]),
                ("shards.json", "classes"),
            ),
            (
                "shards.json: images larger than memory",
                _set("shards.json", splits={"train": {"samples": 12, "max_height": 2**50, "max_width": 1}}),
                ("shards.json", "splits.train.max_height"),
            ),
            (
                "index: a shard above",
                _column("index.parquet", "shard", "../../../x"),
                ("index.parquet", "shard: '../../../x'"),
            ),
            (
                "index: a shard elsewhere",
                _column("index.parquet", "shard", "/etc/passwd"),
                ("index.parquet", "/etc/passwd"),
            ),
            (
                "index: a format that is a pickle",
                _column("index.parquet", "format", "pyd"),
                ("index.parquet", "format: 'pyd'"),
            ),
            (
                "index: an image larger than its split",
                _column("index.parquet", "height", 2**30),
                ("index.parquet", "height"),
            ),
            ("index: a label that is none", _column("index.parquet", "label", 77), ("index.parquet", "label")),
            ("index: an offset below zero", _column("index.parquet", "offset", -(2**40)), ("index.parquet", "offset")),
            ("index: a pickle", _put("index.parquet", files.pickled), ("index.parquet", "cannot read")),
            (
                "shard: an .npy of objects as image",
                _npy_in_shard,
                (".tar: sample 0", "is damaged", "cannot be decoded"),
            ),
        ),
        *of(
            "features",
            PROBE,
            ("features.json: another format", _set("features.json", format=99), ("features.json", "format")),
            (
                "features.json: a dimension that is none",
                _set("features.json", dimension="x"),
                ("features.json", "dimension"),
            ),
            ("features.json: another dimension", _set("features.json", dimension=3), ("features.parquet", "features")),
            ("features.json: nests too deep", _put("features.json", lambda _: b"[" * 100_000), ("features.json",)),
            ("features: a pickle", _put("features.parquet", files.pickled), ("features.parquet", "cannot read")),
            ("features: an .npy of objects", _put("features.parquet", files.npy_of_objects), ("features.parquet",)),
        ),
        *of(
            "found",
            [*SEARCH, "toy/found"],
            ("vector index: a pickle", objects, ("index.faiss", "IHNf")),
            (
                "vector index: cut short",
                _rewrite("index.faiss", lambda old: old[:200]),
                ("index.faiss", "cannot read it"),
            ),
            (
                "vector index: more vectors than memory",
                _rewrite("index.faiss", lambda old: old[:8] + (2**60).to_bytes(8, "little") + old[16:]),
                ("index.faiss",),
            ),
            (
                "vector index: of another kind",
                _rewrite("index.faiss", lambda old: b"IxPT" + old[4:]),
                ("index.faiss", "IHNf"),
            ),
            (
                "vectors: a pickle",
                _put("vectors.safetensors", files.pickled),
                ("vectors.safetensors", "no safetensors"),
            ),
            ("vectors: a name twice", _rewrite("vectors.safetensors", files.doubled), ("vectors.safetensors", "twice")),
            ("rows of an index: a pickle", _put(rows, files.pickled), (rows, "cannot read")),
            ("metrics.json: an import path as index", indexed(kind="os.system"), ("metrics.json", "index.kind")),
            (
                "metrics.json: an effort without end",
                indexed(parameters={"efSearch": 2**60}),
                ("metrics.json", "efSearch"),
            ),
        ),
        *of(
            "views",
            PRETRAIN,
            ("policy.json: an unknown field", _set("policy.json", run="os.system"), ("policy.json", "run")),
            ("policy.json: a pickle", _put("policy.json", files.pickled), ("policy.json",)),
        ),
    ]


def _npy_in_shard(folder: Path, canary: Path) -> None:
    """The bytes of an image become an array of objects, with a hash that fits."""
    table = pq.read_table(folder / "index.parquet")
    row = table.slice(0, 1).to_pylist()[0]
    content = files.npy_of_objects(canary)
    shard_file = folder / row["shard"]
    old = shard_file.read_bytes()
    shard_file.write_bytes(old[: row["offset"]] + content + old[row["offset"] + len(content) :])
    for column, value in (("size", len(content)), ("format", "npy"), ("xxh3", xxhash.xxh3_64_intdigest(content))):
        _column("index.parquet", column, value)(folder, canary)


def _names() -> list[Hostile]:
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


def _manifests() -> list[Hostile]:
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


def _checkpoints() -> list[Hostile]:
    name = "state.safetensors"

    def forged(edit: Callable[[Path, Path], Any]) -> Callable[[World], Command]:
        def bring(world: World) -> Command:
            world.forge_checkpoints(lambda folder: edit(folder, world.canary))
            return LONGER

        return bring

    def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], Any]:
        def edit(folder: Path, _: Path) -> None:
            data = json.loads((folder / "state.json").read_text())
            change(data)
            (folder / "state.json").write_text(json.dumps(data))

        return edit

    def without_weights(data: dict[str, Any]) -> None:
        """The parts of the state have other names."""
        parts = next(value for key, value in data["state"]["dict"] if key == "state")
        parts["dict"] = [[f"x{key}", value] for key, value in parts["dict"]]

    chosen = (
        "a pickle",
        "a file of torch.save",
        "tensors over one another",
        "a header longer than the file",
        "objects",
    )
    cases = [(what, _put(name, HEADERS[what][0]), (name,)) for what in chosen]
    cases += [
        ("a state that nests too deep", _put("state.json", lambda _: b"[" * 100_000), ("state.json", "nests too deep")),
        ("a state that is a pickle", _put("state.json", files.pickled), ("state.json",)),
        ("another format", state(lambda data: data.update(format=99)), ("checkpoints", "format 99")),
        ("another step", state(lambda data: data.update(step=10**9)), ("state.json", "step")),
        (
            "a tensor that is not there",
            state(lambda data: data.update(state={"tensor": "../x"})),
            ("state.json", "../x"),
        ),
        ("another model", state(without_weights), ("state.json", "does not fit this training")),
    ]
    return [Hostile(f"checkpoint: {what}", forged(edit), told, needs_store=True) for what, edit, told in cases]


def _words() -> list[Hostile]:
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


CORPUS = [
    *_sources(), *_recipes(), *_weights(), *_artifacts(), *_names(), *_manifests(), *_checkpoints(), *_words()
]  # fmt: skip
assert len({one.name for one in CORPUS}) == len(CORPUS)
