"""Hostile weights of models, with the card beside them, and checkpoints of a training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import hostile_files as files
from faults.corpus.forging import EMBED, forged, put, rewrite, set_json
from faults.corpus.inputs import Command, Hostile
from faults.hostile_files import entry, safetensors
from faults.world import LONGER, World

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


def make_weights() -> list[Hostile]:
    name = "encoder.safetensors"
    found = [
        Hostile(f"weights: {what}", forged("simclr", put(name, make), EMBED), (name, told), needs_store=True)
        for what, (make, told) in HEADERS.items()
    ]
    changes = {
        "a name twice": (rewrite(name, files.doubled), (name, "stands twice")),
        "a field that means nothing": (rewrite(name, files.with_field), (name, "says other things")),
        "of another model": (
            put(name, lambda _: safetensors({"../../x": entry(0, 8)}, bytes(8))),
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
        Hostile(f"weights: {what}", forged("simclr", edit, EMBED), told, needs_store=True)
        for what, (edit, told) in changes.items()
    ]
    found += [
        Hostile(
            f"model.json: {what}",
            forged("simclr", set_json("model.json", **values), EMBED),
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


def make_checkpoints() -> list[Hostile]:
    name = "state.safetensors"

    def of_training(edit: Callable[[Path, Path], Any]) -> Callable[[World], Command]:
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
    cases = [(what, put(name, HEADERS[what][0]), (name,)) for what in chosen]
    cases += [
        ("a state that nests too deep", put("state.json", lambda _: b"[" * 100_000), ("state.json", "nests too deep")),
        ("a state that is a pickle", put("state.json", files.pickled), ("state.json",)),
        ("another format", state(lambda data: data.update(format=99)), ("checkpoints", "format 99")),
        ("another step", state(lambda data: data.update(step=10**9)), ("state.json", "step")),
        (
            "a tensor that is not there",
            state(lambda data: data.update(state={"tensor": "../x"})),
            ("state.json", "../x"),
        ),
        ("another model", state(without_weights), ("state.json", "does not fit this training")),
    ]
    return [Hostile(f"checkpoint: {what}", of_training(edit), told, needs_store=True) for what, edit, told in cases]
