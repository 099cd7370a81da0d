"""Where the time of a step goes."""

import re
import time
from pathlib import Path

import toy_stages

from pipeline.progress import Reporter
from pipeline.run import Run
from pipeline.stopwatch import WARM_UP_STEPS, Stopwatch
from pipeline.training import Training
from pipeline.workplace import Workplace


def test_parts_and_the_rest_add_up_to_a_step_and_the_first_steps_do_not_count() -> None:
    stopwatch = Stopwatch(lambda: None)
    for step in range(WARM_UP_STEPS + 5):
        stopwatch.begin_step()
        with stopwatch.part("short"):
            time.sleep(0.2 if step < WARM_UP_STEPS else 0.004)
        with stopwatch.part("long"):
            time.sleep(0.016)
        time.sleep(0.008)
    stopwatch.begin_step()
    words = stopwatch.in_words()
    found = re.fullmatch(r"a step took ([\d.]+) ms, mean of 5: (.*)", words)
    assert found, words
    parts = dict(re.findall(r"(short|long|the rest) ([\d.]+) ms", found[2]))
    assert list(parts) == ["long", "short", "the rest"]
    assert abs(sum(map(float, parts.values())) - float(found[1])) < 0.3
    assert 4 <= float(parts["short"]) < 100
    assert float(parts["long"]) >= 16
    assert float(parts["the rest"]) >= 8


def test_too_few_steps_are_said(tmp_path: Path) -> None:
    stopwatch = Stopwatch(lambda: None)
    for _ in range(WARM_UP_STEPS + 1):
        stopwatch.begin_step()
    assert stopwatch.in_words() == f"no profile: it takes more than {WARM_UP_STEPS + 1} steps"


def test_training_says_it_at_its_end_if_asked(tmp_path: Path) -> None:
    for profile in (False, True):
        folder = tmp_path / str(profile)
        (folder / "out").mkdir(parents=True)
        run = Run(
            recipe="test", step="step", seed=0, settings=toy_stages.Train(numbers="numbers", steps=8), inputs={},
            ancestors=[], out=folder / "out", work=Workplace(folder), trackers=folder, reporter=Reporter("step"),
            profile=profile,
        )  # fmt: skip
        with Training(run, {}, steps=8, steps_per_epoch=8, images_per_step=1) as training:
            for step, _ in training.steps(lambda step: step):
                with training.part("thinking"):
                    training.record(loss=float(step))
        said = [line for line in run.reporter.messages if line.startswith("a step took")]
        assert len(said) == profile
        assert all("mean of 5: " in line and "thinking" in line and "waiting for data" in line for line in said)
