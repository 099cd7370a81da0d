"""Checkpoints of a training loop: tensors as safetensors, the rest as JSON, both hashed; never pickle.

A state is a tree of dicts, lists, numbers, texts and tensors, as `state_dict()` gives it.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import NotFinite, NoUsableCheckpoint, PipelineError
from pipeline.failpoints import reach
from pipeline.manifest import FILES, canonical_json, check, commit_folder, delete, parse_json, seal
from pipeline.processes import may_be_alive, this_process

KEPT = 2
FORMAT = 2
NAME = re.compile(r"step-[0-9]{9,}")
PRIVATE = ".private-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back."""

    step: int
    state: Any
    damaged: list[str]
    """Newer ones that could not be used and were set aside, with the reason."""
    steps_lost: int = 0
    """Between the newest of those and this one."""


class NotAsWritten(PipelineError):
    """What was just saved reads back as something else."""

    exit_code = 4


def save(folder: Path, step: int, state: Any) -> Path:
    """Write a checkpoint and, once it has been read back, delete all but the newest two.

    Args:
        folder: where the checkpoints of this step of the recipe lie.
        step: steps of the training loop that are done.

    Raises:
        NotFinite: a tensor holds NaN or infinity; nothing is written.
        NotAsWritten: it is not as it was written, and does not stay; the older ones do.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    require_finite(step, tensors)
    place = _place(folder, step)
    for left in folder.glob(f"{PRIVATE}*"):  # of processes that were killed while they wrote
        if not may_be_alive(left.name.removeprefix(PRIVATE)):
            shutil.rmtree(left, ignore_errors=True)
    private = folder / f"{PRIVATE}{this_process()}-{step}"
    try:
        (private / FILES).mkdir(parents=True, exist_ok=True)
        reach("checkpoint.folder")
        save_file(tensors, private / FILES / "state.safetensors")
        reach("checkpoint.tensors")
        (private / FILES / "state.json").write_bytes(canonical_json({"format": FORMAT, "step": step, "state": tree}))
        reach("checkpoint.written")
        seal(private)
        commit_folder(private, place)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    reach("checkpoint.committed")
    problem = _problem(place)
    if problem is not None and place.is_dir():  # else another process, which got further, pruned it
        _delete(place)
        raise NotAsWritten(f"{problem} when it is read back")
    for old in _all(folder)[:-KEPT]:
        reach("checkpoint.prune")
        _delete(old)
        reach("checkpoint.pruned")
    return place


def _problem(place: Path) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        problems = check(place)
    except FileNotFoundError as error:  # it is being deleted
        return f"{error.filename} is missing"
    return f"{problems[0].path} {problems[0].problem}" if problems else None


def _delete(place: Path) -> None:
    """By way of a private name, so that nobody sees a part of it."""
    with suppress(FileNotFoundError):  # another process deleted it
        private = place.with_name(f"{PRIVATE}{this_process()}-{place.name}")
        shutil.rmtree(place.rename(private), ignore_errors=True)


def require_finite(step: int, tensors: Mapping[str, Tensor]) -> None:
    """Let nothing through that holds NaN or infinity.

    Args:
        step: steps of the training loop that are done, for the message.

    Raises:
        NotFinite: names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(
                f"after step {step:,} {name.removeprefix('/state/')} holds NaN or infinity, and nothing is written of "
                "it: a lower learning rate, gradient_clip, or precision fp32 usually mends it"
            )


def size_bytes(state: Any) -> int:
    """About as much as a checkpoint of a state takes on the disk."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    return sum(one.numel() * one.element_size() for one in tensors.values()) + len(canonical_json(tree))


def load_latest(folder: Path, quarantine: Path, written: int = 0) -> Checkpoint | None:
    """Read the newest checkpoint whose every byte is as written; None if there never was one.

    Damaged ones are moved to `quarantine`.

    Args:
        written: the step of the newest one that is known to have been written, 0 if none is.

    Raises:
        NoUsableCheckpoint: there are checkpoints, or were, and none can be read.
    """
    places = _all(folder)
    damaged, newest = [], 0
    if written and _place(folder, written) not in places:
        damaged.append(f"{_place(folder, written).name}: is missing")
        newest = written
    for place in reversed(places):
        try:
            problem = _problem(place)
            if problem is None:
                step, state = _read(place)
                return Checkpoint(step, state, damaged, max(newest - step, 0))
        except FileNotFoundError as error:
            problem = f"{error.filename} is missing"
        except UnreadableState as error:
            problem = str(error)
        if not place.exists():  # another process, at the same step where leases do not hold, pruned it
            continue
        damaged.append(f"{place.name}: {problem}")
        newest = max(newest, _step(place))
        quarantine.mkdir(parents=True, exist_ok=True)
        delete(quarantine / place.name)
        with suppress(FileNotFoundError):
            place.rename(quarantine / place.name)
    if damaged or (quarantine.is_dir() and any(quarantine.iterdir())):
        raise NoUsableCheckpoint(
            f"no usable checkpoint in {folder} ({'; '.join(damaged) or 'all were set aside before'}); "
            f"damaged ones lie in {quarantine}; --fresh starts again from step 0"
        )
    return None


def load(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of a step that another rank has found to be as written."""
    return Checkpoint(*_read(_place(folder, step)), [])


class UnreadableState(Exception):
    """A checkpoint has its manifest's bytes, and they are none that a training loop wrote."""


def _read(place: Path) -> tuple[int, Any]:
    """The step and the state in a checkpoint's folder.

    Raises:
        UnreadableState: names the file.
        NoUsableCheckpoint: another version wrote it.
    """
    values, tensors = place / FILES / "state.json", place / FILES / "state.safetensors"
    try:
        data = parse_json(values.read_bytes())
        if data["format"] != FORMAT:
            raise NoUsableCheckpoint(
                f"{place} has format {data['format']}, and this version reads {FORMAT}: --fresh starts again from "
                "step 0"
            )
        if type(data["step"]) is not int or place.name != f"step-{data['step']:09d}":
            raise UnreadableState(f"{values.name}: step: {data['step']!r} is not that of its folder")
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableState(f"{values.name} cannot be read: {error}") from error
    try:
        loaded = load_file(tensors)
    except SafetensorError as error:
        raise UnreadableState(f"{tensors.name} cannot be read: {error}") from error
    try:
        return data["step"], _unpack(data["state"], loaded)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # RecursionError is one of the last
        raise UnreadableState(f"{values.name}: state: {error} does not fit {tensors.name}") from error


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _step(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    """The places of checkpoints, oldest first; what somebody else put beside them is none of ours."""
    places = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((place for place in places if NAME.fullmatch(place.name)), key=_step)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by their names; dicts become lists of pairs, so that integer keys stay integers."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        # The layout in memory comes back as well: fused optimisers pair the memory of a weight with that of its
        # momentum, whatever the strides say.
        return {"tensor": name} | ({} if value.is_contiguous() else {"strides": [*value.stride()]})
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a checkpoint holds tensors, numbers and texts, not {type(value).__name__}")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        tensor = tensors[tree["tensor"]]
        if "strides" in tree:
            return torch.empty_strided(tensor.shape, tree["strides"], dtype=tensor.dtype).copy_(tensor)
        return tensor
    if "dict" in tree:
        return {key: _unpack(item, tensors) for key, item in tree["dict"]}
    return [_unpack(item, tensors) for item in tree["list"]]
