"""Steps whose loss or gradient is not finite: passed over as if they had not been, and kept for whoever asks why."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.manifest import canonical_json
from pipeline.ranks import Ranks
from pipeline.resources import is_full_disk

MOST_IN_A_ROW = 3
"""Steps that are passed over; the next goes back to the last checkpoint."""
MOST_RETURNS = 2
"""To a checkpoint; the next time is the end."""
KEPT = 4
"""Batches that are kept of each rank."""

CAUSES = {
    "images": "the views hold numbers that are not finite: look at the images (their mean and std, 16-bit windows)",
    "loss": "the forward pass: a lower learning rate, or precision fp32, usually mends it",
    "gradient": "the backward pass: a lower learning rate, gradient_clip, or precision fp32 usually mends it",
}
"""Where the first number that is not finite was seen, and what that usually means."""
NEVER = 2**31
"""In place of a gradient's number: none of them was seen to be not finite."""


class FiniteGuard:
    """Watches the numbers of a training loop.

    All ranks come to the same conclusion without asking one another: `backward` makes the gradient NaN where the loss
    is not finite, and DistributedDataParallel's mean carries it to all.

    Args:
        modules: that are trained, whose buffers (statistics of batch norm, memory of a loss) change in a forward pass.
        folder: where batches are kept.
    """

    def __init__(self, modules: Iterable[nn.Module], folder: Path, ranks: Ranks):
        modules = [*modules]
        buffers = {id(buffer): buffer for module in modules for buffer in module.buffers()}
        # By type, since only equal ones are copied all at once.
        self._buffers = [
            [one for one in buffers.values() if one.dtype == kind] for kind in {one.dtype for one in buffers.values()}
        ]
        self._before = [[one.clone() for one in group] for group in self._buffers]
        self.folder, self._ranks = folder, ranks
        self.in_a_row = self.passed_over = 0
        """Steps that were passed over: since the last that was not, and in all."""
        self.returns = 0
        """To the last checkpoint."""
        self.is_kept = False
        """Whether the last batch that was passed over is kept: the disk may be full."""
        self._parameters = [one for module in modules for one in module.parameters() if one.requires_grad]
        self._hooks: list[RemovableHandle] = []
        self._seen = 0
        self._first: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """What a checkpoint holds of this."""
        return [self.in_a_row, self.passed_over, self.returns]

    @counts.setter
    def counts(self, counts: list[int]) -> None:
        self.in_a_row, self.passed_over, self.returns = counts

    def count_return(self, counts: list[int]) -> None:
        """Training is back at the last checkpoint, which knows nothing of that.

        Args:
            counts: as they were just before.
        """
        _, passed_over, returns = counts
        self.counts = [0, passed_over, returns + 1]

    @torch.no_grad()
    def begin_step(self) -> None:
        """Remember the buffers as they are before the forward pass."""
        for before, group in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(before, group)
        self._seen, self._first = 0, None

    @staticmethod
    def backward(loss: Tensor) -> None:
        """`loss.backward()`, in which a loss that is not finite has a gradient that is not. Waits for no device."""
        detached = loss.detach()
        # 1, and NaN of infinity and NaN.
        loss.backward(detached * 0 + 1)

    @torch.no_grad()
    def accepts(self, step: int, loss: Tensor, gradient_norm: Tensor, captured: Mapping[str, Tensor]) -> bool:
        """Whether the step can be taken. If not, the buffers are as before it, and the batch is kept.

        Args:
            step: at hand, counted from 1.
            gradient_norm: of the whole gradient, equal on all ranks.
            captured: what the batch was, by name.
        """
        if bool(torch.isfinite(gradient_norm)):
            if self._hooks:
                self._look_at_gradients(False)
            self.in_a_row = 0
            return True
        for before, group in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(group, before)
        self.in_a_row += 1
        self.passed_over += 1
        self._keep(step, loss, captured)
        return False

    def cause(self, loss: Tensor, captured: Mapping[str, Tensor]) -> tuple[list[int], str]:
        """(ranks, key of CAUSES): where the first number that is not finite was seen. All ranks ask together.

        Of a gradient that can be told from the second step in a row on.
        """
        names = [*CAUSES]
        found = len(names) - 1 + (0 if self._first is None else int(self._first))
        if not _is_finite(loss):
            found = names.index("loss")
        if not all(_is_finite(one) for one in captured.values()):
            found = names.index("images")
        self._look_at_gradients(self._ranks.size > 1)
        seen = self._ranks.gather(torch.tensor([found])).tolist()
        first = min(seen)
        return [rank for rank, one in enumerate(seen) if one == first], names[min(first, len(names) - 1)]

    def _look_at_gradients(self, wanted: bool) -> None:
        """Look at each one before it is averaged over the ranks, after which all are alike; costs something."""
        if wanted and not self._hooks:
            self._hooks = [one.register_hook(self._look) for one in self._parameters]
        if not wanted:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    @torch.no_grad()
    def _look(self, gradient: Tensor) -> None:
        """Which gradient of this backward pass was the first that is not finite. They come in one order on all ranks;
        batch norm carries what one has from there to all, so that only the first tells whose it was.
        """
        number = torch.where(torch.isfinite(gradient).all(), NEVER, self._seen)
        self._first = number if self._first is None else torch.minimum(self._first, number)
        self._seen += 1

    def _keep(self, step: int, loss: Tensor, captured: Mapping[str, Tensor]) -> None:
        path = self.folder / f"step-{step:09d}-rank-{self._ranks.rank}.safetensors"
        kept = sorted({*self.folder.glob(f"*-rank-{self._ranks.rank}.safetensors")} - {path})
        for old in kept[: max(0, len(kept) + 1 - KEPT)]:
            old.unlink()
            old.with_suffix(".json").unlink(missing_ok=True)
        tensors = {key: value.detach().cpu().contiguous() for key, value in captured.items()}
        facts = {"step": step, "rank": self._ranks.rank, "loss": repr(float(loss)), "holds": [*captured]}
        self.is_kept = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
            path.with_suffix(".json").write_bytes(canonical_json(facts))
        except Exception as error:
            if not is_full_disk(error):
                raise
            self.is_kept = False  # it tells why, and is no part of the result
            for part in (path, path.with_suffix(".json")):
                part.unlink(missing_ok=True)


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def in_words(step: int, cause: str, of_ranks: Sequence[int], ranks: int) -> str:
    """A line about a step that cannot be taken.

    Args:
        of_ranks: where it was seen, of `ranks`.
    """
    where = ""
    if ranks > 1:
        all_of_them = len(of_ranks) == ranks
        where = " on all ranks" if all_of_them else f" on rank {' and '.join(map(str, of_ranks))}"
    return f"step {step:,}: loss or gradient is not finite{where}, first in {CAUSES[cause]}"
