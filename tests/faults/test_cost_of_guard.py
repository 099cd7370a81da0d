"""What it costs to watch for numbers that are not finite."""

import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from faults.tally import Tally
from pipeline.finite import FiniteGuard
from pipeline.ranks import Ranks
from stages.losses import nt_xent
from stages.models import build_encoder, build_projector

LARGEST = 0.005
"""Share of a training step."""
BATCH, SIDE = 64, 32


class Loop:
    """SimCLR's step on random images, on the CPU: with the guard, and without."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.encoder = build_encoder(
            backbone="resnet18", width=64, small_stem_up_to=64, pretrained=False, image_size=SIDE
        )
        self.projector = build_projector(self.encoder.embedding_size, layers=2, hidden=512, dimension=128)
        self.modules = nn.ModuleList([self.encoder, self.projector])
        self.guard = FiniteGuard([self.encoder, self.projector], folder, Ranks())
        self.optimiser = torch.optim.SGD(self.modules.parameters(), lr=0.01, momentum=0.9, fused=True)
        self.images = torch.randn(2 * BATCH, 3, SIDE, SIDE)
        self.loss, self.norm = torch.zeros(()), torch.zeros(())

    def step(self, is_guarded: bool) -> float:
        """Seconds that it takes."""
        started = time.perf_counter()
        if is_guarded:
            self.guard.begin_step()
        view_a, view_b = self.projector(self.encoder(self.images)).chunk(2)
        self.loss = nt_xent(view_a, view_b, 0.2)
        self.optimiser.zero_grad()
        if is_guarded:
            self.guard.backward(self.loss)
        else:
            self.loss.backward()
        self.norm = nn.utils.get_total_norm([one.grad for one in self.modules.parameters() if one.grad is not None])
        if is_guarded:
            assert self.guard.accepts(1, self.loss, self.norm, {})
        self.optimiser.step()
        return time.perf_counter() - started

    def guard_alone(self) -> float:
        """Seconds of all that the guard adds to a step."""
        loss: Tensor = self.loss.detach()
        started = time.perf_counter()
        self.guard.begin_step()
        assert torch.isfinite(loss.detach() * 0 + 1)
        assert self.guard.accepts(1, loss, self.norm, {})
        return time.perf_counter() - started


@pytest.mark.alone
def test_the_guard_costs_little(tmp_path: Path, is_whole: bool, tally: Tally) -> None:
    """What it does by itself is held against the limit: steps beside one another differ by more than that."""
    loop = Loop(tmp_path)
    loop.step(True)
    pairs = [(loop.step(True), loop.step(False)) for _ in range(7 if is_whole else 1)]
    guarded, plain = median(one for one, _ in pairs), median(other for _, other in pairs)
    share = median(loop.guard_alone() for _ in range(100)) / plain
    assert share <= LARGEST, f"{share:.2%} of a step"
    note = (
        f"{share:.3%} of a step of {plain * 1000:.0f} ms (resnet18, 2 x {BATCH} views of {SIDE} px, CPU); steps "
        f"beside one another {guarded / plain - 1:+.1%}"
    )
    tally.add("cost-guard", tried=1, held=1, note=note)
