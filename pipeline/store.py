"""The store: a folder of immutable artifacts, found by name and version or by digest. Files are the only truth."""

import copy
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

from pipeline import encoders
from pipeline.errors import DamagedArtifact, UsageError
from pipeline.failpoints import reach
from pipeline.manifest import (
    FILES,
    MANIFEST,
    FileProblem,
    canonical_json,
    check,
    commit_folder,
    create_file,
    parse_json,
    replace_file,
    seal,
    sha256_bytes,
    stamps,
)
from pipeline.provenance import STORE_FORMAT
from pipeline.records import Record, Version, read_format, read_pointer, read_record, read_version
from pipeline.uses import Uses

REFERENCE = re.compile(r"^(?:(?P<recipe>[\w.-]+)/)?(?P<step>[\w-]+)(?:@(?P<label>[\w.-]+))?$")
DIGEST = re.compile(r"^[0-9a-f]{8,64}$")
VERSION = re.compile(r"^v[1-9][0-9]*$")
ALWAYS_READ_BYTES = 1 << 28
"""An artifact of at most so many bytes is read whenever it is used, which takes a second, even if its times are old."""
TRASHED_AT = "%Y-%m-%dT%H-%M-%SZ"
"""How the name of a folder in trash/ begins: when it went there."""


Found = TypeVar("Found", Record, Version)


class Store:
    """Reads and publishes artifacts below one folder.

    Args:
        path: the folder; without it $SIMCLR_STORE, or ./artifacts.

    Raises:
        UsageError: the folder was written by a newer version.
    """

    def __init__(self, path: Path | None = None):
        self.path = path or Path(os.environ.get("SIMCLR_STORE") or "artifacts")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file; a store is a folder")
        self._uses: Uses | None = None
        stamp = self.path / "format.json"
        if stamp.is_file():
            found = read_format(stamp)
            if found > STORE_FORMAT:
                raise UsageError(
                    f"{self.path}: the store has format {found}, this version reads {STORE_FORMAT}: "
                    "upgrade simclr-pipeline, or name another folder by --store"
                )

    def prepare(self) -> None:
        """Make the folder and its format.json, if they are not there."""
        create_file(self.path / "format.json", canonical_json({"format": STORE_FORMAT}))

    # In use

    @contextmanager
    def using(self) -> Iterator[Self]:
        """A view of the store for as long as the context lasts: what is found by it, and what that was made from, is
        kept from a `simclr gc` until then. See pipeline/uses.py.
        """
        if self._uses is not None:
            yield self
            return
        view = copy.copy(self)
        view._uses = Uses(self.path)
        try:
            yield view
        finally:
            view._uses.end()

    def claim(self, stage: str, name: str) -> None:
        """Keep an artifact (by its digest) or what is of a step (by its key) from gc; outside of `using`, nothing is.

        Raises:
            Held: a gc is at it, and does not come to an end.
        """
        if self._uses is not None:
            self._uses.claim(stage, name)

    def _claimed(self, find: Callable[[], Found | None]) -> Found | None:
        """What `find` gives, claimed; found again until it stays."""
        found = find()
        while self._uses is not None and found is not None:
            self.claim(found.stage, found.digest)
            before, found = found, find()
            if found == before:
                break
        return found

    # Places

    def build(self, stage: str, digest: str) -> Path:
        """The immutable folder of an artifact: manifest.json and files/."""
        return self.path / "builds" / stage / digest[:2] / digest

    def files(self, stage: str, digest: str) -> Path:
        """The files of an artifact."""
        return self.build(stage, digest) / FILES

    def work(self, stage: str, key: str) -> Path:
        """The one mutable place of a step."""
        return self.path / "work" / stage / key

    def sources(self) -> Path:
        """What was seen of foreign sources; can be deleted at any time."""
        return self.path / "sources"

    def whole(self, stage: str, digest: str) -> Path:
        """Stamps of the files of an artifact when it was last found whole; can be deleted at any time."""
        return self.path / "whole" / stage / f"{digest}.json"

    def trackers(self, recipe: str, step: str, key: str) -> Path:
        """Where experiment trackers write their files (TensorBoard)."""
        return self.path / "trackers" / recipe / step / key[:8]

    def run_file(self, stage: str, key: str, digest: str) -> Path:
        """The record of an artifact."""
        return self.path / "runs" / stage / key / f"{digest}.json"

    def pointer(self, stage: str, key: str) -> Path:
        """Says which of the records of a key is current."""
        return self.path / "runs" / stage / key / "current.json"

    def timing(self, stage: str, key: str, digest: str) -> Path:
        """Rates, clocks and hosts of a run, beside its record: they are no function of the key."""
        return self.run_file(stage, key, digest).with_suffix(".timing.jsonl")

    def _name(self, recipe: str, step: str) -> Path:
        return self.path / "names" / recipe / step

    def _version(self, recipe: str, step: str, number: int) -> Path:
        return self._name(recipe, step) / f"v{number}.json"

    def new_trash(self) -> Path:
        """A place in trash/ that tells of now. What goes there keeps its path in the store, for who wants it back."""
        return self.path / "trash" / f"{time.strftime(TRASHED_AT, time.gmtime())}-{secrets.token_hex(4)}"

    # Reading

    def current(self, stage: str, key: str) -> Record | None:
        """The record of the artifact that a key stands for, or None if it was never made or is gone."""
        return self._claimed(lambda: self._current(stage, key))

    def _current(self, stage: str, key: str) -> Record | None:
        pointer = self.pointer(stage, key)
        try:
            digest = read_pointer(pointer)
        except FileNotFoundError:
            return None
        if not (self.build(stage, digest) / MANIFEST).is_file():
            return None
        try:
            return self.record(stage, key, digest)
        except DamagedArtifact:
            if pointer.is_file():
                raise
            return None  # gc took it away between two looks

    def record(self, stage: str, key: str, digest: str) -> Record:
        """What made an artifact.

        Raises:
            DamagedArtifact: the record is missing or was changed.
        """
        return read_record(self.run_file(stage, key, digest), stage, key, digest)

    def ancestors(self, record: Record) -> list[Record]:
        """Everything that an artifact was made of, itself included, sources first, each once.

        Raises:
            DamagedArtifact: a record is missing, was changed, or leads back to itself.
        """
        found: dict[tuple[str, ...], Record] = {}
        above: set[tuple[str, ...]] = set()

        def visit(one: Record) -> None:
            place = (one.stage, one.key, one.digest)
            if place in above:
                raise DamagedArtifact(f"{self.run_file(*place)}: input_runs: it was made of itself")
            above.add(place)
            for run in one.input_runs:
                if tuple(run) not in found:
                    visit(self.record(*run))
            above.remove(place)
            found.setdefault(place, one)

        visit(record)
        return list(found.values())

    def versions(self, recipe: str, step: str) -> list[Version]:
        """All versions of a step, oldest first."""
        paths = (self._version(recipe, step, number) for number in self._numbers(recipe, step))
        return [version for version in map(self.read_if_there, paths) if version is not None]

    def all_versions(self) -> Iterator[Version]:
        """All versions of all steps; one that gc takes away meanwhile is passed over."""
        for recipe, step in self.names():
            for version in self.versions(recipe, step):
                self.claim(version.stage, version.digest)
                if self._version(recipe, step, version.number).is_file():
                    yield version

    def _numbers(self, recipe: str, step: str) -> list[int]:
        names = os.listdir(self._name(recipe, step)) if self._name(recipe, step).is_dir() else []
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem[1:]) for stem in stems if VERSION.match(stem))

    def latest(self, recipe: str, step: str) -> Version | None:
        """What the last run of a step made or reused."""
        return self._claimed(lambda: self.read_if_there(self._name(recipe, step) / "latest"))

    def names(self) -> list[tuple[str, str]]:
        """(recipe, step) of everything that has a name, but what no REF could name."""
        found = ((path.parent.parent.name, path.parent.name) for path in self.path.glob("names/*/*/latest"))
        return sorted(names for names in found if REFERENCE.match("/".join(names)))

    def labels(self, version: Version) -> list[str]:
        """The aliases, `latest` among them, that point at a version."""
        return self.aliases(version.recipe, version.step).get(version.number, [])

    def aliases(self, recipe: str, step: str) -> dict[int, list[str]]:
        """By number of a version: the aliases that point at it, `latest` among them."""
        folder = self._name(recipe, step)
        found: dict[int, list[str]] = {}
        for name in sorted(one for one in os.listdir(folder) if "." not in one):
            found.setdefault(read_version(folder / name).number, []).append(name)
        return found

    def resolve(self, reference: str) -> Version:
        """Find what a REF names: `[recipe/]step[@vN|latest|alias]`, or at least 8 digits of a digest.

        Raises:
            UsageError: nothing has that name, or several have.
        """
        version = self._claimed(lambda: self._resolve(reference))
        assert version is not None, "what cannot be found raises"
        return version

    def _resolve(self, reference: str) -> Version:
        match = REFERENCE.match(reference)
        named = (
            []
            if match is None
            else [
                (recipe, step)
                for recipe, step in self.names()
                if step == match["step"] and match["recipe"] in (None, recipe)
            ]
        )
        if not named and DIGEST.match(reference):
            return self._by_digest(reference)
        if match is None or not named:
            known = ", ".join(f"{recipe}/{step}" for recipe, step in self.names()) or "nothing yet"
            raise UsageError(f"{reference}: no artifact of that name in {self.path} (it has: {known})")
        if len(named) > 1:
            choices = ", ".join(f"{recipe}/{step}" for recipe, step in named)
            raise UsageError(f"{reference}: several recipes have that step; say which: {choices}")
        label = match["label"] or "latest"
        folder = self._name(*named[0])
        version = self.read_if_there(folder / (f"{label}.json" if VERSION.match(label) else label))
        if version is None:
            known = ", ".join(sorted(entry.stem for entry in folder.iterdir() if not entry.name.startswith(".")))
            raise UsageError(f"{reference}: no such version or alias; {'/'.join(named[0])} has {known}")
        return version

    def _by_digest(self, digits: str) -> Version:
        matches = {
            version.digest: version
            for recipe, step in self.names()
            for version in self.versions(recipe, step)
            if version.digest.startswith(digits)
        }
        if len(matches) != 1:
            problem = "no artifact has" if not matches else "several artifacts have"
            raise UsageError(f"{digits}: {problem} a digest that begins so")
        return next(iter(matches.values()))

    def read_if_there(self, path: Path) -> Version | None:
        """The version that a file of names/ tells of; None if gc took it away."""
        try:
            return read_version(path)
        except FileNotFoundError:
            return None

    # Publishing

    def publish(self, folder: Path, stage: str) -> tuple[str, int]:
        """Seal a private folder (its content below `folder`/files) and move it to its place.

        Returns:
            Digest and size in bytes. Equal bytes that were there already are kept, and `folder` stays.
        """
        digest = seal(folder)
        reach("publish.sealed")
        self.claim(stage, digest)
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        place = self.build(stage, digest)
        if not commit_folder(folder, place) and self.verify(stage, digest):
            # What lay there was damaged since: the bytes that were made anew take its place.
            self.discard(place, self.new_trash())
            commit_folder(folder, place)
        reach("publish.placed")
        replace_file(self.whole(stage, digest), canonical_json(stamps(place)))  # read a moment ago, to be hashed
        return digest, sum(entry["size"] for entry in files.values())

    def discard(self, path: Path, trash: Path) -> None:
        """Move a file or folder of the store to the trash, by one rename; nothing, if it is gone."""
        place = trash / path.relative_to(self.path)
        while os.path.lexists(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # it is gone, or another gc has emptied the trash since
                path.rename(place)

    def write_record(self, record: Record, *, repoint: bool = False) -> Record:
        """Keep what made an artifact, and make it current if nothing was (or if `repoint`).

        Where another process has made something current meanwhile, nothing is written.

        Returns:
            The record of what is current for the key afterwards.
        """
        made_meanwhile = self.current(record.stage, record.key)
        if made_meanwhile is not None and not repoint:
            return made_meanwhile
        data = asdict(record)
        data["sha256"] = sha256_bytes(canonical_json(data))
        replace_file(self.run_file(record.stage, record.key, record.digest), canonical_json(data))
        reach("record.written")
        pointer = self.pointer(record.stage, record.key)
        content = canonical_json({"digest": record.digest})
        # Of several processes that come here at once the first wins; a pointer to what is gone counts for nothing.
        if repoint or (not create_file(pointer, content) and self.current(record.stage, record.key) is None):
            replace_file(pointer, content)
        reach("record.current")
        return self.current(record.stage, record.key) or record

    def name(self, recipe: str, step: str, record: Record) -> Version:
        """Give a run its version of a step, and point `latest` at it; equal bytes make no new version."""
        latest = self.latest(recipe, step)
        if (
            latest is not None
            and (latest.stage, latest.key, latest.digest) == (record.stage, record.key, record.digest)
            and self._version(recipe, step, latest.number).is_file()
        ):
            return latest  # without a look at all the others
        while True:
            versions = self.versions(recipe, step)
            same = [version for version in versions if version.digest == record.digest]
            number = same[0].number if same else 1 + max((version.number for version in versions), default=0)
            created_at = same[0].created_at if same else time.time()
            version = Version(recipe, step, number, record.stage, record.key, record.digest, created_at)
            content = canonical_json(asdict(version))
            if same or create_file(self._version(recipe, step, number), content):
                break
        reach("version.created")
        if self.latest(recipe, step) != version:
            replace_file(self._name(recipe, step) / "latest", content)
        reach("version.latest")
        return version

    def tag(self, version: Version, alias: str) -> None:
        """Let an alias point at a version.

        Raises:
            UsageError: the alias is not a plain word, or has a meaning of its own.
        """
        if not re.fullmatch(r"[A-Za-z][\w-]*", alias) or VERSION.match(alias) or alias == "latest":
            raise UsageError(f"{alias}: an alias is a word of letters, digits, - and _, not vN and not latest")
        replace_file(self._name(version.recipe, version.step) / alias, canonical_json(asdict(version)))

    def verify_version(self, version: Version) -> list[FileProblem]:
        """Read every byte of an artifact, and the record of what made it."""
        problems = self.verify(version.stage, version.digest)
        try:
            self.record(version.stage, version.key, version.digest)
        except DamagedArtifact as error:
            problems.append(FileProblem("record", str(error)))
        return problems

    def verify(self, stage: str, digest: str, known: Mapping[str, list[int]] | None = None) -> list[FileProblem]:
        """Read every byte of an artifact; an empty list means that all is as it was published.

        Args:
            known: stamps of files that need not be read again.
        """
        build = self.build(stage, digest)
        manifest = build / MANIFEST
        if manifest.is_file() and sha256_bytes(manifest.read_bytes()) != digest:
            return [FileProblem(MANIFEST, "does not have the digest that names the artifact")]
        return check(build, known)

    def require_whole(self, record: Record) -> None:
        """Refuse an artifact that is not as it was published.

        All of it is read, but for the files of a large one (shards, which have a hash for each sample as well) whose
        size and time are those that they had when they were last found whole.

        Raises:
            DamagedArtifact: names the file, and how the artifact is made again.
        """
        seen = self.whole(record.stage, record.digest)
        try:
            known = parse_json(seen.read_bytes())
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict):
            known = {}
        is_large = record.size_bytes > ALWAYS_READ_BYTES
        problems = self.verify(record.stage, record.digest, known if is_large else None)
        if problems:
            more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
            raise DamagedArtifact(
                f"{record.recipe}/{record.step}: {problems[0].path} {problems[0].problem}{more} in artifact "
                f"{record.digest[:8]}, so nothing reads it: `simclr run RECIPE {record.step} --force` makes it again"
            )
        found = stamps(self.build(record.stage, record.digest))
        if found != known:
            with suppress(OSError):  # a store that may only be read serves as well
                replace_file(seen, canonical_json(found))

    def load(self, reference: str) -> Any:
        """The encoder that a REF names, as a torch module in evaluation mode on the CPU, with `.preprocess`.

        `encoder(torch.stack([encoder.preprocess(image) for image in images]))` gives embeddings [B, D].

        Raises:
            UsageError: nothing has that name, or it is no encoder.
            DamagedArtifact: a file is not the one that was published.
        """
        with self.using() as store:
            version = store.resolve(reference)
            record = store.record(version.stage, version.key, version.digest)
            store.require_whole(record)
            store.ancestors(record)  # a record that was made of itself would have no end
            made_by: dict[str, dict[str, Any]] = {}
            pending = [record]
            for one in pending:  # the nearest of each stage counts
                made_by.setdefault(one.stage, one.settings)
                pending += [store.record(*run) for run in one.input_runs]
            return encoders.load(store.files(record.stage, record.digest), version.reference, made_by)

    def gallery(self, reference: str, encoder: str) -> encoders.Gallery:
        """Features to search in, or an index of some.

        Args:
            reference: an artifact of the stage `embed`, or one of the stage `retrieve` that has an index.
            encoder: the REF of the encoder that must have made the features.

        Raises:
            UsageError: it is something else, or another encoder made it.
            DamagedArtifact: a file is not the one that was published.
        """
        version, maker = self.resolve(reference), self.resolve(encoder)
        record = self.record(version.stage, version.key, version.digest)
        if record.stage not in ("embed", "retrieve"):
            raise UsageError(
                f"{reference} was made by {record.stage}: a gallery is a folder, a step of the stage embed, or one of "
                "the stage retrieve with an index"
            )
        features = record if record.stage == "embed" else self._input(record, "embed")
        if features.inputs.get("encoder") != maker.digest:
            raise UsageError(f"{reference} holds features of another encoder than {encoder}: embed the images with it")
        self.require_whole(record)
        files, shards = self.files(record.stage, record.digest), self._input(features, "shard")
        index = None
        if record.stage == "retrieve":
            try:
                index = parse_json((files / "metrics.json").read_bytes()).get("index")
            except (OSError, ValueError, AttributeError) as error:
                raise DamagedArtifact(f"{files / 'metrics.json'}: index: cannot be read: {error}") from error
            if index is None:
                raise UsageError(
                    f"{reference} has no index (it is made by index: hnsw, and by by_size of a large gallery only); to "
                    "search without one, name features, which are of the stage embed"
                )
        self.require_whole(shards)
        looks = {name: features.settings[name] for name in ("crops", "mirror") if name in features.settings}
        return encoders.Gallery(files, self.files(shards.stage, shards.digest), looks, index)

    def _input(self, record: Record, stage: str) -> Record:
        """What made the first input of that stage. Raises DamagedArtifact where there is none."""
        found = next((self.record(*run) for run in record.input_runs if run[0] == stage), None)
        if found is None:
            place = self.run_file(record.stage, record.key, record.digest)
            raise DamagedArtifact(f"{place}: input_runs: nothing of the stage {stage} is among them")
        return found


def open_store(path: Path | str | None = None) -> Store:
    """Open the store at `path`, at $SIMCLR_STORE, or at ./artifacts."""
    return Store(Path(path) if path is not None else None)
