"""What a result was made with, for the record."""

import json

from pipeline.environment import code, environment


def test_code_and_environment_are_plain_data() -> None:
    assert len(code()["source_sha256"]) == 64
    assert environment()["libraries"]["torch"]
    json.dumps([code(), environment()])
