"""Decides what has to run and why, and runs it in order."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline import provenance
from pipeline.comparison import differences
from pipeline.recipe import Recipe, Step
from pipeline.settings import Estimate, hashed_subset
from pipeline.store import Record, Store, Version

State = Literal["up to date", "resume", "run", "waits"]


@dataclass(frozen=True)
class Planned:
    """What is known of a step before it runs."""

    step: Step
    state: State
    """`waits`: an input has to be made first; if that gives the bytes of before, the step stays up to date."""
    why: str
    key: str | None = None
    record: Record | None = None
    """Of the artifact, where it is up to date."""
    inputs: dict[str, Any] | None = None
    input_records: dict[str, list[tuple[str, Record]]] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """A step after its run."""

    planned: Planned
    version: Version
    record: Record
    ran: bool


def plan(
    store: Store,
    recipe: Recipe,
    selected: Sequence[str] = (),
    *,
    look: bool = True,
    fresh: bool = False,
    force: bool = False,
) -> list[Planned]:
    """What would run, and why, in running order.

    Args:
        selected: steps to run with what they need; all if none.
        look: look at foreign files again, rather than trust the last look.
    """
    known: dict[str, Planned] = {}
    for step in recipe.needed(selected):
        known[step.name] = _plan_step(store, recipe, step, known, look, fresh, _forced(step, selected, force))
    return list(known.values())


def run(
    store: Store,
    recipe: Recipe,
    selected: Sequence[str] = (),
    *,
    fresh: bool = False,
    force: bool = False,
    announce: Callable[[Planned], None],
) -> list[Finished]:
    """Bring every selected step up to date.

    Args:
        fresh: discard checkpoints of steps that run.
        force: run the selected steps even if they are up to date.
        announce: called with each step before it runs or is passed over.
    """
    store.prepare()
    known: dict[str, Planned] = {}
    finished = []
    for step in recipe.needed(selected):
        planned = _plan_step(store, recipe, step, known, True, fresh, _forced(step, selected, force))
        announce(planned)
        ran = planned.record is None
        record = planned.record or _execute(store, recipe, planned, fresh, force)
        known[step.name] = Planned(step, "up to date", planned.why, planned.key, record)
        finished.append(Finished(planned, store.name(recipe.name, step.name, record), record, ran))
    return finished


def estimate(store: Store, planned: Sequence[Planned]) -> dict[str, Estimate]:
    """By step: roughly the disk and memory that it needs; what is up to date needs nothing more."""
    made: dict[str, Estimate] = {}
    needed: dict[str, Estimate] = {}
    for one in planned:
        step = one.step
        inputs = {field: made[name] for field, names in step.references().items() for name in names if name in made}
        for field, source in step.settings.foreign_inputs().items():
            found = provenance.fingerprint(source, store.sources(), look=False)
            inputs[field] = Estimate(found.files, 0, found.size_bytes) if found else Estimate(disk_bytes=0)
        guess = step.settings.estimate(inputs)
        if one.record is None:
            made[step.name] = needed[step.name] = guess
        else:
            samples = int(one.record.counts.get("samples", guess.samples))
            made[step.name] = replace(guess, samples=samples, disk_bytes=one.record.size_bytes)
            needed[step.name] = Estimate(samples, disk_bytes=0, memory_bytes=0)
    return needed


def looks(store: Store, planned: Sequence[Planned]) -> dict[str, float]:
    """By step that reads foreign files: when they were last looked at, in seconds since 1970."""
    ages = {}
    for one in planned:
        for source in one.step.settings.foreign_inputs().values():
            found = provenance.fingerprint(source, store.sources(), look=False)
            if found is not None and source.roots:
                ages[one.step.name] = found.looked_at
    return ages


def _forced(step: Step, selected: Sequence[str], force: bool) -> bool:
    return force and (not selected or step.name in selected)


def _execute(store: Store, recipe: Recipe, planned: Planned, fresh: bool, force: bool) -> Record:
    # By name: the worker brings torch along, which `status` and `--help` must not wait for.
    worker = importlib.import_module("pipeline.worker")
    job = worker.Job(
        recipe=recipe.name,
        step=planned.step,
        seed=planned.seed,
        key=planned.key,
        inputs=planned.inputs,
        input_records=planned.input_records,
        fresh=fresh,
        force=force,
    )
    return worker.run_step(store, job)


def _plan_step(
    store: Store, recipe: Recipe, step: Step, known: dict[str, Planned], look: bool, fresh: bool, force: bool
) -> Planned:
    waits_for = [
        name for names in step.references().values() for name in names if name in known and known[name].record is None
    ]
    if waits_for:
        return Planned(step, "waits", f"for {', '.join(dict.fromkeys(waits_for))}")
    inputs: dict[str, Any] = {}
    input_records: dict[str, list[tuple[str, Record]]] = {}
    for field, names in step.references().items():
        records = [(name, _input_record(store, known, name)) for name in names]
        input_records[field] = records
        several = isinstance(getattr(step.settings, field), tuple)
        inputs[field] = [[name, one.digest] for name, one in records] if several else records[0][1].digest
    for field, source in step.settings.foreign_inputs().items():
        found = provenance.fingerprint(source, store.sources(), look=look)
        if found is None:
            return Planned(step, "run", "first run: its source was never looked at")
        inputs[field] = found.value
    seed = recipe.seed if step.settings.depends_on_seed() else None
    key = provenance.step_key(
        step.stage.name,
        step.stage.version,
        seed,
        hashed_subset(step.settings),
        inputs,
        _lineage_names(store, recipe, input_records) if step.settings.reads_ancestors else None,
    )
    record = store.current(step.stage.name, key)
    facts = {"key": key, "inputs": inputs, "input_records": input_records, "seed": seed}
    if record is not None and not force:
        return Planned(step, "up to date", "", record=record, **facts)
    if any(store.work(step.stage.name, key).glob("checkpoints/step-*")) and not fresh and not force:
        return Planned(step, "resume", "from its last checkpoint", **facts)
    why = "forced" if record is not None else _why(store, recipe, step, seed, inputs)
    return Planned(step, "run", why, **facts)


def _input_record(store: Store, known: dict[str, Planned], name: str) -> Record:
    planned = known.get(name)
    if planned is not None and planned.record is not None:
        return planned.record
    version = store.resolve(name)
    return store.record(version.stage, version.key, version.digest)


def _lineage_names(store: Store, recipe: Recipe, input_records: dict[str, list[tuple[str, Record]]]) -> Any:
    """All that a stage which shows its lineage can see of it."""
    seen: dict[str, list[Any]] = {}
    for group in input_records.values():
        for _, one in group:
            for ancestor in store.ancestors(one):
                seen[ancestor.key] = [ancestor.step, ancestor.stage, ancestor.key, ancestor.digest]
    return [recipe.name, *seen.values()]


def _why(store: Store, recipe: Recipe, step: Step, seed: int | None, inputs: dict[str, Any]) -> str:
    """What changed since the last run of this step, in words."""
    last = store.latest(recipe.name, step.name)
    if last is None:
        return "first run"
    before = store.record(last.stage, last.key, last.digest)
    if before.stage != step.stage.name:
        return f"stage {before.stage} -> {step.stage.name}"
    changes = []
    if before.stage_version != step.stage.version:
        changes.append(f"stage version {before.stage_version} -> {step.stage.version}")
    if before.seed != seed:
        changes.append(f"seed {before.seed} -> {seed}")
    changes += differences(before.hashed_settings, hashed_subset(step.settings))
    for field in sorted(before.inputs.keys() | inputs.keys()):
        old, new = before.inputs.get(field), inputs.get(field)
        if old != new:
            changes.append(f"input {field} {_change(store, recipe, old, new)}")
    return ", ".join(changes) or "what it was made of changed upstream, or its artifact is gone"


def _change(store: Store, recipe: Recipe, old: Any, new: Any) -> str:
    """`v1 -> v2` where both are versions of one step; otherwise as much as can be said."""
    if isinstance(old, list) and isinstance(new, list):
        if [name for name, _ in old] != [name for name, _ in new]:
            return f"{', '.join(name for name, _ in old)} -> {', '.join(name for name, _ in new)}"
        pairs = [(before, after) for (_, before), (_, after) in zip(old, new, strict=True) if before != after]
        return ", ".join(_change(store, recipe, before, after) for before, after in pairs)
    if str(old).startswith("foreign:") and str(new).startswith("foreign:"):
        return "has other files or other content"
    (old_step, old_label), (new_step, new_label) = _named(store, recipe, old), _named(store, recipe, new)
    if old_step == new_step:
        return f"{old_label} -> {new_label}"
    return f"{old_step} {old_label} -> {new_step} {new_label}"


def _named(store: Store, recipe: Recipe, digest: Any) -> tuple[str, str]:
    """(step, version) of a digest within the recipe, or as much as can be said."""
    for step in recipe.steps:
        for version in store.versions(recipe.name, step):
            if version.digest == digest:
                return step, version.label
    return "artifact" if digest else "none", str(digest or "")[:8]
