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
@pytest.mark.parametrize("step", golden.STEPS)
def test_outputs_are_the_golden_ones(step: str, outputs: dict[str, Any]) -> None:
    assert golden.verdict(step, json.loads(golden.GOLDEN.read_text()).get(step), outputs[step]) == ""


def test_every_stage_has_golden_outputs() -> None:
    assert set(golden.STEPS.values()) == set(STAGES)
    assert set(json.loads(golden.GOLDEN.read_text())) == set(golden.STEPS)


@pytest.mark.xdist_group("golden")
def test_a_changed_output_is_found(outputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads(golden.GOLDEN.read_text())["lars"]
    changed = json.loads(json.dumps(outputs["lars"]))
    changed["metrics"][0]["loss"] += 0.01
    assert "raise stage_version" in golden.verdict("lars", kept, changed)
    monkeypatch.setattr(golden, "source_hash", lambda stage: "another")
    assert "its source moved" in golden.verdict("lars", kept, changed)
    assert golden.verdict("lars", kept, outputs["lars"]) == "", "moved source with golden outputs is allowed"
    monkeypatch.setattr(type(STAGES["pretrain"]), "version", property(lambda stage: 99))
    assert "make golden" in golden.verdict("lars", kept, outputs["lars"])


@pytest.mark.xdist_group("golden")
def test_reports_hold_every_section(outputs: dict[str, Any]) -> None:
    """Else a section's template could change unseen."""
    probed, unlabelled = outputs["report"]["numbers"], outputs["report_unlabelled"]["numbers"]
    assert all(value for value in probed.values()), [name for name, value in probed.items() if not value]
    assert not unlabelled["probes"]
    retrieved = outputs["report_retrieval"]["numbers"]
    for name in ("retrieval", "retrievals", "retrieved", "retrieval_protocol"):
        assert retrieved[name]
        assert name not in probed
    assert not unlabelled["data"][0]["classes"] or not unlabelled["data"][1]["classes"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (
            "<p>better by +4.1 points (\N{MINUS SIGN}0.3 to 1,234.5), 2.5e-05</p>",
            "<p>better by # points (# to #), #</p>",
        ),
        ("foreign:0a1b2c3d4e and 0.12345678901234", "foreign:# and #"),
        ('<img src="data:image/png;base64,AbC1+/=" width="48">', '<img src="data:image" width="#">'),
    ],
)
def test_what_processors_and_libraries_change_is_masked(text: str, masked: str) -> None:
    assert golden._masked(text) == masked


def test_the_source_of_a_stage_holds_what_it_imports_and_its_templates() -> None:
    names = {
        stage: {path.relative_to(golden.TOP).as_posix() for path in golden.source_files(stage)} for stage in STAGES
    }
    assert "stages/reports/templates/sections/health.html.j2" in names["report"]
    assert "stages/reports/templates/style.css" in names["report"]
    assert {"stages/pretrain.py", "stages/settings/pretrain.py", "stages/views/draws.py"} <= names["pretrain"]
    assert not any(name.startswith("stages/reports/") for name in names["embed"])
    assert len({golden.source_hash(stage) for stage in STAGES}) == len(STAGES)
