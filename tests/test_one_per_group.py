"""One image of every group an epoch: the schedule, and pretraining by it."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RunStage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_pretrain import TINY

from pipeline.errors import UsageError
from stages.images.schedule import OnePerGroup

GROUPS = np.array([5, 5, 7, 8, 8, 8, 9, 10, 11, 11])


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=80),
    st.integers(0, 2**63 - 1),
    st.integers(1, 8),
    st.integers(0, 50),
)
def test_an_epoch_has_no_group_twice(groups: list[int], seed: int, batch_size: int, epoch: int):
    count = len(set(groups))
    schedule = OnePerGroup(seed, np.array(groups), min(batch_size, count))
    steps = schedule.steps_per_epoch
    assert steps == count // min(batch_size, count)
    batches = [schedule.positions(epoch * steps + step) for step in range(steps)]
    seen = [groups[position] for batch in batches for position in batch]
    assert {len(batch) for batch in batches} == {min(batch_size, count)}
    assert len(set(seen)) == len(seen)


def test_the_members_of_a_group_take_turns():
    schedule = OnePerGroup(3, GROUPS, 3)
    counts = Counter(int(position) for step in range(1200) for position in schedule.positions(step))
    by_group = defaultdict(list)
    for position, group in enumerate(GROUPS):
        by_group[int(group)].append(counts[position])
    assert {sum(times) for times in by_group.values()} == {600}
    for times in by_group.values():
        # Five standard deviations of a binomial draw.
        assert max(abs(one - 600 / len(times)) for one in times) < 5 * (600 * 0.25) ** 0.5
    pairs = Counter(
        (int(first[GROUPS[first] == 5][0]), int(first[GROUPS[first] == 11][0]))
        for epoch in range(400)
        if (first := np.concatenate([schedule.positions(2 * epoch), schedule.positions(2 * epoch + 1)])).size
    )
    assert len(pairs) == 4, "groups of equal size are drawn apart from one another"
    assert min(pairs.values()) > 60


def test_it_is_a_function_of_seed_and_step():
    schedule, again, other = (OnePerGroup(seed, GROUPS, 3) for seed in (1, 1, 2))
    steps = [17, 0, 5, 17]
    assert [schedule.positions(step).tolist() for step in steps] == [again.positions(step).tolist() for step in steps]
    assert [schedule.positions(step).tolist() for step in range(9)] != [
        other.positions(step).tolist() for step in range(9)
    ]
    with pytest.raises(ValueError, match="batch_size must be 1 to 6, the number of groups, not 7"):
        OnePerGroup(0, GROUPS, 7)


@pytest.fixture
def inputs(tmp_path: Path, run_stage: RunStage) -> dict[str, Path]:
    """Six groups of four images."""
    (tmp_path / "images").mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/g{number // 4}_{number}.png")
    source = {"source": f"folder:{tmp_path / 'images'}", "test_fraction": 0.0, "group_pattern": "^g."}
    shards = run_stage("shard", source)
    views = run_stage("augment", {"preset": "text", "image_size": 8, "contact_sheet_images": 1}, {"shards": shards})
    return {"shards": shards, "views": views}


def test_pretraining_sees_one_image_of_a_group(
    run_stage: RunStage, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    settings: dict[str, Any] = TINY | {"batch_size": 6, "epochs": 3, "online_probe": False}
    hint = "`one_per_group: true` keeps them apart"
    run_stage("pretrain", settings | {"one_per_group": True}, inputs)
    said = capsys.readouterr().err
    assert "24 images, 3 steps of 6" in said
    assert hint not in said
    run_stage("pretrain", settings, inputs)
    said = capsys.readouterr().err
    assert "24 images, 12 steps of 6" in said
    assert hint in said
    with pytest.raises(UsageError, match="batch_size: 8 is more than the 6 groups of training images; set it to 6"):
        run_stage("pretrain", settings | {"one_per_group": True, "batch_size": 8}, inputs)
