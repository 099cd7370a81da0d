"""The JSON schema accepts what the recipe reader accepts, and refuses what it refuses."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.schema import recipe_schema
from stages.settings import STAGES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCHEMA = recipe_schema(STAGES)


def read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text().replace("1e-4", "0.0001"))


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_fit(path: Path) -> None:
    jsonschema.validate(read(path.stem), SCHEMA)


@pytest.mark.parametrize(
    ("step", "key", "value"),
    [
        ("simclr", "epochs", 0),
        ("simclr", "epoch", 3),
        ("views", "preset", "unnatural"),
        ("shards", "source", "s3:bucket"),
        ("probe", "stage", "prove"),
    ],
)
def test_faults_are_refused(step: str, key: str, value: Any) -> None:
    recipe = read("digits")
    recipe["steps"][step][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, SCHEMA)


def test_every_setting_is_documented() -> None:
    for name, stage in STAGES.items():
        assert stage.settings.__doc__, name
        properties = SCHEMA["$defs"][f"step_{name}"]["properties"]
        missing = [key for key, entry in properties.items() if key != "stage" and not entry.get("description")]
        assert not missing, f"{name}: {missing}"
