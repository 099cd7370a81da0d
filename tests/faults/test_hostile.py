"""What must not get in: each hostile input is refused within a second, by file and field, and nothing of it runs."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from faults.corpus import CORPUS, Hostile
from faults.tally import Tally
from faults.world import World, copy_world, make_finished, make_world
from faults.zygote import Zygote

LONGEST = 1.0
"""Seconds of the processor that a refusal may take, from the fork on: what commands import is there by then."""
LONGEST_WAIT = 20.0
"""Seconds by the clock: where it waits for something that does not come, the processor does not show it."""
REFUSALS = {2, 4, 5, 6}
"""Exit codes of what the user brought: usage, a damaged artifact, no usable checkpoint, bad data."""
PART = 4
"""`make test` tries every fourth."""

pytestmark = pytest.mark.xdist_group("hostile")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hostile" in metafunc.fixturenames:
        chosen = CORPUS if metafunc.config.getoption("--all-faults") else CORPUS[::PART]
        metafunc.parametrize("hostile", chosen, ids=lambda one: one.name)


@dataclass
class Seen:
    """Inputs that were tried, and the seconds of those that were refused."""

    tried: int = 0
    seconds: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tally: Tally) -> Iterator[Seen]:
    found = Seen()
    yield found
    slowest = f"0 executed, 0 bytes outside, the slowest {max(found.seconds, default=0):.2f} s"
    tally.add("hostile", tried=found.tried, held=len(found.seconds), note=slowest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> World:
    return make_finished(tmp_path_factory.mktemp("finished") / "world", zygote)


def test_a_hostile_input_is_refused(
    hostile: Hostile, request: pytest.FixtureRequest, tmp_path: Path, zygote: Zygote, seen: Seen
) -> None:
    top = tmp_path / "world"
    world = copy_world(request.getfixturevalue("finished"), top) if hostile.needs_store else make_world(top)
    command = hostile.bring(world)
    before = world.outside()
    seen.tried += 1
    trial = zygote.start(command, world.here, environment=world.environment(), output=tmp_path / "said")
    code = trial.wait(LONGEST_WAIT)
    assert not world.canary.exists(), f"it ran: {trial.said}"
    assert world.outside() == before, trial.said
    assert code in REFUSALS, trial.said
    assert "Traceback" not in trial.said
    assert all(word in trial.said for word in hostile.told), f"{hostile.told}\n{trial.said}"
    seconds = trial.processor_seconds
    assert seconds is not None
    assert seconds <= LONGEST, f"{seconds} s"
    seen.seconds.append(seconds)
    shutil.rmtree(top)
