"""A lease that nobody holds any more is taken over, whatever its holder left of it."""

import socket
from pathlib import Path

import pytest

from pipeline.workplace import Workplace


@pytest.mark.parametrize("written", ["", "\x00\x00"])
def test_a_lease_of_a_process_that_was_killed_before_it_wrote_to_it_is_taken_over(written: str, tmp_path: Path) -> None:
    (tmp_path / "lease").write_text(written)
    work = Workplace(tmp_path)
    with work.held():
        assert f"host={socket.gethostname()}\n" in (tmp_path / "lease").read_text()
        work.require_held()
    assert not (tmp_path / "lease").exists()
