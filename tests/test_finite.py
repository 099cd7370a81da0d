"""Steps whose loss or gradient is not finite: nothing of them stays, and the batch is kept."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import checkpoint, finite
from pipeline.errors import DamagedArtifact, NotFinite
from pipeline.finite import CAUSES, KEPT, MOST_IN_A_ROW, FiniteGuard, in_words
from pipeline.progress import Reporter
from pipeline.ranks import Ranks
from pipeline.run import Run
from pipeline.settings import StageSettings
from pipeline.training import Training
from pipeline.workplace import Workplace

NONE = torch.zeros(())
BAD = [torch.nan, torch.inf, -torch.inf]


class Steps(StageSettings):
    """Of a loop."""

    stage_version = 1
    record_every_steps: int = 2
    checkpoint_every_steps: int = 4
    log_every_seconds: float = 100.0


class Remembering(nn.Module):
    """Batch norm, and buffers of other types that change in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(5, 4, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        found = self.norm(self.layer(images))
        self.get_buffer("seen").add_(1)
        self.get_buffer("last").copy_(found.detach())
        return found


def state_of(*parts: nn.Module | torch.optim.Optimizer) -> list[bytes]:
    """All tensors, byte for byte: NaN is not equal to itself."""
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, nn.Module):
            found += part.state_dict().values()
        else:
            found += [one for values in part.state.values() for one in values.values()]
    return [one.detach().numpy().tobytes() for one in found]


def step(training: Training, model: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, factor: float) -> bool:
    loss = model(images).square().mean() * factor
    optimiser.zero_grad()
    training.backward(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not training.accepts(loss, norm, images=images):
        return False
    optimiser.step()
    training.record(loss=loss)
    return True


class Loop:
    """A loop of twelve steps; those at `bad` have a factor that is not finite."""

    def __init__(self, folder: Path, bad: dict[int, float], visits: int = 1000):
        torch.manual_seed(0)
        self.model = Remembering()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.bad, self.visits = bad, visits
        self.visited: list[int] = []
        self.folder = folder
        (folder / "out").mkdir(parents=True, exist_ok=True)
        self.run_of = Run(
            recipe="test", step="step", seed=0, settings=Steps(), inputs={}, ancestors=[], out=folder / "out",
            work=Workplace(folder), trackers=folder, reporter=Reporter("step", quiet=True),
        )  # fmt: skip

    def run(self) -> list[int]:
        """Steps that were passed over, in order."""
        passed_over = []
        state = {"model": self.model, "optimiser": self.optimiser}
        with Training(self.run_of, state, steps=12, steps_per_epoch=6, images_per_step=5) as training:
            for number, images in training.steps(
                lambda at: torch.rand(5, 3, generator=torch.Generator().manual_seed(at))
            ):
                self.visited.append(number)
                is_bad = number in self.bad and self.visited.count(number) <= self.visits
                before = state_of(self.model, self.optimiser)
                if not step(training, self.model, self.optimiser, images, self.bad[number] if is_bad else 1.0):
                    assert state_of(self.model, self.optimiser) == before
                    passed_over.append(number)
        return passed_over

    @property
    def files(self) -> dict[str, bytes]:
        return {
            "state": b"".join(state_of(self.model, self.optimiser)),
            "metrics": (self.folder / "out/metrics.jsonl").read_bytes(),
        }


def test_a_finite_loss_has_its_own_gradient_to_the_bit() -> None:
    torch.manual_seed(0)
    for size in (1e-30, 1.0, -1.0, 1e30, 0.0, -0.0):
        weights = torch.randn(50, requires_grad=True)
        (weights.sin().sum() * size).backward()
        assert weights.grad is not None
        wanted, weights.grad = weights.grad, None
        FiniteGuard.backward(weights.sin().sum() * size)
        assert weights.grad is not None
        assert weights.grad.numpy().tobytes() == wanted.numpy().tobytes()


@pytest.mark.parametrize("value", BAD)
def test_a_loss_that_is_not_finite_has_a_gradient_that_is_not(value: float) -> None:
    weights = torch.ones(3, requires_grad=True)
    FiniteGuard.backward((weights * 2).sum() + value)
    assert weights.grad is not None
    assert bool(weights.grad.isnan().all()), "though the derivative of a sum is 2"


@pytest.mark.parametrize("value", BAD)
def test_nothing_of_a_step_that_is_passed_over_stays(value: float, tmp_path: Path) -> None:
    loop = Loop(tmp_path, {0: value, 5: value, 6: value, 11: value})
    assert loop.run() == [0, 5, 6, 11]
    assert loop.visited == [*range(12)]
    assert loop.run_of.counts == {"steps_passed_over": 4}
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all("loss" in line for line in lines)
    assert [message.split(":")[1] for message in loop.run_of.reporter.messages] == [
        " step 1",
        " step 6",
        " step 7",
        " step 12",
    ]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_weights_that_a_finite_gradient_made_infinite_are_in_no_checkpoint(
    times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Loop(tmp_path / "whole", {})
    whole.run()
    loop = Loop(tmp_path / "broken", {})
    move = loop.optimiser.step
    left = [times]

    def overshoot() -> None:
        move()
        if loop.visited[-1] == 7 and left[0]:  # a checkpoint is due after this step
            left[0] -= 1
            loop.model.layer.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(loop.optimiser, "step", overshoot)
    if times > finite.MOST_RETURNS:
        with pytest.raises(NotFinite, match=r"after step 8 model/layer.weight holds NaN or infinity"):
            loop.run()
        assert [path.name for path in loop.run_of.work.checkpoints.iterdir()] == ["step-000000004"]
        return
    loop.run()
    assert loop.visited == [*range(8), *[4, 5, 6, 7] * times, *range(8, 12)]
    assert loop.files == whole.files


def test_a_checkpoint_that_reads_back_as_another_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk lies once, and later for good."""
    loop = Loop(tmp_path, {})
    seal, lies = checkpoint.seal, [True, False]

    def sealed(folder: Path) -> str:
        digest = seal(folder)
        if not lies or lies.pop(0):
            with (folder / "files/state.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"?")
        return digest

    monkeypatch.setattr(checkpoint, "seal", sealed)
    loop.run()
    assert [path.name for path in loop.run_of.work.checkpoints.iterdir()] == ["step-000000008"]
    (told,) = loop.run_of.reporter.messages
    assert "no checkpoint after step 4, since state.safetensors has other content when it is read back; " in told
    assert told.endswith("training goes on, and tries again after 4 steps")
    again = Loop(tmp_path / "again", {})
    again.run_of.settings = Steps(checkpoint_every_steps=1)
    with pytest.raises(DamagedArtifact, match=r"step: no checkpoint after step 3, .*tried 3 times: look at the disk"):
        again.run()


def test_a_window_of_steps_that_were_all_passed_over_has_a_line_without_means(tmp_path: Path) -> None:
    assert Loop(tmp_path, dict.fromkeys([4, 5], torch.nan)).run() == [4, 5]
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines if line["step"] == 6] == [["epoch", "step"]]


def test_the_last_batches_are_kept(tmp_path: Path) -> None:
    guard = FiniteGuard([], tmp_path / "kept", Ranks())
    for number in range(KEPT + 3):
        guard.begin_step()
        assert not guard.accepts(number, torch.tensor(torch.inf), NONE + torch.nan, {"ids": torch.tensor([number, 7])})
        assert guard.is_kept
    names = [f"step-{number:09d}-rank-0" for number in range(3, KEPT + 3)]
    assert sorted(path.stem for path in (tmp_path / "kept").glob("*.json")) == names
    assert sorted(path.stem for path in (tmp_path / "kept").glob("*.safetensors")) == names
    for number, name in enumerate(names, start=3):
        assert load_file(tmp_path / "kept" / f"{name}.safetensors")["ids"].tolist() == [number, 7]
        told = json.loads((tmp_path / "kept" / f"{name}.json").read_text())
        assert told == {"step": number, "rank": 0, "loss": "inf", "holds": ["ids"]}
    assert (guard.in_a_row, guard.passed_over) == (KEPT + 3, KEPT + 3)
    assert guard.accepts(9, NONE, NONE, {})
    assert (guard.in_a_row, guard.passed_over) == (0, KEPT + 3)


def test_a_full_disk_keeps_no_batch_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finite, "save_file", full)
    guard = FiniteGuard([], tmp_path / "kept", Ranks())
    assert not guard.accepts(1, NONE, NONE + torch.nan, {"ids": torch.tensor([1])})
    assert not guard.is_kept
    assert [*(tmp_path / "kept").iterdir()] == []
    monkeypatch.undo()
    monkeypatch.setattr(finite, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.accepts(1, NONE, NONE + torch.nan, {"ids": torch.tensor([1])})


def test_where_the_first_was_seen(tmp_path: Path) -> None:
    guard = FiniteGuard([], tmp_path, Ranks())
    bad, good = NONE + torch.nan, torch.ones(3)
    assert guard.cause(bad, {"images": good, "ids": torch.arange(3)}) == ([0], "loss")
    assert guard.cause(NONE, {"images": good}) == ([0], "gradient")
    assert guard.cause(bad, {"images": good / 0}) == ([0], "images")
    for cause in CAUSES:
        assert in_words(1200, cause, [0], 1) == f"step 1,200: loss or gradient is not finite, first in {CAUSES[cause]}"
    assert "not finite on rank 1 and 3, first" in in_words(1, "loss", [1, 3], 4)
    assert "not finite on all ranks, first" in in_words(1, "loss", [0, 1], 2)


def test_a_fault_that_passes_goes_back_once_and_leaves_no_trace(tmp_path: Path) -> None:
    whole, loop = Loop(tmp_path / "whole", {}), Loop(tmp_path / "broken", dict.fromkeys(range(5, 9), torch.nan), 1)
    assert whole.run() == []
    assert loop.run() == [5, 6, 7, 8]
    # No checkpoint is made of the eighth step, which was passed over: the way back leads before the first of them.
    assert loop.visited == [*range(9), *range(4, 12)]
    assert loop.files == whole.files


def test_one_that_stays_goes_back_twice_and_then_stops(tmp_path: Path) -> None:
    loop = Loop(tmp_path, dict.fromkeys(range(5, 12), torch.inf))
    told = (
        r"^step 9: loss or gradient is not finite, first in the forward pass: .*; 4 in a row, and it went back to the "
    )
    with pytest.raises(NotFinite, match=told + "last checkpoint 2 times$") as raised:
        loop.run()
    assert raised.value.exit_code == 8
    assert loop.visited == [*range(9), *range(4, 9), *range(4, 9)]
    found = checkpoint.load_latest(tmp_path / "checkpoints", tmp_path / "quarantine")
    assert found is not None
    assert found.step == 4
    whole, again = Loop(tmp_path / "whole", {}), Loop(tmp_path, {})
    assert whole.run() == again.run() == []
    assert again.visited == [*range(4, 12)]
    assert again.files == whole.files


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    loop = Loop(tmp_path, dict.fromkeys(range(12), torch.nan))
    with pytest.raises(NotFinite, match=f"{MOST_IN_A_ROW + 1} in a row, and no checkpoint was written yet"):
        loop.run()
    assert loop.visited == [0, 1, 2, 3]


def test_what_became_infinite_in_a_step_that_was_not_is_never_published(tmp_path: Path) -> None:
    """Gradients are finite, and the step is too large for the weights; here in the last one."""
    loop = Loop(tmp_path, {})
    real = loop.optimiser.step

    def overflow() -> None:
        real()
        if loop.visited[-1] == 11:
            with torch.no_grad():
                loop.model.layer.weight[1, 2] = torch.inf

    loop.optimiser.step = overflow  # type: ignore[method-assign,assignment]
    with pytest.raises(
        NotFinite, match=r"after step 12 model/layer\.weight holds NaN or infinity, and nothing is written"
    ):
        loop.run()
    assert not (tmp_path / "out/metrics.jsonl").exists()
