from collections.abc import Mapping
from pathlib import Path

import pytest

from faults.page import COSTS, PEERS, ROWS, write_page
from faults.tally import Tally

WHOLE = ROWS | COSTS


def kinds_of(row: str) -> Mapping[str, int]:
    least = WHOLE[row].least
    return least if isinstance(least, Mapping) else {"": least}


KINDS = [(row, kind) for row in WHOLE for kind in kinds_of(row)]


def tallied(folder: Path, *, less: tuple[str, str] = ("", ""), without: tuple[str, str] = ("", "")) -> Path:
    """Counts of every row, each in two parts.

    Args:
        less: a row and a kind, of which one trial is missing.
        without: a row and a peer that was not tried.
    """
    tally = Tally(folder / "tally")
    for row, one in WHOLE.items():
        for kind, least in kinds_of(row).items():
            of_others = sum(kinds_of(row).values()) - least if not kind and len(kinds_of(row)) > 1 else 0
            tried = least - of_others - ((row, kind) == less)
            for part in (tried // 2, tried - tried // 2):
                tally.add(row, tried=part, held=part, note=f"{kind} 0.3% | of it")
        for peer in one.peers:
            if (row, peer) != without:
                tally.add(row, tried=9, held=5, subject=peer, note="of it")
    return folder / "tally"


def test_the_page_has_a_line_for_every_row_with_sums_and_peers(tmp_path: Path) -> None:
    write_page(tallied(tmp_path), tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for row, kind in KINDS:
        least = kinds_of(row)[kind]
        if row in ROWS and kind:
            assert f" {least:,} of {least:,} {kind} 0.3% \\| of it" in page
    assert page.count("0.3% \\| of it |") >= len(WHOLE) - sum(bool(one.peers) for one in WHOLE.values())
    assert "| 5 of 9 of it |  |" in page
    assert "|  | webdataset: 5 of 9 of it; torch.load: 5 of 9 of it |" in page
    assert {peer for one in WHOLE.values() for peer in one.peers} == {*PEERS}


@pytest.mark.parametrize(("row", "kind"), KINDS)
def test_a_row_that_was_tried_too_little_is_an_error(row: str, kind: str, tmp_path: Path) -> None:
    """One trial less than all, as after `make test` or a run of some of the tests."""
    with pytest.raises(ValueError, match=f"row {row}: .* of at least .*: run `make test-faults`") as told:
        write_page(tallied(tmp_path, less=(row, kind)), tmp_path / "page.md")
    assert "\n" not in str(told.value)
    assert repr(kind) in str(told.value) or not kind
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(("row", "peer"), [(row, peer) for row, one in WHOLE.items() for peer in one.peers])
def test_a_row_without_its_peer_is_an_error(row: str, peer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"row {row}: no trials with {peer}"):
        write_page(tallied(tmp_path, without=(row, peer)), tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_a_row_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    Tally(tallied(tmp_path)).add("kil", tried=1, held=1)
    with pytest.raises(ValueError, match="row kil is none"):
        write_page(tmp_path / "tally", tmp_path / "page.md")


def test_trials_of_others_alone_do_not_count(tmp_path: Path) -> None:
    Tally(tallied(tmp_path, less=("gc", "killed"))).add("gc", tried=1, held=1, subject="accelerate", note="killed")
    with pytest.raises(ValueError, match="row gc: 19 trials 'killed' of at least 20"):
        write_page(tmp_path / "tally", tmp_path / "page.md")
