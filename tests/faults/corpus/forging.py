"""Artifacts of a store from elsewhere, where every hash fits, and the commands that read them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults.corpus.inputs import Command
from faults.world import World, change_json

EMBED = ["embed", "toy/simclr", "images", "--out", "out.parquet"]
SEARCH = ["search", "toy/simclr", "images/stone/0.png", "--gallery"]
AUGMENT = ["run", "toy.yaml", "views", "--set", "views.contact_sheet_images=16"]
PROBE = ["run", "toy.yaml", "probe", "--set", "probe.bootstrap_samples=101"]
PRETRAIN = ["run", "toy.yaml", "simclr", "--set", "simclr.temperature=0.3"]


def forged(step: str, edit: Callable[[Path, Path], Any], command: Command) -> Callable[[World], Command]:
    """The files of a step are changed, and then read."""

    def bring(world: World) -> Command:
        world.forge(step, lambda folder: edit(folder, world.canary))
        return command

    return bring


def put(name: str, make: Callable[[Path], bytes]) -> Callable[[Path, Path], Any]:
    return lambda folder, canary: (folder / name).write_bytes(make(canary))


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], Any]:
    return lambda folder, _: (folder / name).write_bytes(change((folder / name).read_bytes()))


def set_json(name: str, **values: Any) -> Callable[[Path, Path], Any]:
    return lambda folder, _: change_json(folder / name, **values)


def set_column(name: str, column: str, value: Any) -> Callable[[Path, Path], Any]:
    """The first cell of a column of a Parquet file is another."""

    def edit(folder: Path, _: Path) -> None:
        table = pq.read_table(folder / name)
        cells = [value, *table[column].to_pylist()[1:]]
        kind = table.schema.field(column).type
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, table.schema.field(column), pa.array(cells, kind)), folder / name)

    return edit
