"""Damaged checkpoints are found before use: training falls back to the one before and says what that costs.

None that can be used is an error, and never a silent start from nothing.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import assert_equal
from test_checkpoint import state as tiny_state

from faults.damage import DAMAGES, flip_bit
from faults.places import DIGITS, Place
from faults.states import trained
from faults.tally import Tally
from faults.zygote import Zygote
from pipeline import checkpoint
from pipeline.errors import NoUsableCheckpoint

SEED = 6
FILES = ("files/state.safetensors", "files/state.json", "manifest.json")
OLDER, NEWEST = 4, 8


def save_two(folder: Path, state: Callable[[int], Any]) -> Path:
    for step in (OLDER, NEWEST):
        checkpoint.save(folder / "checkpoints", step, state(step))
    return folder


def place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:09d}"


def load(folder: Path) -> checkpoint.Checkpoint | None:
    return checkpoint.load_latest(folder / "checkpoints", folder / "quarantine", NEWEST)


def assert_falls_back(folder: Path, expected: Any, harm: str) -> None:
    found = load(folder)
    assert found is not None, harm
    assert (found.step, found.steps_lost, len(found.damaged)) == (OLDER, NEWEST - OLDER, 1), f"{harm}: {found.damaged}"
    assert place(folder, NEWEST).name in found.damaged[0], harm
    assert not place(folder, NEWEST).exists(), harm
    assert_equal(expected, found.state)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a small encoder with its optimiser."""
    return save_two(tmp_path_factory.mktemp("two"), trained)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken(
    two: Path, tmp_path: Path, is_whole: bool, tally: Tally, kind: str
) -> None:
    draw = random.Random(f"{SEED} {kind}")
    expected, trials = trained(OLDER), 100 if is_whole else 12
    for number in range(trials):
        folder = shutil.copytree(two, tmp_path / str(number))
        harm = DAMAGES[kind](place(folder, NEWEST) / draw.choice(FILES), draw)
        assert_falls_back(folder, expected, f"seed {SEED}, trial {number}: {harm}")
        shutil.rmtree(folder)
    tally.add("checkpoint-damage", tried=trials, held=trials, note=kind)


@pytest.mark.parametrize("kind", DAMAGES)
def test_two_damaged_ones_are_an_error_and_stay_one(
    two: Path, tmp_path: Path, is_whole: bool, tally: Tally, kind: str
) -> None:
    draw = random.Random(f"{SEED} both {kind}")
    trials = 34 if is_whole else 4
    for number in range(trials):
        folder = shutil.copytree(two, tmp_path / str(number))
        harms = [DAMAGES[kind](place(folder, step) / draw.choice(FILES), draw) for step in (OLDER, NEWEST)]
        for _ in range(2):
            with pytest.raises(NoUsableCheckpoint, match="--fresh"):
                pytest.fail(f"seed {SEED}, trial {number}, {harms}: {load(folder)}")
        shutil.rmtree(folder)
    tally.add("checkpoint-damage", tried=trials, held=trials, note=f"both {kind}: exit 5")


def test_every_bit_of_a_manifest_counts(tmp_path: Path, is_whole: bool, tally: Tally) -> None:
    """No digest from elsewhere guards it: whatever a bit makes of names, sizes and hashes has to be told apart."""
    two, expected = save_two(tmp_path / "two", tiny_state), tiny_state(OLDER)
    bits = 8 * (place(two, NEWEST) / "manifest.json").stat().st_size
    numbers = range(0, bits, 1 if is_whole else 29)
    for number in numbers:
        folder = shutil.copytree(two, tmp_path / "damaged")
        harm = flip_bit(place(folder, NEWEST) / "manifest.json", number)
        assert_falls_back(folder, expected, harm)
        shutil.rmtree(folder)
    tally.add("checkpoint-damage", tried=len(numbers), held=len(numbers), note="each bit of a manifest")


def test_manifests_of_another_shape_are_damage(tmp_path: Path) -> None:
    two, expected = save_two(tmp_path / "two", tiny_state), tiny_state(OLDER)
    for content in ("", "[]", "{}", "1", '{"files":[]}', '{"files":{"state.json":3}}', '{"files":{"state.json":{}}}'):
        folder = shutil.copytree(two, tmp_path / "damaged")
        (place(folder, NEWEST) / "manifest.json").write_text(content)
        assert_falls_back(folder, expected, content)
        shutil.rmtree(folder)


# What becomes of whole folders, beside what becomes of files.


def empty_folder(folder: Path) -> None:
    shutil.rmtree(place(folder, NEWEST))
    place(folder, NEWEST).mkdir()


def no_folder(folder: Path) -> None:
    shutil.rmtree(place(folder, NEWEST))


def file_in_its_place(folder: Path) -> None:
    shutil.rmtree(place(folder, NEWEST))
    place(folder, NEWEST).write_text("a file")


def file_added(folder: Path) -> None:
    (place(folder, NEWEST) / "files" / "state.json~").write_text("{}")


def file_of_that_name_in_quarantine(folder: Path) -> None:
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / place(folder, NEWEST).name).write_text("from before")
    (place(folder, NEWEST) / FILES[0]).unlink()


def folder_of_that_name_in_quarantine(folder: Path) -> None:
    shutil.copytree(place(folder, OLDER), folder / "quarantine" / place(folder, NEWEST).name)
    (place(folder, NEWEST) / FILES[1]).write_bytes(b"{")


def things_beside_it(folder: Path) -> None:
    """Copies that somebody made by hand, which are no checkpoints, and would sort as newer ones."""
    for name in ("step-000000008 (copy)", "step-old", "step-999999999.tar"):
        shutil.copytree(place(folder, NEWEST), folder / "checkpoints" / name)
    (place(folder, NEWEST) / FILES[2]).write_bytes(b"")


FOLDERS = (
    empty_folder,
    no_folder,
    file_in_its_place,
    file_added,
    file_of_that_name_in_quarantine,
    folder_of_that_name_in_quarantine,
    things_beside_it,
)


@pytest.mark.parametrize("harm", FOLDERS)
def test_damage_of_folders_is_found_as_well(two: Path, tmp_path: Path, tally: Tally, harm: Any) -> None:
    folder = shutil.copytree(two, tmp_path / "damaged")
    harm(folder)
    assert_falls_back(folder, trained(OLDER), harm.__name__)
    tally.add("checkpoint-damage", tried=1, held=1, note="folders")


# The command itself

RECIPE = f"""
name: saved
steps:{DIGITS}
  simclr:
    stage: pretrain
    shards: shards
    views: views
    architecture: {{backbone: resnet10, width: 4}}
    optimiser: {{name: sgd, learning_rate: 0.1}}
    projector: {{layers: 2, hidden: 8, dimension: 8}}
    epochs: 1
    max_steps: 14
    batch_size: 64
    checkpoint_every_steps: 4
"""
RUN = ["run", "saved.yaml", "--store", "store"]


def digest(zygote: Zygote, folder: Path) -> str:
    code, said = zygote.run(["show", "simclr", "--json", "--store", "store"], folder)
    assert code == 0, said
    return json.loads(said)["digest"]


@pytest.fixture(scope="module")
def killed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, str]:
    """A store in which training was killed with steps 4 and 8 saved, and the digest that it comes to otherwise."""
    folder = tmp_path_factory.mktemp("killed")
    Place(zygote, folder, RECIPE, digits).new("store")
    whole = shutil.copytree(folder, tmp_path_factory.mktemp("whole") / "folder")
    assert zygote.run(RUN, whole)[0] == 0
    assert zygote.run(RUN, folder, failpoint="checkpoint.folder:3")[0] == -9
    assert [path.name for path in sorted(work(folder).glob("checkpoints/step-*"))] == [
        place(folder, OLDER).name,
        place(folder, NEWEST).name,
    ]
    return folder, digest(zygote, whole)


def work(folder: Path) -> Path:
    return next((folder / "store" / "work" / "pretrain").iterdir())


def harm_file(name: str, kind: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        DAMAGES[kind](place(folder, NEWEST) / name, random.Random(SEED))

    return harm


ENDS: dict[str, Callable[[Path], None]] = {
    "tensors truncated": harm_file(FILES[0], "truncated"),
    "values with a bit flipped": harm_file(FILES[1], "bit flipped"),
    "manifest missing": harm_file(FILES[2], "missing"),
    "tensors with a bit flipped": harm_file(FILES[0], "bit flipped"),
    **{harm.__name__: harm for harm in FOLDERS},
}


def test_a_run_goes_on_from_the_one_before_and_ends_as_ever(
    zygote: Zygote, killed: tuple[Path, str], tmp_path: Path, is_whole: bool, tally: Tally
) -> None:
    before, expected = killed
    ends = ENDS if is_whole else {name: ENDS[name] for name in ("tensors truncated", "file_in_its_place")}
    for name, harm in ends.items():
        folder = shutil.copytree(before, tmp_path / name)
        harm(work(folder))
        code, said = zygote.run(RUN, folder)
        assert code == 0, f"{name}: {said}"
        assert "checkpoint set aside: step-000000008: " in said, name
        assert "4 steps are lost with that, and are done again" in said, name
        assert "resumes after step 4 of 14" in said, name
        assert digest(zygote, folder) == expected, name
    tally.add("checkpoint-damage", tried=len(ends), held=len(ends), note="whole runs: bytes equal in the end")


def no_folders(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def file_for_all(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("a file")


def both(folder: Path) -> None:
    for step in (OLDER, NEWEST):
        flip_bit(place(folder, step) / FILES[0], 8 * 5000)


def test_a_run_without_a_usable_checkpoint_stops_until_it_is_told_to_start_again(
    zygote: Zygote, killed: tuple[Path, str], tmp_path: Path, is_whole: bool, tally: Tally
) -> None:
    before, expected = killed
    harms = (both, no_folders, file_for_all) if is_whole else (both,)
    for harm in harms:
        folder = shutil.copytree(before, tmp_path / harm.__name__)
        harm(work(folder))
        for _ in range(2):
            code, said = zygote.run(RUN, folder)
            assert (code, "no usable checkpoint" in said, "--fresh" in said) == (5, True, True), f"{harm}: {said}"
        # Killed before its first checkpoint, a fresh start is one still when it is tried again.
        assert zygote.run([*RUN, "--fresh"], folder, failpoint="checkpoint.folder:1")[0] == -9
        code, said = zygote.run(RUN, folder)
        assert (code, "resumes" in said) == (0, False), said
        assert digest(zygote, folder) == expected
    tally.add("checkpoint-damage", tried=len(harms), held=len(harms), note="whole runs: exit 5 until --fresh")
