"""What commands print: results as tables on stdout, the state of steps on stderr."""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedArtifact
from pipeline.recipe import Recipe
from pipeline.records import Record, Version
from pipeline.resources import size_in_words
from pipeline.runner import Finished, Planned
from pipeline.settings import Estimate
from pipeline.store import Store
from pipeline.sweep import Sweep
from pipeline.terminal import print_styled, print_table

STYLES = {"up to date": "green", "resume": "cyan", "run": "yellow", "waits": "dim"}


def tell(line: str) -> None:
    """A line about what takes a while."""
    print(line, file=sys.stderr)


def announce(planned: Planned) -> None:
    """One line before a step runs or is passed over."""
    why = f" ({planned.why})" if planned.why else ""
    print_styled((planned.step.name, "bold"), " ", (planned.state, STYLES[planned.state]), why, stderr=True)


def results(store: Store, recipe: Recipe, finished: Sequence[Finished], selected: Sequence[str]) -> None:
    """What was asked for (the recipe's last steps, if nothing): tables that they wrote, and where their pages lie."""
    wanted = set(recipe.matching(selected)) or {step.name for step in recipe.sinks()}
    for one in finished:
        if one.planned.step.name not in wanted:
            continue
        store.require_whole(one.record)
        files = store.files(one.record.stage, one.record.digest)
        for path in sorted(files.glob("*.json")):
            content = json.loads(path.read_bytes())
            if isinstance(content, dict) and "table" in content:
                print_table(content["table"]["columns"], content["table"]["rows"])
        pages = sorted(files.glob("*.html"))
        for path in pages or [files]:
            print(f"{one.version.reference}  {path}")


def dry_run(planned: Sequence[Planned], estimates: Mapping[str, Estimate]) -> None:
    """What would run, why, and what it needs."""
    rows = []
    for one in planned:
        need = estimates[one.step.name]
        idle = one.record is not None
        sizes = ["", ""] if idle else [size_in_words(need.disk_bytes), size_in_words(need.memory_bytes)]
        rows.append([one.step.name, one.state, one.why, *sizes])
    print_table(["step", "state", "why", "disk, about", "memory, about"], rows)
    disk = sum(one.disk_bytes for one in estimates.values())
    memory = max((one.memory_bytes for one in estimates.values()), default=0)
    print(f"needs about {size_in_words(disk)} of disk and {size_in_words(memory)} of memory; nothing was run")


def status(store: Store, recipe: Recipe, planned: Sequence[Planned], ages: Mapping[str, float], *, why: bool) -> None:
    """The state of each step, its version, and on request what changed."""
    rows = []
    for one in planned:
        version = store.latest(recipe.name, one.step.name)
        reason = [one.why] if why else []
        rows.append([one.step.name, one.step.stage.name, one.state, version.label if version else "", *reason])
    print_table(["step", "stage", "state", "version", *(["why"] if why else [])], rows)
    for step, looked_at in ages.items():
        print(f"{step}: its source was last looked at {_age(looked_at)} ago; `simclr run` looks again")


def versions(store: Store, rows: Sequence[tuple[Version, Sequence[str]]]) -> None:
    """Every version in the store, with its labels."""
    lines = []
    for version, its_labels in rows:
        try:
            size = size_in_words(store.record(version.stage, version.key, version.digest).size_bytes)
        except DamagedArtifact:
            size = "record damaged"
        labels, age = ", ".join(its_labels), f"{_age(version.created_at)} ago"
        lines.append([version.reference, labels, version.stage, version.digest[:8], size, age])
    print_table(["reference", "labels", "stage", "digest", "size", "made"], lines)


def artifact(facts: Mapping[str, Any], files: Path, timing: Sequence[Mapping[str, Any]]) -> None:
    """What an artifact holds and what made it."""
    print_styled((facts["reference"], "bold"), f" ({', '.join(facts['labels']) or 'no label'})")
    code, environment = facts["code"], facts["environment"]
    source = code.get("source_sha256", "")[:12]
    rows = {
        "stage": f"{facts['stage']}, version {facts['stage_version']}",
        "digest": facts["digest"],
        "key": facts["key"],
        "seed": "does not matter" if facts["seed"] is None else facts["seed"],
        "inputs": json.dumps(facts["inputs"]),
        "settings": json.dumps(facts["settings"]),
        "counts": json.dumps(facts["counts"]),
        "attempts": f"{len(facts['attempts'])}: " + "; ".join(_attempt(one) for one in facts["attempts"]),
        "seconds": facts["seconds"],
        "peak memory": _peak(facts["attempts"]),
        "code": f"commit {code.get('commit')}, changed: {code.get('dirty')}, source {source}",
        "environment": json.dumps(environment),
        "files": f"{facts['files']} ({size_in_words(facts['size_bytes'])})",
    }
    rates = [one["images_per_second"] for one in timing if "images_per_second" in one]
    if rates:
        rows["rate"] = f"{sorted(rates)[len(rates) // 2]:,.0f} images/s (median of {len(rates)} windows)"
    for name, value in rows.items():
        print_styled("  ", (name, "bold"), f" {value}")
    for message in facts["messages"]:
        print_styled(f"  {message}")
    for path in sorted(files.rglob("*")):
        if path.is_file():
            print_styled(f"    {path.relative_to(files).as_posix()}  {size_in_words(path.stat().st_size)}")


def _attempt(attempt: Mapping[str, Any]) -> str:
    first = f" from step {attempt['first_step']}" if attempt["first_step"] else ""
    return f"{attempt['ended']}{first}"


def _peak(attempts: Sequence[Mapping[str, Any]]) -> str:
    """The most of any attempt, where it was measured."""
    found = [one["peak_memory_bytes"] for one in attempts if one.get("peak_memory_bytes")]
    most = {place: max((one[place] for one in found if one.get(place)), default=None) for place in ("host", "device")}
    return ", ".join(f"{size_in_words(size)} on the {place}" for place, size in most.items() if size) or "not measured"


def lineage(store: Store, records: Sequence[Record]) -> None:
    """The way from the source to an artifact, with what each was made of and what was counted."""
    for one in records:
        reference = next(
            (version.reference for version in store.versions(one.recipe, one.step) if version.digest == one.digest), ""
        )
        seed = "" if one.seed is None else f", seed {one.seed}"
        print(f"{reference or one.step}  {one.stage}, digest {one.digest[:16]}{seed}")
        print("    from " + ", ".join(f"{field} {_short(value)}" for field, value in one.inputs.items()))
        if one.counts:
            print("    with " + _headline(one.counts))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{name} {digest[:16]}" for name, digest in value) + "]"
    prefix, _, digest = str(value).rpartition(":")
    return f"{prefix}:{digest[:16]}" if prefix else digest[:16]


def _headline(counts: Mapping[str, Any]) -> str:
    values = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in counts.items()
    )
    return ", ".join(values)


def changes(found: Mapping[str, Sequence[str]]) -> None:
    """Differences by step."""
    if not found:
        print("no differences")
    for step, lines in found.items():
        print(step)
        for line in lines:
            print(f"  {line}")


def rows(table: Sequence[Mapping[str, str]]) -> None:
    """A table whose rows have their values by column."""
    print_table([*table[0]], [[*row.values()] for row in table])


def neighbours(found: Sequence[Mapping[str, Any]], index: Mapping[str, Any] | None) -> None:
    """What each query found, nearest first; and how much of it is found, where an index was asked."""
    lines = [
        [one["query"] if rank == 1 else "", rank, f"{near['similarity']:.4f}", f"{near['distance']:.4f}",
         near["label"] or "", near["key"]]
        for one in found
        for rank, near in enumerate(one["neighbours"], start=1)
    ]  # fmt: skip
    print_table(["query", "rank", "cosine", "distance", "label", "image"], lines)
    if index is not None:
        print(
            f"approximate, by an index ({index['kind']}) that found {index['recall']['10']:.1%} of the ten nearest of "
            f"{index['recall_queries']:,} queries; features as --gallery (stage embed) are searched exactly"
        )


def verified(problems: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Damaged files by artifact, and the count of those that are whole."""
    for reference, found in problems.items():
        for problem in found:
            print(f"{reference}: {problem['path']} {problem['problem']}")
    print(f"{sum(not found for found in problems.values())} of {len(problems)} artifacts are whole")
    if any(problems.values()):
        print("`simclr run RECIPE STEP --force` makes a damaged one again")


def swept(store: Store, found: Sweep, *, apply: bool, grace: str) -> None:
    """What goes to the trash, what is deleted from there, and what stays for now, with its size."""
    items = [*found.moved, *found.deleted]
    if items:
        rows = [[item.what, item.why, size_in_words(item.size_bytes) if item.paths else ""] for item in items]
        print_table(["what", "why", "size"], rows)
    for item in found.kept:
        print(f"{item.what}, {size_in_words(item.size_bytes)} kept: {item.why}")
    moved, freed = size_in_words(sum(item.size_bytes for item in found.moved)), size_in_words(found.freed_bytes)
    goes, is_now = ("went", "are") if apply else ("would go", "would be")
    print(
        f"{moved} {goes} to the trash, {freed} {is_now} freed from it; {size_in_words(found.trash_bytes)} {is_now} "
        f"there, each thing until a `simclr gc --apply` that comes {grace} after it"
    )
    if not apply and items:
        print("nothing was done: --apply does it")
    if found.trash is not None:
        print(f"to have it back: cp -a {shlex.quote(f'{found.trash}/.')} {shlex.quote(f'{store.path}/')}")


def _age(moment: float) -> str:
    seconds = max(time.time() - moment, 0)
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
