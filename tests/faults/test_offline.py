"""Nothing is ever sent anywhere: recipes run to their end where there is no network, and look for none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from faults.offline import ATTEMPTS
from faults.tally import Tally
from faults.world import make_world

REST = """
  tuned:    {stage: finetune, shards: shards, views: views, encoder: simclr, epochs: 1, batch_size: 4, device: cpu,
             loss: {name: cross_entropy}}
  tested:   {stage: embed, shards: shards, encoder: tuned, device: cpu}
  scores:   {stage: probe, features: tested, label_fractions: [], subsets: [], bootstrap_samples: 100}
  report:   {stage: report, of: [probe, scores, found]}
"""
"""Steps more, so that every stage has one."""


def namespace() -> list[str]:
    """Words before a command by which it has a network of its own, with nothing in it, where this machine allows it."""
    for words in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


def test_a_look_for_another_machine_is_seen(tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    code = "import faults.offline, socket; socket.create_connection(('192.0.2.1', 80))"
    done = subprocess.run([sys.executable, "-c", code], env=_environment(attempts), capture_output=True, text=True)
    assert "there is no network here" in done.stderr
    assert "192.0.2.1" in attempts.read_text()


def test_all_stages_without_a_network(tmp_path: Path, tally: Tally, is_whole: bool) -> None:
    world = make_world(tmp_path / "world")
    recipe = world.here / "toy.yaml"
    recipe.write_text(recipe.read_text() + REST)
    attempts, apart = tmp_path / "attempts", namespace()
    arguments = ["run", "digits"] if is_whole else ["run", "toy.yaml"]
    environment = _environment(attempts) | {"HOME": str(world.top / "home"), "TMPDIR": str(world.top / "tmp")}
    done = subprocess.run(
        [*apart, sys.executable, "-m", "faults.offline", *arguments],
        cwd=world.here, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert not attempts.exists(), attempts.read_text()
    how = "in a network namespace of its own" if apart else "with sockets refused"
    tally.add("no-network", tried=1, held=1, note=f"{'the demo' if is_whole else 'all stages'}, {how}: 0 attempts")


def _environment(attempts: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"PYTHONPATH": path, ATTEMPTS: str(attempts), "OMP_NUM_THREADS": "1"}
