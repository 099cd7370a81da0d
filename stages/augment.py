"""Resolve the view policy, and draw a contact sheet of real views."""

import json

import torch

from pipeline.errors import BadData
from pipeline.run import Run
from stages.images import open_shards
from stages.settings.augment import Augment
from stages.views import Policy, preset, write_policy
from stages.views.contact_sheet import write_contact_sheet


def augment(run: Run, settings: Augment) -> None:
    """Write policy.json (every field, with mean and std of the training part) and contact_sheet.png.

    Raises:
        BadData: there is no training part, or all of it is one colour.
    """
    folder = run.input("shards")
    summary = json.loads((folder / "shards.json").read_bytes())
    if "train" not in summary["splits"]:
        raise BadData(f"{folder} has no train split, only {', '.join(summary['splits'])}; views are fitted to train")
    mean, std = summary["statistics"]["mean"], summary["statistics"]["std"]
    if min(std) <= 0:
        raise BadData(f"{folder}: the training images are one colour (standard deviation {std}); is it the right set?")

    chosen = settings.model_dump(exclude={"shards", "preset", "contact_sheet_images"}, exclude_none=True)
    policy = Policy.model_validate({**preset(settings.preset, settings.image_size), **chosen, "mean": mean, "std": std})
    write_policy(policy, run.out / "policy.json")

    shards = open_shards(folder, "train")
    count = min(settings.contact_sheet_images, len(shards))
    spread = (2 * torch.arange(count) + 1) * len(shards) // (2 * count)  # the middle of each of `count` equal parts
    batch = shards.batch(spread)
    write_contact_sheet(run.out / "contact_sheet.png", batch.images, batch.sizes, batch.sample_ids, policy, run.seed)
    run.count(images=len(shards), image_size=policy.image_size)
