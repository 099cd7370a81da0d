"""Trainings beside one another, each in a copy of a store that has the images and the views."""

import shutil
from pathlib import Path

import yaml

from faults.zygote import Zygote

DIGITS = """
  shards: {stage: shard, source: "sklearn:digits", near_duplicates: false, workers: 1}
  views: {stage: augment, shards: shards, preset: text, image_size: 8, contact_sheet_images: 1}
"""
"""The first steps of the recipes, so that these can be made once for all of them."""


def make_digits(zygote: Zygote, folder: Path) -> Path:
    """A store in which the steps of DIGITS are done, for a recipe `digits`."""
    (folder / "digits.yaml").write_text(f"name: digits\nsteps:{DIGITS}")
    code, said = zygote.run(["run", "digits.yaml", "--store", "store"], folder)
    assert code == 0, said
    return folder / "store"


class Place:
    """A folder with a recipe that begins with DIGITS, and stores in which it goes on from there.

    Attributes:
        digits: the store that others begin as.
    """

    def __init__(self, zygote: Zygote, folder: Path, recipe: str, digits: Path):
        self.zygote, self.folder, self.digits = zygote, folder, digits
        self.recipe = f"{yaml.safe_load(recipe)['name']}.yaml"
        (folder / self.recipe).write_text(recipe)

    def new(self, store: str) -> str:
        """Make a store of that name."""
        shutil.copytree(self.digits, self.folder / store)
        return store

    def command(self, store: str, *more: str) -> list[str]:
        """The arguments of a run in a store."""
        return ["run", self.recipe, "--store", store, *more]

    def files(self, store: str, stage: str = "pretrain") -> dict[str, bytes]:
        """The files of the one artifact that a stage has made, by name."""
        (files,) = (self.folder / store / "builds" / stage).glob("*/*/files")
        return {path.name: path.read_bytes() for path in files.iterdir()}
