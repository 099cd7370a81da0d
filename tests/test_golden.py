"""The source of a stage may move only with its stage version, or with its golden outputs unchanged."""

import json
from typing import Any

import golden
import pytest

from stages.settings import STAGES


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return golden.make_outputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.xdist_group("golden")
@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_the_golden_ones(stage: str, outputs: dict[str, Any]) -> None:
    assert golden.verdict(stage, json.loads(golden.GOLDEN.read_text()).get(stage), outputs[stage]) == ""


@pytest.mark.xdist_group("golden")
def test_a_changed_output_is_found(outputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads(golden.GOLDEN.read_text())["pretrain"]
    changed = json.loads(json.dumps(outputs["pretrain"]))
    changed["metrics"][0]["loss"] += 0.01
    assert "raise stage_version" in golden.verdict("pretrain", kept, changed)
    monkeypatch.setattr(golden, "source_hash", lambda stage: "another")
    assert "its source moved" in golden.verdict("pretrain", kept, changed)
    assert golden.verdict("pretrain", kept, outputs["pretrain"]) == "", "moved source with golden outputs is allowed"
    monkeypatch.setattr(type(STAGES["pretrain"]), "version", property(lambda stage: 99))
    assert "make golden" in golden.verdict("pretrain", kept, outputs["pretrain"])


def test_the_source_of_a_stage_holds_what_it_imports() -> None:
    assert golden.source_hash("pretrain") != golden.source_hash("embed")
    assert golden.source_hash("pretrain") == golden.source_hash("pretrain")
