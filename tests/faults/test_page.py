from pathlib import Path

import pytest

from faults.page import COSTS, PEERS, ROWS, write_page
from faults.tally import Tally


def tallied(folder: Path, without: str = "") -> Path:
    """Counts of every row, but one."""
    tally = Tally(folder / "tally")
    for row in ROWS | COSTS:
        if row != without:
            tally.add(row, tried=3, held=3, note="0.3% | of it" if row in COSTS else "at once")
            tally.add(row, tried=4, held=4, note="0.3% | of it" if row in COSTS else "at once")
    for peer in PEERS:
        tally.add("kill-save", tried=9, held=5, subject=peer, note="of it")
    return folder / "tally"


def test_the_page_has_a_line_for_every_row_with_sums_and_peers(tmp_path: Path) -> None:
    write_page(tallied(tmp_path), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.count("| 7 of 7 at once |") == len(ROWS)
    assert page.count("| 0.3% \\| of it |") == len(COSTS)
    assert "| 7 of 7 at once | 5 of 9 of it | webdataset: 5 of 9 of it; torch.load: 5 of 9 of it |" in page


@pytest.mark.parametrize("row", ["kill", "cost-guard"])
def test_a_row_that_was_not_tried_is_an_error(row: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"row {row} was not tried"):
        write_page(tallied(tmp_path, without=row), tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_row_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    Tally(tallied(tmp_path)).add("kil", tried=1, held=1)
    with pytest.raises(ValueError, match="row kil is none"):
        write_page(tmp_path / "tally", tmp_path / "page.md")


def test_trials_of_others_alone_do_not_count(tmp_path: Path) -> None:
    Tally(tallied(tmp_path, without="gc")).add("gc", tried=1, held=1, subject="accelerate")
    with pytest.raises(ValueError, match="row gc was not tried"):
        write_page(tmp_path / "tally", tmp_path / "page.md")
