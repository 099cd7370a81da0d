"""What a trial does to the numbers of a training, in its process before the command begins; and what it sees there."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from faults.preludes import wrap
from pipeline import checkpoint
from pipeline.run import Run
from pipeline.training import Training
from stages import finetune, pretrain
from stages.images.loader import BatchLoader
from stages.views import Views

KINDS = ("loss", "images", "gradient", "weight")
"""`gradient`: of what the encoder gives, before it goes on to all weights. `weight`: of one of them alone."""


@dataclass(frozen=True)
class Break:
    """A number of a training that is replaced.

    Attributes:
        kind: of KINDS.
        value: nan, inf or -inf.
        rank: on which it is.
        steps: in which.
        visits: so many times a step is visited with it, from the first time on.
    """

    kind: str
    value: str
    rank: int
    steps: Sequence[int]
    visits: int = 1_000_000


class Breaker:
    """Breaks the numbers of this process's training, and writes down what the training makes of it."""

    def __init__(self, log: Path, broken: Break | None, rank: int):
        self.log, self.broken, self.rank = log, broken, rank
        self.step = -1
        self.visits: dict[int, int] = {}
        self.before = ""
        self.training: Training | None = None

    def is_due(self, *kinds: str) -> bool:
        one = self.broken
        if one is None or one.kind not in kinds or one.rank != self.rank or self.step not in one.steps:
            return False
        return self.visits[self.step] <= one.visits

    def poison(self, values: Tensor) -> Tensor:
        """The same with one number in the middle replaced; a loss goes on to be a function of what it was."""
        assert self.broken is not None
        if values.ndim == 0:
            return values * float(self.broken.value)
        if self.broken.kind == "gradient":  # all of them: one may be of a unit that ReLU has closed
            return torch.full_like(values, float(self.broken.value))
        poisoned = values.clone()
        poisoned.view(-1)[poisoned.numel() // 2] = float(self.broken.value)
        return poisoned

    def write(self, **values: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"rank": self.rank} | values) + "\n")

    def digest(self) -> str:
        """Of the bytes of all weights, buffers and states of optimisers."""
        assert self.training is not None
        digest = hashlib.sha256()
        for name, part in self.training._state.items():
            for key, value in sorted(leaves(part.state_dict(), name)):
                is_tensor = isinstance(value, Tensor)
                data = value.detach().contiguous().view(-1).numpy().tobytes() if is_tensor else repr(value).encode()
                digest.update(key.encode() + data)
        return digest.hexdigest()


def leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """Everything in a tree of dicts and lists, with the way there."""
    if not isinstance(tree, dict | list | tuple):
        return [(name, tree)]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [leaf for key, value in pairs for leaf in leaves(value, f"{name}/{key}")]


def break_numbers(log: str, broken: dict[str, Any] | None) -> None:
    """Called in the child: from here on its training is watched, and its numbers are broken where that is asked for."""
    breaker = Breaker(Path(log), Break(**broken) if broken else None, int(os.environ.get("RANK", "0")))
    _watch(breaker)
    _break_forward(breaker)
    _break_weight(breaker)


def _watch(breaker: Breaker) -> None:
    def begin(original: Any, self: Training, *arguments: Any, **named: Any) -> None:
        breaker.training = self
        original(self, *arguments, **named)

    def load(original: Any, self: BatchLoader, step: int) -> Any:
        breaker.step, breaker.visits[step] = step, breaker.visits.get(step, 0) + 1
        breaker.before = breaker.digest()
        return original(self, step)

    def accepts(original: Any, self: Training, loss: Tensor, norm: Tensor, **captured: Tensor) -> bool:
        seen = {"step": breaker.step, "ids": captured["sample_ids"].tolist(), "loss": float(loss.detach())}
        breaker.write(seen="batch", **seen)
        is_taken = original(self, loss, norm, **captured)
        after = breaker.before if is_taken else breaker.digest()
        breaker.write(seen="step", step=breaker.step, taken=is_taken, before=breaker.before, after=after)
        return is_taken

    def save(original: Any, *arguments: Any) -> Path:
        place = original(*arguments)
        breaker.write(seen="checkpoint", finite=is_finite(place / "files" / "state.safetensors"))
        return place

    wrap(Training, "__init__", begin)
    wrap(Training, "accepts", accepts)
    wrap(BatchLoader, "load", load)
    wrap(checkpoint, "save", save)


def _break_forward(breaker: Breaker) -> None:
    def hooked(embeddings: Tensor) -> Tensor:
        if breaker.is_due("gradient"):
            embeddings.register_hook(breaker.poison)
        return embeddings

    def loss_of_views(original: Any, view_a: Tensor, view_b: Tensor, temperature: float) -> Tensor:
        loss = original(hooked(view_a), view_b, temperature)
        return breaker.poison(loss) if breaker.is_due("loss") else loss

    def loss_of_labels(original: Any, self: nn.Module, embeddings: Tensor, *more: Any) -> Any:
        loss, figures = original(self, hooked(embeddings), *more)
        return breaker.poison(loss) if breaker.is_due("loss") else loss, figures

    def views(original: Any, self: Views, *arguments: Any) -> Tensor:
        images = original(self, *arguments)
        return breaker.poison(images) if breaker.is_due("images") else images

    wrap(pretrain, "nt_xent", loss_of_views)
    wrap(finetune.Combined, "forward", loss_of_labels)
    wrap(Views, "__call__", views)


def _break_weight(breaker: Breaker) -> None:
    is_first = True

    def distribute(original: Any, run: Run, module: nn.Module) -> nn.Module:
        nonlocal is_first
        if is_first:
            weights = [one for one in module.parameters() if one.requires_grad]
            weights[len(weights) // 2].register_hook(
                lambda gradient: breaker.poison(gradient) if breaker.is_due("weight") else gradient
            )
        is_first = False
        return original(run, module)

    wrap(Run, "distribute", distribute)


def is_finite(path: Path) -> bool:
    """Whether all that a file of safetensors holds is."""
    return all(bool(torch.isfinite(one).all()) for one in load_file(path).values() if one.is_floating_point())


def train_by_accelerate(folder: str, broken: dict[str, Any], steps: int, every: int) -> None:
    """The loop of Accelerate's documentation in place of the command, with `save_state` every so many steps.

    Ends with 0 if its weights, and all that it saved, are finite in the end.
    """
    one = Break(**broken)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(4, 10))
    breaker = Breaker(Path(folder) / "log", one, one.rank)
    weights = [*model.parameters()]
    weights[len(weights) // 2].register_hook(
        lambda gradient: breaker.poison(gradient) if breaker.is_due("weight") else gradient
    )
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    finite = True
    for breaker.step in range(steps):
        breaker.visits[breaker.step] = 1
        images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
        scores = model(breaker.poison(images) if breaker.is_due("images") else images)
        if breaker.is_due("gradient"):
            scores.register_hook(breaker.poison)
        loss = nn.functional.cross_entropy(scores, labels)
        optimiser.zero_grad()
        accelerator.backward(breaker.poison(loss) if breaker.is_due("loss") else loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (breaker.step + 1) % every == 0 or breaker.step + 1 == steps:
            accelerator.save_state(f"{folder}/state-{breaker.step}")
            finite &= is_finite(Path(folder) / f"state-{breaker.step}" / "model.safetensors")
    raise SystemExit(0 if finite else 1)
