import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.images import Order, order

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 10_000)


@given(seeds, epochs, st.integers(0, 3000))
def test_it_is_a_permutation(seed: int, epoch: int, length: int):
    positions = order(seed, epoch, length)[np.arange(length)]
    assert positions.dtype == np.int64
    assert np.array_equal(np.sort(positions), np.arange(length))


@given(seeds, epochs, st.integers(1, 2000), st.data())
def test_any_part_equals_that_part_of_the_whole(seed: int, epoch: int, length: int, data: st.DataObject):
    whole = order(seed, epoch, length)[:]
    wanted = data.draw(st.lists(st.integers(0, length - 1), max_size=20))
    assert order(seed, epoch, length)[wanted].tolist() == whole[np.array(wanted, dtype=int)].tolist()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
    assert np.array_equal(order(seed, epoch, length)[start:stop], whole[start:stop])


@given(seeds, epochs, st.integers(30, 5000))
def test_seeds_and_epochs_differ(seed: int, epoch: int, length: int):
    whole = order(seed, epoch, length)[:]
    assert not np.array_equal(whole, np.arange(length))
    assert not np.array_equal(whole, order(seed, epoch + 1, length)[:])
    assert not np.array_equal(whole, order(seed + 1, epoch, length)[:])
    # Seed and epoch do not stand for one another.
    assert not np.array_equal(whole, order(seed + 1, epoch - 1, length)[:])


def test_the_shape_of_the_positions_is_kept():
    one = order(0, 0, 100)
    assert one[np.zeros((2, 3), int)].shape == (2, 3)
    assert one[7] == one[:][7]
    assert one[[]].shape == (0,)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int):
    with pytest.raises(IndexError, match="from 0 to 9"):
        order(0, 0, 10)[[0, position]]


@pytest.mark.parametrize("length", [-1, 2**60 + 1])
def test_lengths_outside_are_refused(length: int):
    with pytest.raises(ValueError, match="2\\*\\*60"):
        Order(0, 0, length)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_short_permutations_are_all_about_equally_frequent(length: int):
    draws = 800
    seen = Counter(tuple(order(seed, 0, length)[:].tolist()) for seed in range(draws))
    permutations = int(np.prod(np.arange(1, length + 1)))
    expected = draws / permutations
    statistic = sum((count - expected) ** 2 / expected for count in seen.values())
    statistic += (permutations - len(seen)) * expected
    # Chi-squared has mean k and variance 2 k for k degrees of freedom; five standard deviations.
    freedom = permutations - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("length", [1000, 4096, 60_000])
def test_positions_are_unrelated_to_samples(length: int):
    places = np.arange(length)
    whole = order(3, 1, length)[:]
    assert abs(np.corrcoef(places, whole)[0, 1]) < 5 / np.sqrt(length)
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 5 / np.sqrt(length)
    # The first tenth of an epoch draws from all parts alike.
    counts = np.histogram(whole[: length // 10], bins=10, range=(0, length))[0]
    assert np.abs(counts - length / 100).max() < 6 * np.sqrt(length / 100)


@pytest.mark.parametrize("length", [100_000_000, 2**40, 2**60])
def test_a_huge_epoch_starts_anywhere_at_once(length: int):
    seconds = []
    for _ in range(5):  # a busy host may be slow at one of them
        started = time.perf_counter()
        positions = order(0, 5, length)[length - 4096 :]
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
    assert len(set(positions.tolist())) == 4096
    assert positions.min() >= 0
    assert positions.max() < length


def test_the_order_stays_what_it_was():
    """A changed order would silently change every training run."""
    assert order(0, 0, 10)[:].tolist() == [4, 2, 5, 0, 8, 6, 7, 1, 3, 9]
    assert order(7, 3, 1_000_000)[[0, 1, 999_999]].tolist() == [308298, 657319, 397692]
