"""Fixtures of the tests that inject faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.places import make_digits
from faults.small import Small, make_small
from faults.tally import Tally
from faults.zygote import Zygote


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what counts what others do, and promises nothing of ours, where a part of the trials runs."""
    if not config.getoption("--all-faults"):
        left = [one for one in items if one.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=left)
        items[:] = [one for one in items if one not in left]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs commands in forked processes."""
    one = Zygote()
    yield one
    one.close()


@pytest.fixture(scope="session")
def small(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A recipe with every stage, run once without a fault."""
    return make_small(zygote, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def digits(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the first steps of some recipes are done; to be copied."""
    return make_digits(zygote, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def is_whole(pytestconfig: pytest.Config) -> bool:
    """Whether all trials run, as by `make test-faults`, or a part of them, as by `make test`."""
    return bool(pytestconfig.getoption("--all-faults"))


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    """Takes the counts, if `--tally FILE` asks for them."""
    return Tally(pytestconfig.getoption("--tally"))
