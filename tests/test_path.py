"""The order in which penalties are solved, and where each sets out."""

import math
from itertools import pairwise

import pytest
import torch

from stages.evaluation.path import REACH, _shares, _waves


@pytest.mark.parametrize("count", [1, 2, 3, 11, 21, 45, 100])
@pytest.mark.parametrize("spacing", [0.1, math.log(10), math.log(100)])
def test_each_penalty_is_solved_once_and_later_ones_lie_between_solved_ones(count: int, spacing: float) -> None:
    logs = torch.linspace(11, -6, count).mul(math.log(10)).tolist()
    waves = _waves(logs, spacing)
    assert sorted(place for wave in waves for place in wave) == list(range(count))
    assert waves[0] == sorted({0, *waves[0], count - 1})
    inner = waves[0][:-1]
    assert all(logs[left] - logs[right] >= spacing - 1e-3 for left, right in pairwise(inner))
    solved = set(waves[0])
    for wave in waves[1:]:
        assert all(min(solved) < place < max(solved) for place in wave)
        assert not any({place - 1, place + 1} & set(wave) for place in wave)
        solved |= set(wave)


def test_starts_between_solutions_are_exact_for_polynomials_and_beyond_them_for_lines() -> None:
    known = torch.tensor([9.0, 7.5, 6.0, 3.0, 2.5, 1.0], dtype=torch.float64)
    inside, outside = torch.tensor([[8.0, 5.0, 2.6], [9.5, 0.5, 10.0]], dtype=torch.float64)
    # As many points as there are at the ends: two of the first three, and so on.
    for degree in range(REACH + 1):
        torch.testing.assert_close(_shares(known, inside) @ known**degree, inside**degree)
    middle = torch.tensor([5.0], dtype=torch.float64)
    torch.testing.assert_close(_shares(known, middle) @ known ** (2 * REACH - 1), middle ** (2 * REACH - 1))
    for degree in range(2):
        torch.testing.assert_close(_shares(known, outside) @ known**degree, outside**degree)
    far = torch.tensor([-100.0], dtype=torch.float64)
    assert (_shares(known, far) @ known).item() == pytest.approx(1.0 - 2 * 1.5)
    assert _shares(known[:1], inside).tolist() == [[1.0]] * 3
