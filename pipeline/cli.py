"""The command line: `simclr COMMAND`. Results go to stdout, progress and errors to stderr."""

import errno
import gc
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from pipeline import display, encoders, launcher, runner, sweep, trash
from pipeline.comparison import compare
from pipeline.errors import AlreadyTold, DamagedArtifact, Interrupted, UsageError
from pipeline.host import keep_freed_memory, sleep_soon
from pipeline.manifest import parse_json
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Record, Version
from pipeline.resources import exhausted
from pipeline.schema import recipe_schema
from pipeline.store import Store
from stages.settings import STAGES
from stages.settings.source import IMAGE_SUFFIXES

STALE = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
OF_THE_USER = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
"""A path that is not there or may not be written: the message says which."""

app = typer.Typer(
    name="simclr",
    help="From a folder of images to an encoder you can trust, and a report that says how good it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Steps = Annotated[list[str] | None, typer.Argument(metavar="STEP", help="These steps and what they need.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="STEP.FIELD=VALUE", help="Overrides; repeatable.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Instead of the recipe's own.")]
StorePath = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Default: $SIMCLR_STORE or ./artifacts.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")]
Reference = Annotated[
    str, typer.Argument(metavar="REF", help="[recipe/]step[@vN|latest|alias], or 8 digits of a digest.")
]


def _recipe(path: str, overrides: Sequence[str] | None, seed: int | None) -> Recipe:
    return load_recipe(find_recipe(path), STAGES, overrides or (), seed)


def find_recipe(path: str) -> Path:
    """The file at `path`, or the shipped recipe of that name (`digits`, `digits.yaml`, `configs/digits.yaml`)."""
    given = Path(path)
    if given.is_file():
        return given
    package = Path(__file__).resolve().parent
    # In a wheel the recipes lie inside the package; in a checkout, beside it.
    shipped = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    name = given.name if given.suffix else f"{given.name}.yaml"
    if len(given.parts) == 1 or given.parts[:-1] == ("configs",):
        candidate = shipped / name
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(one.stem for one in shipped.glob("*.yaml")))
    raise UsageError(f"{path}: no such recipe; shipped are {known}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@app.command(epilog="Example: simclr run configs/digits.yaml --set simclr.epochs=40")
def run(
    recipe: RecipePath,
    steps: Steps = None,
    overrides: Set = None,
    seed: Seed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, why, and what it needs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard checkpoints of steps that run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Rerun the steps even if they are up to date.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="On this machine; each has a GPU, or its share of the cores.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time of a training step goes, of steps that run.")
    ] = False,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Bring a recipe up to date: run what is new or changed, resume what was interrupted, reuse the rest.

    Under torchrun, accelerate launch or srun the same command takes part as one of several processes.
    """
    place = launcher.read_place(processes)
    if place.ranks == 1 and (processes or 1) > 1 and not dry_run:
        _recipe(recipe, overrides, seed).needed(steps or ())  # what is wrong here is said once, not by every process
        Store(store)
        code = launcher.launch([sys.executable, "-P", "-m", "pipeline", *sys.argv[1:]], processes or 1)
        if code:
            raise AlreadyTold(code)
        return
    with runner.joined(place) as ranks, Store(store).using() as opened:
        checked = _recipe(recipe, overrides, seed)
        forced = runner.forced_steps(checked, steps or ()) if force else frozenset()
        planner = runner.Planner(opened, checked, display.tell, fresh=fresh, forced=forced, profile=profile)
        if place.rank > 0:
            runner.follow(planner, ranks)
        elif dry_run:
            planned = runner.plan(planner, steps or ())
            estimates = runner.estimate(opened, planned)
            if as_json:
                _print_json([_planned_json(one) | asdict(estimates[one.step.name]) for one in planned])
            else:
                display.dry_run(planned, estimates)
        else:
            finished = runner.run(planner, steps or (), display.announce, ranks)
            if profile and not any(one.ran for one in finished):
                display.tell("nothing ran, so that there is no profile: --force runs the steps that are named again")
            if as_json:
                _print_json([_finished_json(opened, one) for one in finished])
            else:
                display.results(opened, checked, finished, steps or ())


def _planned_json(planned: runner.Planned) -> dict[str, Any]:
    record = planned.record
    return {
        "step": planned.step.name,
        "stage": planned.step.stage.name,
        "state": planned.state,
        "why": planned.why,
        "key": planned.key,
        "digest": record.digest if record else None,
    }


def _finished_json(store: Store, finished: runner.Finished) -> dict[str, Any]:
    record, version = finished.record, finished.version
    return _planned_json(finished.planned) | {
        "ran": finished.ran,
        "digest": record.digest,
        "version": version.reference,
        "files": str(store.files(record.stage, record.digest)),
        "counts": record.counts,
    }


app.command("resume", hidden=True, help="An alias of run: a run resumes by itself.")(run)


@app.command(epilog="Example: simclr status configs/digits.yaml --why")
def status(
    recipe: RecipePath,
    steps: Steps = None,
    why: Annotated[bool, typer.Option("--why", help="Say for each step what changed.")] = False,
    overrides: Set = None,
    seed: Seed = None,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """What is up to date and what is not (exit 3). Trusts the last look at foreign files, and says how old it is."""
    checked = _recipe(recipe, overrides, seed)
    with Store(store).using() as opened:
        planned = runner.plan(runner.Planner(opened, checked, display.tell, look=False), steps or ())
        ages = runner.looks(opened, planned)
        if as_json:
            _print_json([_planned_json(one) | {"source_looked_at": ages.get(one.step.name)} for one in planned])
        else:
            display.status(opened, checked, planned, ages, why=why)
    if any(one.state != "up to date" for one in planned):
        raise typer.Exit(STALE)


@app.command("ls", epilog="Example: simclr ls")
def list_artifacts(store: StorePath = None, as_json: AsJson = False) -> None:
    """Every step of every recipe in the store, with its versions."""
    with Store(store).using() as opened:
        rows = [*opened.all_versions()]
        labels = {names: opened.aliases(*names) for names in {(one.recipe, one.step) for one in rows}}
        labelled = [(one, labels[one.recipe, one.step].get(one.number, [])) for one in rows]
        if as_json:
            _print_json([_version_json(opened, *one) for one in labelled])
        else:
            display.versions(opened, labelled)


def _version_json(store: Store, version: Version, labels: Sequence[str]) -> dict[str, Any]:
    record = store.record(version.stage, version.key, version.digest)
    return {
        "reference": version.reference,
        "labels": labels,
        "stage": version.stage,
        "digest": version.digest,
        "seed": record.seed,
        "size_bytes": record.size_bytes,
        "seconds": record.seconds,
        "created_at": version.created_at,
        "counts": record.counts,
    }


def _resolve(opened: Store, reference: str) -> tuple[Version, Record]:
    version = opened.resolve(reference)
    return version, opened.record(version.stage, version.key, version.digest)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """An object of JSON in a file of the store. Raises DamagedArtifact."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DamagedArtifact(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DamagedArtifact(f"{path}: holds no JSON object")
    return value


@app.command(epilog="Example: simclr show digits/probe@latest")
def show(reference: Reference, store: StorePath = None, as_json: AsJson = False) -> None:
    """What an artifact holds and what made it: files, settings, inputs, seed, code, environment, attempts, figures."""
    with Store(store).using() as opened:
        version, record = _resolve(opened, reference)
        timing = opened.timing(record.stage, record.key, record.digest)
        rates = [_parsed(timing, line) for line in timing.read_bytes().splitlines()] if timing.is_file() else []
        files = opened.files(record.stage, record.digest)
        metrics = files / "metrics.json"
        labels = opened.labels(version)
        facts = {"reference": version.reference, "labels": labels, "files": str(files), **asdict(record)}
        facts["metrics"] = _parsed(metrics, metrics.read_bytes()) if metrics.is_file() else None
        if as_json:
            _print_json(facts | {"timing": rates})
        else:
            display.artifact(facts, files, rates)


@app.command(epilog="Example: simclr log probe@latest")
def log(reference: Reference, store: StorePath = None, as_json: AsJson = False) -> None:
    """The way from the source to an artifact: everything it was made of, with digests."""
    with Store(store).using() as opened:
        _, record = _resolve(opened, reference)
        lineage = opened.ancestors(record)
        if as_json:
            _print_json([asdict(one) for one in lineage])
        else:
            display.lineage(opened, lineage)


@app.command(epilog="Example: simclr diff probe@v1 probe@v2")
def diff(
    first: Annotated[str, typer.Argument(metavar="REF")],
    second: Annotated[str, typer.Argument(metavar="REF")],
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """What differs between two artifacts: settings and figures, of themselves and of what they were made of."""
    with Store(store).using() as opened:
        _, old = _resolve(opened, first)
        _, new = _resolve(opened, second)
        changes = compare(opened, old, new)
    if as_json:
        _print_json(changes)
    else:
        display.changes(changes)


@app.command(epilog="Example: simclr tag digits/simclr@v3 best")
def tag(
    reference: Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Give a version a name of your own."""
    with Store(store).using() as opened:
        version, _ = _resolve(opened, reference)
        opened.tag(version, alias)
    if as_json:
        _print_json({"reference": version.reference, "alias": alias})
    else:
        print(f"{version.recipe}/{version.step}@{alias} -> {version.label}")


@app.command(epilog="Example: simclr verify digits/simclr")
def verify(
    reference: Annotated[str | None, typer.Argument(metavar="[REF]")] = None,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of one artifact, or of all, and hold it against its manifest (exit 4 if one is damaged)."""
    with Store(store).using() as opened:
        chosen = opened.all_versions() if reference is None else [opened.resolve(reference)]
        problems = {
            version.reference: [asdict(problem) for problem in opened.verify_version(version)] for version in chosen
        }
    if as_json:
        _print_json(problems)
    else:
        display.verified(problems)
    if any(problems.values()):
        raise typer.Exit(DamagedArtifact.exit_code)


@app.command("gc", epilog="Example: simclr gc --keep 3 --apply")
def collect(
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without, only say what would go.")] = False,
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Newest versions of a step that keep their names; labelled ones do."),
    ] = None,
    grace: Annotated[str, typer.Option(help="For which what goes stays in the trash: 7d, 12h, 30m, or 0.")] = "7d",
    unfinished: Annotated[
        bool,
        typer.Option(
            "--unfinished",
            help="Take unfinished work with its checkpoints too, if untouched for 7 days; its step begins anew then.",
        ),
    ] = False,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Take away what no name needs: to the trash of the store, and once the grace is over, for good.

    Whatever has a name stays, with all that it was made from; so does what a run left unfinished, for 7 days at least,
    and as long as it has checkpoints.
    """
    rules = sweep.Rules(keep, trash.seconds_of(grace), unfinished)
    opened = Store(store)
    swept = sweep.sweep(opened, rules, apply=apply)
    if as_json:
        _print_json(
            {
                "applied": apply,
                "moved": [_item_json(item) for item in swept.moved],
                "deleted": [_item_json(item) for item in swept.deleted],
                "kept": [_item_json(item) for item in swept.kept],
                "moved_bytes": sum(item.size_bytes for item in swept.moved),
                "freed_bytes": swept.freed_bytes,
                "trash_bytes": swept.trash_bytes,
                "trash": str(swept.trash) if swept.trash else None,
            }
        )
    else:
        display.swept(opened, swept, apply=apply, grace=grace)


def _item_json(item: trash.Item) -> dict[str, Any]:
    return {"what": item.what, "why": item.why, "size_bytes": item.size_bytes}


@app.command(epilog="Example: simclr embed digits/simclr@latest photos --out features.parquet")
def embed(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, in folders below it too.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A .parquet file; replaced when the new one is done.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 2,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """Vectors of the images of any folder: path, label (the folder an image lies in) and vector.

    What cannot be read is left out, counted by reason (--json names all of it); exit 6 if that is everything.
    """
    encoder = Store(store).load(reference)
    counts = encoders.embed_folder(
        encoder, folder, out, IMAGE_SUFFIXES, batch_size=batch_size, device=device, workers=workers
    )
    if as_json:
        _print_json({"encoder": encoder.reference} | counts)
    else:
        print(f"{out}  {counts['images']:,} vectors of {counts['dimension']} numbers")


@app.command(epilog="Example: simclr search digits/simclr image.png --gallery digits/features --collage found.png")
def search(
    reference: Reference,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="What is searched for.")],
    gallery: Annotated[
        str,
        typer.Option(
            metavar="REF|FOLDER",
            help="A folder of images, or of this encoder: features (stage embed), or an index (stage retrieve).",
        ),
    ],
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest images of each.")] = 10,
    collage: Annotated[Path | None, typer.Option(metavar="FILE", help="A .png file: a picture of them.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a folder at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 2,
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """The images that are most like a given one, nearest first, with cosine similarity and distance.

    The search is exact, but for an index: then what share of the nearest it finds is told.
    """
    with Store(store).using() as opened:
        encoder = opened.load(reference)
        where = Path(gallery) if Path(gallery).is_dir() else opened.gallery(gallery, reference)
        found = encoders.search(
            encoder, images, where, IMAGE_SUFFIXES, count=neighbours, collage=collage, batch_size=batch_size,
            device=device, workers=workers,
        )  # fmt: skip
    index = where.index if isinstance(where, encoders.Gallery) else None
    if as_json:
        _print_json({"encoder": encoder.reference, "gallery": gallery, "index": index, "found": found})
    else:
        display.neighbours(found, index)
        if collage is not None:
            print(collage)


@app.command(epilog="Example: simclr export digits/simclr@latest digits-encoder --format safetensors")
def export(
    reference: Reference,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty, or an earlier export.")],
    kind: Annotated[
        Literal["torchvision", "timm", "safetensors"],
        typer.Option("--format", help="The library that loads it; safetensors: this one."),
    ],
    store: StorePath = None,
    as_json: AsJson = False,
) -> None:
    """An encoder for use elsewhere: weights under the library's names, preprocessing, and code that loads them."""
    encoder = Store(store).load(reference)
    files = encoders.export(encoder, folder, kind)
    if as_json:
        _print_json({"encoder": encoder.reference, "format": kind, "folder": str(folder), "files": files})
    else:
        print(f"{folder}  {', '.join(files)}; README.md shows how it is loaded")


@app.command(epilog="Example: simclr losses")
def losses(
    markdown: Annotated[bool, typer.Option("--markdown", help="As it stands in docs/metric-learning.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """The losses that `finetune` knows: what each learns from, its sampler and mining, its paper, when to choose it."""
    from stages.settings.loss_table import as_markdown, loss_rows  # noqa: PLC0415 - of this command alone

    rows = loss_rows()
    if as_json:
        _print_json(rows)
    elif markdown:
        print(as_markdown(rows), end="")
    else:
        display.rows(rows)


@app.command(epilog="Example: simclr schema --out recipe.schema.json")
def schema(
    out: Annotated[Path | None, typer.Option(help="A file, instead of stdout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As without: a schema is JSON.")] = False,
) -> None:
    """The JSON schema of recipes, for editors to complete and check them."""
    text = json.dumps(recipe_schema(STAGES), indent=2)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
        print(f"{out}: written; in a recipe's first line: # yaml-language-server: $schema={out}")


def main() -> None:
    """Entry point: an error is one line on stderr and an exit code, see pipeline/errors.py."""
    sleep_soon()
    keep_freed_memory()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    code = guarded(lambda: app(standalone_mode=False))
    _heed_no_more_signals()
    gc.freeze()  # the interpreter's end would look through all objects of torch and its neighbours, for a second
    sys.exit(code)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; returns its exit code, with errors told on stderr."""
    try:
        result = command()
        if result == 130:  # how the parser's library tells of Ctrl-C
            return _fail("interrupted; the same command resumes", 130)
        return result if isinstance(result, int) else 0
    except AlreadyTold as end:
        return end.exit_code
    except Interrupted as interruption:
        _heed_no_more_signals()
        return _fail("interrupted; the same command resumes", interruption.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command resumes", 130)
    except (typer.Exit, typer.Abort) as end:
        return getattr(end, "exit_code", 1)
    except BrokenPipeError:
        return 0
    except OSError as error:
        full = exhausted(error)
        if full is not None:
            return _fail(str(full), full.exit_code)
        code = getattr(error, "exit_code", UsageError.exit_code if error.errno in OF_THE_USER else None)
        if code is None:
            raise
        return _fail(str(error), code)
    except Exception as error:
        error = exhausted(error) or error
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise  # a fault of ours: the traceback is what we need to mend it, and Python exits with 1
        parser_message = getattr(error, "format_message", None)  # of the command line's own parser
        return _fail(parser_message() if parser_message else str(error), code)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Handler of SIGINT and SIGTERM where no stage has one of its own."""
    _heed_no_more_signals()
    raise Interrupted(number)


def _heed_no_more_signals() -> None:
    """The end is near: one more signal ends the process at once."""
    for number in SIGNALS:
        if signal.getsignal(number) == _interrupt:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str, code: int) -> int:
    print(f"simclr: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
