"""Checkpoints come back exactly, and damage is found before use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import checkpoint
from pipeline.errors import NotFinite, NoUsableCheckpoint


def state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(4, 3)).sum().backward()
    optimiser.step()
    return {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "note": ["é", None, True, 0.1]}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


def load(folder: Path) -> checkpoint.Checkpoint | None:
    return checkpoint.load_latest(folder / "checkpoints", folder / "quarantine")


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    checkpoint.save(tmp_path / "checkpoints", 7, state(7))
    found = load(tmp_path)
    assert found is not None
    assert found.step == 7
    assert_equal(state(7), found.state)
    optimiser = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=0.1)
    optimiser.load_state_dict(found.state["optimiser"])


def test_the_layout_in_memory_comes_back(tmp_path: Path) -> None:
    weight = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.save(
        tmp_path / "checkpoints", 1, {"weight": weight, "plain": torch.rand(2, 3), "number": torch.ones(())}
    )
    found = load(tmp_path)
    assert found is not None
    assert torch.equal(found.state["weight"], weight)
    assert found.state["weight"].stride() == weight.stride()
    assert found.state["plain"].is_contiguous()


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path / "checkpoints", step, state(step))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000000003", "step-000000010"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_set_aside_and_said(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, state(step))
    path = tmp_path / "checkpoints" / "step-000000002" / "files" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-1])
    found = load(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [name in line for line in found.damaged] == [True]
    assert (tmp_path / "quarantine" / "step-000000002").is_dir()


def test_none_that_can_be_read_is_an_error_and_stays_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoints", 1, state(1))
    (tmp_path / "checkpoints" / "step-000000001" / "files" / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(NoUsableCheckpoint, match="--fresh"):
            load(tmp_path)


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    broken = state(1)
    broken["model"]["weight"][0, 0] = torch.nan
    with pytest.raises(NotFinite, match="model/weight"):
        checkpoint.save(tmp_path / "checkpoints", 1, broken)
    assert load(tmp_path) is None


def test_what_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not set"):
        checkpoint.save(tmp_path / "checkpoints", 1, {"a": {1, 2}})
