"""What all comparisons in benchmarks/ share."""

import json
import os

import pytest
import torch

from benchmarks.harness import Comparison, Row, alternate, exponent, fastest, in_own_process, peak_bytes, report


def test_contenders_alternate_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    medians = alternate({"ours": lambda: calls.append("o"), "peer": lambda: calls.append("p")}, 3, warm_up=1)
    assert "".join(calls) == "opopopop"
    assert set(medians) == {"ours", "peer"}
    assert all(value >= 0 for value in medians.values())


def test_no_new_round_starts_when_the_time_is_up() -> None:
    calls: list[str] = []
    alternate({"ours": lambda: calls.append("o")}, 100, warm_up=1, most_seconds=0.0)
    assert len(calls) == 2


def test_a_peers_best_setting_is_the_fastest() -> None:
    name, work = fastest({"slow": lambda: torch.zeros(2**22).sort(), "quick": lambda: None})
    assert name == "quick"
    assert work() is None


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_is_the_slope_of_the_logarithms(power: float) -> None:
    sizes = [10.0, 100.0, 1000.0]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def touch(count: int, *, warm_up: bool) -> None:
    torch.ones(1 if warm_up else count, dtype=torch.uint8).max()


def test_peak_memory_is_that_of_the_work_alone() -> None:
    size = 2**27
    assert 0.9 * size < peak_bytes(touch, size) < 1.5 * size


def test_the_last_line_of_stdout_is_json_with_the_headlines_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("small", {"ours": 1.0, "peer": 3.0}), Row("large", {"ours": 2.0, "peer": 8.0}, {"peer": "2 workers"})]
    report(Comparison("name", "s", "large", rows, {"peer": 4.0}, limit=1.5, runs=3))
    out, err = capsys.readouterr()
    line = json.loads(out.splitlines()[-1])
    assert (line["ours"], line["peers"], line["ratio"], line["limit"]) == (2.0, {"peer": 8.0}, {"peer": 4.0}, 1.5)
    assert {"name", "unit", "runs", "device", "versions", "commit"} <= line.keys()
    assert "large: peer at its best: 2 workers" in err


def place_of(name: str) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get(name)


def test_a_contender_of_its_own_process_finds_what_ours_are_started_with() -> None:
    before = dict(os.environ)
    theirs, plain = in_own_process(place_of, "GOMP_SPINCOUNT")
    ours, waits = in_own_process(place_of, "GOMP_SPINCOUNT", like_simclr=True)
    assert os.getpid() not in (theirs, ours)
    assert (plain, waits) == (before.get("GOMP_SPINCOUNT"), before.get("GOMP_SPINCOUNT", "3000"))
    assert dict(os.environ) == before
