from pathlib import Path

import pytest

from faults import accelerate_saves
from faults.tally import Tally

SEED = 6


@pytest.mark.whole
def test_accelerate_under_the_same_faults(tmp_path: Path, tally: Tally) -> None:
    """Counts, for the table, what damage and a full disk do to checkpoints of Accelerate's `save_state`."""
    seen = accelerate_saves.run(tmp_path, damages=100, disks=50, seed=SEED)
    for kind, counts in seen.items():
        assert counts["tried"] == counts["error"] + counts["same"] + counts["other"] > 0
        tried = counts["tried"]
        if kind == "disk full":
            note = f"(all were kept): the latest did not load {counts['error']} times, and had other values"
            note += f" {counts['other']} times"
            tally.add("disk-full", subject="accelerate", tried=tried, held=counts["same"], note=note)
        else:
            note = f"{kind}; {counts['other']} loaded other values without a word; none fell back to an older one"
            held = counts["error"] + counts["same"]  # told, or without consequence
            tally.add("checkpoint-damage", subject="accelerate", tried=tried, held=held, note=note)
