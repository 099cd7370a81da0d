"""Resolve the view policy, and draw a contact sheet of real views."""

import numpy as np
import torch

from pipeline.errors import BadData, UsageError
from pipeline.run import Run
from stages.images import open_shards, read_summary
from stages.images.index import read_index
from stages.settings.augment import Augment
from stages.views import Policy, preset, write_policy
from stages.views.contact_sheet import write_contact_sheet
from stages.views.policy import OF_COLOURS


def augment(run: Run, settings: Augment) -> None:
    """Write policy.json (every field, with mean and std of the training part) and contact_sheet.png.

    Raises:
        BadData: there is no training part, or all of it is one colour.
    """
    folder = run.input("shards")
    summary = read_summary(folder)
    if "train" not in summary["splits"]:
        raise BadData(f"{folder} has no train split, only {', '.join(summary['splits'])}; views are fitted to train")
    mean, std = summary["statistics"]["mean"], summary["statistics"]["std"]
    if max(std) <= 0:
        raise BadData(f"{folder}: the training images are one colour (standard deviation {std}); is it the right set?")
    if min(std) <= 0:
        dead = ", ".join(str(number) for number, spread in enumerate(std) if spread <= 0)
        raise BadData(f"{folder}: of the training images' channels (0 to {len(std) - 1}) these never change: {dead}")

    chosen = settings.model_dump(exclude={"shards", "preset", "contact_sheet_images"}, exclude_none=True)
    resolved = preset(settings.preset, _image_size(run, settings)) | _without_colours(run, settings, len(mean)) | chosen
    policy = Policy.model_validate({**resolved, "mean": mean, "std": std})
    write_policy(policy, run.out / "policy.json")

    shards = open_shards(folder, "train")
    count = min(settings.contact_sheet_images, len(shards))
    spread = (2 * torch.arange(count) + 1) * len(shards) // (2 * count)  # the middle of each of `count` equal parts
    batch = shards.batch(spread)
    write_contact_sheet(run.out / "contact_sheet.png", batch.images, batch.sizes, batch.sample_ids, policy, run.seed)
    run.count(images=len(shards), image_size=policy.image_size)


def _image_size(run: Run, settings: Augment) -> int:
    """Of the views: as it was set, or fitted to the training images, and said."""
    if settings.image_size is not None:
        return settings.image_size
    index = read_index(run.input("shards"), "train")
    short_side = int(np.median(np.minimum(index["height"].to_numpy(), index["width"].to_numpy())))
    fitted = settings.image_size_for(short_side)
    run.say(f"image_size is fitted: {fitted} pixels, half of the images being {short_side} or less on the short side")
    return fitted


def _without_colours(run: Run, settings: Augment, channels: int) -> dict[str, float]:
    """What the preset must give up where images are not RGB.

    Raises:
        UsageError: the recipe asks for it by name.
    """
    if channels == 3:
        return {}
    asked = [name for name in OF_COLOURS if (getattr(settings, name) or 0) > 0]
    if asked:
        raise UsageError(
            f"{run.step}.{asked[0]}: only RGB images have colours, and these have {channels} channels; leave it out"
        )
    run.say(f"images of {channels} channels have no colours: {', '.join(OF_COLOURS)} are 0")
    return dict.fromkeys(OF_COLOURS, 0.0)
