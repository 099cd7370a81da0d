"""Decides what has to run and why, and runs it in order."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline import provenance
from pipeline.comparison import differences
from pipeline.errors import NoSpace, UsageError
from pipeline.launcher import Place
from pipeline.recipe import Recipe, Step, listed
from pipeline.records import Record, Version
from pipeline.resources import FREE_SPACE, free_bytes, free_in_words
from pipeline.settings import Call, Estimate, artifact_stages, hashed_subset
from pipeline.store import Store

NAMES_LISTED = 3

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


@dataclass(frozen=True)
class Planner:
    """Finds out the state of one step after another."""

    store: Store
    recipe: Recipe
    tell: Callable[[str], None]
    """Called with what takes a while."""
    look: bool = True
    """Look at foreign files again, rather than trust the last look."""
    fetch: bool = False
    """Download what a foreign source lacks."""
    fresh: bool = False
    """Checkpoints will be discarded."""
    forced: frozenset[str] = frozenset()
    """Steps that run even if they are up to date."""
    profile: bool = False
    """Steps that train say where the time of a step went."""

    def plan(self, step: Step, known: dict[str, Planned]) -> Planned:
        """The state of a step, `known` holding all steps before it."""
        names = [name for names in step.references().values() for name in names]
        waits_for = [name for name in names if name in known and known[name].record is None]
        if waits_for:
            return Planned(step, "waits", f"for {listed(dict.fromkeys(waits_for), NAMES_LISTED)}")
        input_records = self._input_records(step, known)
        inputs = _digests(step, input_records)
        for field, source in step.settings.foreign_inputs().items():
            try:
                found = provenance.fingerprint(
                    source, self.store.sources(), look=self.look, fetch=self.fetch, tell=self.tell, call=_call
                )
            except UsageError as error:
                was_seen = provenance.fingerprint(source, self.store.sources(), look=False) is not None
                raise UsageError(f"{error}{self._way_without_source(step) if was_seen else ''}") from error
            if found is None:
                why = "its source is fetched first" if source.fetch and self.look else "its source was never looked at"
                return Planned(step, "run", f"first run: {why}")
            inputs[field] = found.value
        seed = self.recipe.seed if step.settings.depends_on_seed() else None
        names_seen = _lineage_names(self.store, self.recipe, input_records) if step.settings.reads_ancestors else None
        hashed = hashed_subset(step.settings)
        key = provenance.step_key(step.stage.name, step.stage.version, seed, hashed, inputs, names_seen)
        self.store.claim(step.stage.name, key)  # its checkpoints too
        record = self.store.current(step.stage.name, key)
        facts = {"key": key, "inputs": inputs, "input_records": input_records, "seed": seed}
        forced = step.name in self.forced
        if record is not None and not forced:
            return Planned(step, "up to date", "", record=record, **facts)
        has_checkpoint = any(self.store.work(step.stage.name, key).glob("checkpoints/step-*"))
        if has_checkpoint and not self.fresh and not forced:
            return Planned(step, "resume", "from its last checkpoint", **facts)
        why = "forced" if record is not None else _why(self.store, self.recipe, step, seed, inputs)
        return Planned(step, "run", why, **facts)

    def _way_without_source(self, step: Step) -> str:
        """How a recipe goes on where a source is gone and what was made of it is not."""
        made = self.store.latest(self.recipe.name, step.name)
        readers = [
            f"--set {one.name}.{field}={made.reference}"
            for one in self.recipe.steps.values()
            for field, names in one.references().items()
            if made is not None and names == [step.name]
        ]
        if not readers:
            return ""
        last = " ".join(one.name for one in self.recipe.sinks() if one.name != step.name)
        return f"; what was made of it is in the store still: `simclr run RECIPE {last} {' '.join(readers)}` reads that"

    def _input_records(self, step: Step, known: dict[str, Planned]) -> dict[str, list[tuple[str, Record]]]:
        """By setting: (name, record) of what it names, from the steps before or from the store."""
        found: dict[str, list[tuple[str, Record]]] = {}
        for field, names in step.references().items():
            wanted = artifact_stages(type(step.settings).model_fields[field])
            found[field] = [(name, self._input_record(known, name)) for name in names]
            for name, record in found[field]:
                if record.stage not in wanted:
                    raise UsageError(
                        f"{step.name}.{field}: {name} is made by {record.stage}, wanted is one made by "
                        f"{' or '.join(wanted)}"
                    )
        return found

    def _input_record(self, known: dict[str, Planned], name: str) -> Record:
        planned = known.get(name)
        if planned is not None and planned.record is not None:
            return planned.record
        version = self.store.resolve(name)
        return self.store.record(version.stage, version.key, version.digest)


def plan(planner: Planner, selected: Sequence[str] = ()) -> list[Planned]:
    """What would run, and why, in running order: the selected steps (all, if none) with what they need."""
    known: dict[str, Planned] = {}
    for step in planner.recipe.needed(selected):
        known[step.name] = planner.plan(step, known)
    return list(known.values())


def joined(place: Place) -> AbstractContextManager[Any]:
    """Take this process's place among several; yields the `ranks` of `run` and `follow`, None where it is alone."""
    return nullcontext() if place.ranks == 1 else _worker().joined(place)


def follow(planner: Planner, ranks: Any) -> None:
    """As a rank other than 0: take part in what rank 0 runs, until it has finished."""
    _worker().follow(planner.store, planner.recipe, ranks)


def run(
    planner: Planner, selected: Sequence[str], announce: Callable[[Planned], None], ranks: Any = None
) -> list[Finished]:
    """Bring the selected steps (all, if none) and what they need up to date.

    Args:
        announce: called with each step before it runs or is passed over.
        ranks: of `joined`, where several processes share the work and this is rank 0.
    """
    planner = replace(planner, fetch=True)
    store, recipe = planner.store, planner.recipe
    store.prepare()
    known: dict[str, Planned] = {}
    finished = []
    needed = recipe.needed(selected)
    is_checked = False
    for number, step in enumerate(needed):
        planned = planner.plan(step, known)
        announce(planned)
        if planned.record is None and not is_checked:
            _worker().check_settings(needed[number:])  # a wrong name is told before the first hour, not after it
            is_checked = True
        if planned.record is None:
            _require_space(planner, [*known.values(), planned])
        record = planned.record or _execute(planner, planned, ranks)
        known[step.name] = Planned(step, "up to date", planned.why, planned.key, record)
        version = store.name(recipe.name, step.name, record)
        finished.append(Finished(planned, version, record, ran=planned.record is None))
    return finished


def forced_steps(recipe: Recipe, selected: Sequence[str]) -> frozenset[str]:
    """The steps that `--force` means: the selected ones, or all."""
    return frozenset(recipe.matching(selected) if selected else recipe.steps)


def estimate(store: Store, planned: Sequence[Planned]) -> dict[str, Estimate]:
    """By step: roughly the disk and memory that it needs; what is up to date needs nothing more."""
    made: dict[str, Estimate] = {}
    needed: dict[str, Estimate] = {}
    for one in planned:
        step = one.step
        inputs = {field: made[name] for field, names in step.references().items() for name in names if name in made}
        for field, source in step.settings.foreign_inputs().items():
            found = provenance.fingerprint(source, store.sources(), look=False)
            inputs[field] = (
                Estimate(found.samples or found.files, 0, found.size_bytes) if found else Estimate(disk_bytes=0)
            )
        guess = step.settings.estimate(inputs)
        if one.record is None:
            made[step.name] = needed[step.name] = guess
        else:
            samples = int(one.record.counts.get("samples", guess.samples))
            sample_bytes = int(one.record.counts.get("sample_bytes", guess.sample_bytes))
            size_bytes = one.record.size_bytes
            made[step.name] = Estimate(samples, sample_bytes, size_bytes, weight_bytes=size_bytes)
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


def _call(named: Call) -> Any:
    """Call a function of a stage's that lists or fetches files."""
    return getattr(importlib.import_module(named.module), named.function)(*named.arguments)


def _worker() -> Any:
    # By name: the worker brings torch along, which `status` and `--help` must not wait for.
    return importlib.import_module("pipeline.worker")


def _execute(planner: Planner, planned: Planned, ranks: Any) -> Record:
    assert planned.input_records is not None
    _require_whole(planner.store, planned.step, planned.input_records)
    worker = _worker()
    job = worker.Job(
        recipe=planner.recipe.name,
        step=planned.step,
        seed=planned.seed,
        key=planned.key,
        inputs=planned.inputs,
        input_records=planned.input_records,
        fresh=planner.fresh,
        force=planned.step.name in planner.forced,
        profile=planner.profile,
    )
    return worker.run_step(planner.store, job, ranks)


def _require_space(planner: Planner, planned: Sequence[Planned]) -> None:
    """Refuse to begin the last of these steps on a disk that is far too full for it, and warn of one that may be.

    What a step makes is known roughly only, so half of it is what has to be there.
    """
    step, folder = planned[-1].step.name, planner.store.path
    need = estimate(planner.store, planned)[step].disk_bytes
    free = free_bytes(folder)
    if free < need:
        words = free_in_words(folder, need)
        if free < need // 2:
            raise NoSpace(f"{step}: about {words}: {FREE_SPACE} and give the same command again; nothing was begun")
        planner.tell(f"{step}: about {words}, which may not suffice")


def _require_whole(store: Store, step: Step, input_records: dict[str, list[tuple[str, Record]]]) -> None:
    """Refuse to run a step on what is not as it was published: its inputs, and all behind them that it looks at."""
    read = [one for group in input_records.values() for _, one in group]
    if step.settings.reads_ancestors:
        read = [ancestor for one in read for ancestor in store.ancestors(one)]
    for one in {one.digest: one for one in read}.values():
        store.require_whole(one)


def _digests(step: Step, input_records: dict[str, list[tuple[str, Record]]]) -> dict[str, Any]:
    """By setting: the digest of what it names, or [name, digest] of each where there are several."""
    return {
        field: [[name, one.digest] for name, one in group]
        if isinstance(getattr(step.settings, field), tuple)
        else group[0][1].digest
        for field, group in input_records.items()
    }


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
