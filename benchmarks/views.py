"""Views of SimCLR's policy: from decoded images in memory to two normalised float32 views of each, views a second.

Compared are the fused engine (ours), our Kornia engine, Kornia's own AugmentationSequential, lightly's SimCLRTransform
and torchvision v2 sample by sample. All draw by the same policy: at 32 pixels strength 0.5 and no blur, at 224 pixels
strength 1 and a blur of 23 taps for half of the views; batches of 256 and of 64. Images at 224 pixels are 341 x 256 (a
photograph whose short side was capped), all of one size, since Kornia can crop nothing else; ours takes any mixture.
Those that work on batches are given uint8 tensors and both cores, those that work on samples PIL images or tensors and
a DataLoader of 0, 1 or 2 persistent workers, whatever is fastest. The process keeps freed memory, as `simclr` does:
all contenders gain by that.

Rows of their own: time, and memory of a batch with its images, against the size of a view: ours, images of that size,
strength 1, blur of a tenth of it.
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kornia.augmentation import (
    AugmentationSequential,
    ColorJitter,
    Normalize,
    RandomGaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from lightly.transforms import SimCLRTransform
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.harness import Comparison, Row, Work, alternate, arguments, exponent, fastest, peak_bytes, report
from benchmarks.image_files import LARGE, SMALL, find_or_make
from pipeline.host import keep_freed_memory
from stages.views import Policy, load, preset

SIZES = (32, 64, 96, 128, 224, 384)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = (0, 1, 2)
GROWTH_BATCH = 64
CIFAR10_PIXELS = 32


@dataclass(frozen=True)
class Case:
    """Images [N, 3, H, W] to make two views of each of, by a policy, so many at once."""

    images: Tensor
    policy: Policy
    batch: int
    device: str


def ours_fused(case: Case) -> dict[str, Work]:
    return {"": _ours(case, "fused")}


def ours_kornia(case: Case) -> dict[str, Work]:
    return {"": _ours(case, "kornia")}


def _ours(case: Case, engine: str) -> Work:
    views = load(case.policy.model_copy(update={"engine": engine}), seed=0, device=case.device)
    ids = torch.arange(len(case.images))

    def work() -> None:
        epoch = random.randrange(2**31)
        for part in ids.split(case.batch):
            views(case.images[part], part, epoch)

    return work


def kornia_sequential(case: Case) -> dict[str, Work]:
    return {
        f"{layout}, crops by {mode}": _kornia(case, layout == "channels_last", mode)
        for layout in ("contiguous", "channels_last")
        for mode in ("slice", "resample")
    }


def _kornia(case: Case, channels_last: bool, mode: str) -> Work:
    policy, (brightness, contrast, saturation, hue) = case.policy, _jitter(case.policy)
    size, taps = (policy.image_size,) * 2, (policy.blur_kernel,) * 2
    operators = [
        RandomResizedCrop(size, policy.crop_area, policy.crop_ratio, cropping_mode=mode),
        RandomHorizontalFlip(policy.horizontal_flip),
        ColorJitter(brightness, contrast, saturation, hue, p=policy.colour_jitter),
        RandomGrayscale(p=policy.grey),
        *([RandomGaussianBlur(taps, policy.blur_sigma, p=policy.blur)] if policy.blur > 0 else []),
        Normalize(MEAN, STD),
    ]
    augment = AugmentationSequential(*operators, data_keys=["input"], same_on_batch=False)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    @torch.no_grad()
    def work() -> None:
        for images in case.images.split(case.batch):
            floats = images.to(case.device).to(torch.float32, memory_format=memory_format) / 255
            for _ in range(2):
                augment(floats)

    return work


def lightly(case: Case) -> dict[str, Work]:
    policy = case.policy
    transform = SimCLRTransform(
        input_size=policy.image_size,
        cj_prob=policy.colour_jitter,
        cj_strength=policy.colour_strength,
        cj_bright=policy.brightness,
        cj_contrast=policy.contrast,
        cj_sat=policy.saturation,
        cj_hue=policy.hue,
        min_scale=policy.crop_area[0],
        random_gray_scale=policy.grey,
        gaussian_blur=policy.blur,
        sigmas=policy.blur_sigma,
        hf_prob=policy.horizontal_flip,
        normalize={"mean": list(MEAN), "std": list(STD)},
    )
    pictures = _pictures(case)
    return {f"{workers} workers": _by_samples(case, pictures, transform, workers) for workers in WORKERS}


def torchvision(case: Case) -> dict[str, Work]:
    policy, (brightness, contrast, saturation, hue) = case.policy, _jitter(case.policy)
    blur = v2.GaussianBlur(policy.blur_kernel, policy.blur_sigma)
    transform = v2.Compose([
        v2.RandomResizedCrop(policy.image_size, policy.crop_area, policy.crop_ratio, antialias=policy.antialias),
        v2.RandomHorizontalFlip(policy.horizontal_flip),
        v2.RandomApply([v2.ColorJitter(brightness, contrast, saturation, hue)], policy.colour_jitter),
        v2.RandomGrayscale(policy.grey),
        *([v2.RandomApply([blur], policy.blur)] if policy.blur > 0 else []),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    twice = lambda image: (transform(image), transform(image))  # noqa: E731
    sources = {"PIL": _pictures(case), "tensors": list(case.images)}
    return {
        f"{kind}, {workers} workers": _by_samples(case, samples, twice, workers)
        for kind, samples in sources.items()
        for workers in WORKERS
    }


class Samples(Dataset):
    """Images in memory, transformed when asked for."""

    def __init__(self, images: list, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> object:
        return self.transform(self.images[index])


def _by_samples(case: Case, images: list, transform: Callable, workers: int) -> Work:
    batch = min(case.batch, len(images) // 8)  # so that two workers end at about the same time
    loader = DataLoader(Samples(images, transform), batch, num_workers=workers, persistent_workers=workers > 0)

    def work() -> None:
        for _ in loader:
            pass

    return work


def _pictures(case: Case) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in case.images]


def _jitter(policy: Policy) -> tuple[float, float, float, float]:
    strength = policy.colour_strength
    return policy.brightness * strength, policy.contrast * strength, policy.saturation * strength, policy.hue * strength


def _images(data: Path | None, count: int, height: int, width: int) -> tuple[Tensor, str]:
    """uint8 [count, 3, height, width], images of CIFAR-10 or photographs cut to that shape; and what they are."""
    with tempfile.TemporaryDirectory() as scratch:
        root, names, what = find_or_make(SMALL if height <= CIFAR10_PIXELS else LARGE, data, count, Path(scratch))
        opened = {name: Image.open(root / name).convert("RGB") for name in dict.fromkeys(names)}
    cut = {name: ImageOps.fit(one, (width, height), Image.Resampling.BOX) for name, one in opened.items()}
    return torch.stack([v2.functional.pil_to_tensor(cut[name]) for name in names]), what


def _made(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size], smooth."""
    patches = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(patches, (size, size), mode="bicubic") * 255).clamp(0, 255).byte()


def _policy(image_size: int, **changes: float) -> Policy:
    return Policy.model_validate({**preset("natural", image_size), "mean": MEAN, "std": STD, **changes})


PEERS = {"kornia": kornia_sequential, "lightly": lightly, "torchvision": torchvision}


def make_views(policy: Policy, *, warm_up: bool) -> None:
    """Two views of each of a batch of images, for the memory that they take."""
    count, size = (1 if warm_up else GROWTH_BATCH), policy.image_size
    images = _made(count, size)
    load(policy)(images, torch.arange(count), 0)


def main() -> None:
    chosen = arguments(__doc__)
    keep_freed_memory()
    runs = 3 if chosen.quick else 5
    comparison = Comparison("views", "views/s", "32 px, batch 256", runs=runs, device=chosen.device)
    for size, batch, count, shape in (
        (32, 256, 512 if chosen.quick else 1024, (32, 32)),
        (224, 64, 64 if chosen.quick else 128, (256, 341)),
    ):
        images, what = _images(chosen.data, count, *shape)
        comparison.notes.append(f"{size} px: of {what}")
        case = Case(images, _policy(size), min(batch, count), chosen.device)
        contenders, settings = {"ours": ours_fused(case)[""], "our kornia engine": ours_kornia(case)[""]}, {}
        for name, adapter in PEERS.items():
            settings[name], contenders[name] = fastest(adapter(case), chosen.device)
        seconds = alternate(contenders, runs, device=chosen.device)
        values = {name: 2 * count / taken for name, taken in seconds.items()}
        comparison.rows.append(Row(f"{size} px, batch {case.batch}", values, settings))
        for name in PEERS:
            comparison.ratio[f"{name}_{size}"] = values["ours"] / values[name]
        comparison.ratio[f"engine_{size}"] = values["ours"] / values["our kornia engine"]

    times, memory = [], []
    for size in SIZES:
        count = max(4, 2**20 // size**2 // (2 if chosen.quick else 1))
        policy = _policy(size, colour_strength=1.0, blur=0.5)
        case = Case(_made(count, size), policy, count, chosen.device)
        seconds = alternate({"ours": ours_fused(case)[""]}, 2 * runs + 1, warm_up=2, device=chosen.device)
        times.append(1000 * seconds["ours"] / (2 * count))
        name = f"{size} px, blur of {policy.blur_kernel} taps"
        comparison.rows.append(Row(name, {"ours": times[-1]}, unit="ms/view"))
        if chosen.device == "cpu":
            memory.append(peak_bytes(make_views, policy.model_copy(update={"engine": "fused"})))
            comparison.rows.append(Row(f"{name}, batch of {GROWTH_BATCH}", {"ours": memory[-1] / 2**20}, unit="MiB"))
    growing = {"time": times} | ({"memory": memory} if memory else {})
    powers = ", ".join(f"{what} by {exponent(SIZES, taken):.2f}" for what, taken in growing.items())
    comparison.notes.append(f"with the size of a view, powers by which it grows: {powers}")
    report(comparison)


if __name__ == "__main__":
    main()
