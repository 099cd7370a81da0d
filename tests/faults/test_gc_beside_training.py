"""Gc beside a training that writes checkpoints, and whose input is no longer the newest of its name."""

import random
import time

import pytest

from faults.small import STAGE_OF, TRAINED, Small, contents, run_of
from faults.tally import Tally
from faults.zygote import Zygote

pytestmark = pytest.mark.xdist_group("kills")

SEED = 21
ROUNDS = 20


def test_gc_takes_nothing_from_a_training(zygote: Zygote, small: Small, is_whole: bool, tally: Tally) -> None:
    """It ends with the bytes that it has without gc, though views made since stand between its own and the name."""
    numbers, sweeps, rounds = random.Random(SEED), 0, ROUNDS if is_whole else 1
    for number in range(rounds):
        step = TRAINED[number % len(TRAINED)]
        store = small.store_before(step, "swept")
        newer = [*run_of("views", store), "--set", "views.image_size=9"]
        code, said = zygote.run(newer, small.folder)
        assert code == 0, said
        training = zygote.start(run_of(step, store), small.folder)
        while training.is_running():
            time.sleep(numbers.uniform(0, 0.2))
            code, said = zygote.run(
                ["gc", "--keep", "1", "--grace", "0", "--apply", "--store", str(store)], small.folder
            )
            assert code == 0, f"seed {SEED}, round {number}: {said}"
            sweeps += 1
        assert training.wait() == 0, f"seed {SEED}, round {number}: {training.said}"
        made = f"builds/{STAGE_OF[step]}/"
        expected = {path: digest for path, digest in small.after[step].items() if path.startswith(made)}
        assert {path: digest for path, digest in contents(store).items() if path.startswith(made)} == expected
    assert sweeps > rounds
    tally.add("gc", tried=rounds, held=rounds, note=f"rounds beside a training with checkpoints, {sweeps} times gc")
