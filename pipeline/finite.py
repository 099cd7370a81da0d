"""Steps whose loss or gradient is not finite: passed over as if they had not been, and kept for whoever asks why."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.manifest import canonical_json
from pipeline.ranks import Ranks
from pipeline.resources import suppress_full_disk

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


class FiniteGuard:
    """Watches the numbers of a training loop.

    All ranks come to the same conclusion without asking one another: `backward` makes the gradient NaN where the loss
    is not finite, and DistributedDataParallel's mean carries it to all.

    Args:
        modules: whose buffers (statistics of batch norm, memory of a loss) change in a forward pass.
        folder: where batches are kept.
    """

    def __init__(self, modules: Iterable[nn.Module], folder: Path, ranks: Ranks):
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

    @torch.no_grad()
    def begin_step(self) -> None:
        """Remember the buffers as they are before the forward pass."""
        for before, group in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(before, group)

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
            gradient_norm: of the whole gradient, equal on all ranks.
            captured: what the batch was, by name.
        """
        if bool(torch.isfinite(gradient_norm)):
            self.in_a_row = 0
            return True
        for before, group in zip(self._before, self._buffers, strict=True):
            torch._foreach_copy_(group, before)
        self.in_a_row += 1
        self.passed_over += 1
        with suppress_full_disk():
            self._keep(step, loss, captured)
        return False

    def cause(self, loss: Tensor, captured: Mapping[str, Tensor]) -> tuple[int, str]:
        """(rank, key of CAUSES): where the first number that is not finite was seen. All ranks ask together."""
        names = [*CAUSES]
        found = len(names) - 1
        if not _is_finite(loss):
            found = names.index("loss")
        if not all(_is_finite(one) for one in captured.values()):
            found = names.index("images")
        seen = self._ranks.gather(torch.tensor([found])).tolist()
        return seen.index(min(seen)), names[min(seen)]

    def _keep(self, step: int, loss: Tensor, captured: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = sorted(self.folder.glob(f"*-rank-{self._ranks.rank}.json"))
        for old in kept[: max(0, len(kept) + 1 - KEPT)]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        name = f"step-{step:09d}-rank-{self._ranks.rank}"
        tensors = {key: value.detach().cpu().contiguous() for key, value in captured.items()}
        save_file(tensors, self.folder / f"{name}.safetensors")
        facts = {"step": step, "rank": self._ranks.rank, "loss": repr(float(loss)), "holds": [*captured]}
        (self.folder / f"{name}.json").write_bytes(canonical_json(facts))


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())


def in_words(step: int, rank: int, cause: str, ranks: int) -> str:
    """A line about a step that cannot be taken."""
    where = f" on rank {rank}" if ranks > 1 else ""
    return f"step {step:,}: loss or gradient is not finite{where}, first in {CAUSES[cause]}"
