import signal
from pathlib import Path

from faults.zygote import Zygote


def test_a_command_ends_as_it_would_by_itself(zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.run(["ls"], tmp_path)[0] == 0
    code, said = zygote.run(["show", "nothing"], tmp_path)
    assert (code, "nothing" in said) == (2, True)


def test_a_failpoint_kills_the_command_and_nothing_else(zygote: Zygote, tmp_path: Path) -> None:
    recipe = 'name: one\nsteps: {shards: {stage: shard, source: "sklearn:digits"}}\n'
    (tmp_path / "one.yaml").write_text(recipe)
    assert zygote.run(["run", "one.yaml"], tmp_path, failpoint="commit.rename:1")[0] == -signal.SIGKILL
    assert zygote.run(["run", "one.yaml"], tmp_path)[0] == 0
