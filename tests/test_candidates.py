"""What every source gives."""

from collections import Counter

import pytest

from stages.sources.candidates import Absent, describe_left_out, unique_keys


def test_what_was_left_out_is_told_by_its_ending():
    assert describe_left_out(Counter()) == "0 other files left out"
    left_out = Counter({".txt": 2, ".heic": 1198})
    assert describe_left_out(left_out) == "1,200 other files left out (.heic 1,198, .txt 2)"
    many = Counter({f".{letter}": 1 for letter in "abcdefghijkl"})
    assert describe_left_out(many).endswith("(.a 1, .b 1, .c 1, .d 1, .e 1, .f 1, .g 1, .h 1, others 4)")


def test_equal_keys_are_told_apart():
    assert unique_keys(["b", "a", "b", "b", "b#2", "a"]) == ["b", "a", "b#3", "b#4", "b#2", "a#2"]
    assert unique_keys(["b", "a"]) == ["b", "a"]
    assert len(set(unique_keys(["x"] * 1000 + ["x#500"]))) == 1001


def test_what_is_absent_says_why():
    with pytest.raises(OSError, match="no image in the row"):
        Absent("no image in the row").read()
