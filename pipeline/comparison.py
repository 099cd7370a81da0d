"""What differs between two results: their settings and figures, and those of everything they were made of."""

from typing import Any

from pipeline.records import Record
from pipeline.store import Store


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`epochs 100 -> 200` for every value that differs, nested ones with dotted keys."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name} {before} -> {after}")
    return changes


def compare(store: Store, old: Record, new: Record) -> dict[str, list[str]]:
    """By step, sources first: what differs. Steps are paired by name; those that are equal are left out."""
    before = {one.step: one for one in store.ancestors(old)[:-1]} | {"": old}
    after = {one.step: one for one in store.ancestors(new)[:-1]} | {"": new}
    changes = {}
    for step in dict.fromkeys([*after, *before]):
        one, other = before.get(step), after.get(step)
        name = step or (old.step if old.step == new.step else f"{old.step} -> {new.step}")
        if one is None or other is None:
            changes[name] = ["only in the first" if other is None else "only in the second"]
        elif (one.key, one.digest) != (other.key, other.digest):
            found = _record_differences(one, other)
            if found:
                changes[name] = found
    return changes


def _record_differences(old: Record, new: Record) -> list[str]:
    found = differences(old.hashed_settings, new.hashed_settings)
    if old.stage_version != new.stage_version:
        found.append(f"stage version {old.stage_version} -> {new.stage_version}")
    if old.seed != new.seed:
        found.append(f"seed {old.seed} -> {new.seed}")
    found += [
        f"input {field} has other files or other content"
        for field, value in old.inputs.items()
        if str(value).startswith("foreign:") and new.inputs.get(field) != value
    ]
    return found + differences(old.counts, new.counts)
