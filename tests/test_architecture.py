"""Who may import whom, read from the source."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from pipeline import yaml_text

TOP = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("pipeline", "stages") for path in (TOP / package).rglob("*.py"))
FOLDERS = ("encoders", "evaluation", "images", "labels", "losses", "models", "reports", "sources", "views")

# Each module of pipeline/ may import those on its right, and those that they may import.
LAYERS = {
    "__main__": {"cli"},
    "cli": {"runner", "display", "schema", "launcher", "encoders", "resources", "host", "sweep", "trash"},
    "display": {"runner", "terminal", "resources", "sweep"},
    "schema": {"stage", "templates"},
    "runner": {"recipe", "store", "comparison", "launcher", "resources"},
    "comparison": {"store"},
    "worker": {"run", "recipe", "store", "environment", "resources", "host", "workplace"},
    "training": {"run", "checkpoint", "finite", "tracking", "stopwatch", "resources"},
    "run": {"tracking", "progress", "settings", "ranks", "workplace"},
    "workplace": {"manifest", "resources"},
    "finite": {"manifest", "ranks", "resources"},
    "ranks": {"launcher"},
    "launcher": {"errors"},
    "checkpoint": {"manifest"},
    "failpoints": set(),
    "processes": set(),
    "tracking": {"errors"},
    "progress": {"resources", "terminal"},
    "terminal": set(),
    "stopwatch": set(),
    "recipe": {"stage", "store", "templates", "yaml_text"},
    "yaml_text": set(),
    "templates": set(),
    "sweep": {"leftovers"},
    "leftovers": {"trash"},
    "trash": {"store"},
    "store": {"provenance", "encoders", "uses", "records"},
    "records": {"manifest"},
    "uses": {"records"},
    "encoders": {"progress", "provenance", "resources"},
    "resources": {"errors"},
    "host": set(),
    "stage": {"settings"},
    "provenance": {"manifest", "settings"},
    "environment": {"manifest"},
    "settings": set(),
    "manifest": {"errors", "failpoints", "processes"},
    "errors": set(),
}


def name_of(path: Path) -> str:
    name = path.relative_to(TOP).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Full names of the modules of ours that a file imports."""
    modules = {name_of(one) for one in SOURCES}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name.split(".")[0] in ("pipeline", "stages")}


def allowed_below(module: str) -> set[str]:
    below: set[str] = set()
    pending = {module}
    while pending:
        for one in LAYERS[pending.pop()]:
            if one not in below:
                below.add(one)
                pending.add(one)
    return below


PIPELINE = [path for path in SOURCES if path.parent.name == "pipeline"]


@pytest.mark.parametrize("path", PIPELINE, ids=name_of)
def test_the_machinery_is_layered_and_knows_no_stage(path: Path) -> None:
    module = path.stem
    if module == "__init__":
        assert imports_of(path) == {"pipeline.store"}
        return
    # Where both halves are put together.
    stages = {name for name in imports_of(path) if name.startswith("stages.settings")} if module == "cli" else set()
    allowed = {f"pipeline.{one}" for one in allowed_below(module) | {"errors"}} | stages | {"pipeline"}
    assert imports_of(path) <= allowed


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name == "stages"], ids=name_of)
def test_a_stage_imports_its_settings_what_it_is_given_and_the_folders(path: Path) -> None:
    allowed = {"pipeline.run", "pipeline.training", "pipeline.errors", f"stages.settings.{path.stem}"}
    for name in imports_of(path) - allowed:
        assert name.split(".")[1] in FOLDERS, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name in FOLDERS], ids=name_of)
def test_the_folders_stand_alone(path: Path) -> None:
    # Where images are packed, tests let the process die.
    allowed = {"pipeline.failpoints"} if path.parent.name == "images" else set()
    for name in imports_of(path) - allowed:
        parts = name.split(".")
        assert parts[0] == "stages", f"{path} imports {name}"
        assert parts[1] in FOLDERS, f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name == "settings"], ids=name_of)
def test_settings_are_light(path: Path) -> None:
    for name in imports_of(path):
        assert name in ("pipeline.settings", "pipeline.stage") or name.startswith("stages.settings"), name


def test_what_takes_its_time_is_imported_by_name_in_four_places() -> None:
    """The runner reaches the worker, the worker a stage, and `load`, `embed` and `export` what knows encoders: torch
    comes along with each, and none of the three may be waited for by commands that do without. The table of stages
    reaches the settings of those that a recipe has."""
    dynamic = {
        name_of(path)
        for path in SOURCES
        if any(word in path.read_text() for word in ("import_module", "__import__", "importlib.util"))
    }
    assert dynamic == {"pipeline.encoders", "pipeline.runner", "pipeline.worker", "stages.settings"}


def test_no_module_imports_itself_in_a_loop() -> None:
    edges = {name_of(path): imports_of(path) for path in SOURCES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        for one in edges.get(name, set()):
            visit(one, (*above, name))
        done.add(name)

    for name in edges:
        visit(name, ())


FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),  # run what they read
    *("urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub", "fsspec"),  # send
    "pty",
}
"""That nothing imports, at any depth (`urllib.request`)."""
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "os.system", "os.popen"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("load_state_dict_from_url", "download_url_to_file", "urlopen", "urlretrieve"),
    *("pd.read_pickle", "np.loads", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
FORBIDDEN_METHODS = {"extractall", "extract", "unpack_archive", "unpickle", "read_pickle", "to_pickle"}
"""Of whatever object."""
SAFE_LOADERS = {"_Loader", "_SafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader"}
NUMPY_LOADS = {"np.load", "numpy.load", "np.lib.format.read_array", "numpy.lib.format.read_array"}
PROCESSES = {"run", "Popen", "call", "check_call", "check_output"}
"""Functions of subprocess."""


def test_indexes_are_read_in_one_place() -> None:
    """faiss trusts what it reads: `gallery` of the store has held the files against their digests by then."""
    assert [name_of(path) for path in SOURCES if "faiss.read_index(" in path.read_text()] == [
        "stages.evaluation.indexed_gallery"
    ]
    callers = {name_of(path) for path in SOURCES if "read_indexed_gallery(" in path.read_text()}
    assert callers == {"stages.evaluation.indexed_gallery", "stages.encoders.search"}


def dangers(source: str) -> list[str]:
    """What in a source could run code from a file, or send something."""
    return [danger for node in ast.walk(ast.parse(source)) for danger in dangers_of(node)]


def dangers_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return [f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.hub."):
        return [] if node.attr == "get_dir" else [ast.unparse(node)]
    if not isinstance(node, ast.Call):
        return []
    name, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
    found = []
    if name in FORBIDDEN_CALLS:
        found.append(name)
    if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS:
        found.append(name)
    if "shell" in given or given.get("weights_only", "True") != "True":
        found.append(f"{name} with shell or without weights_only")
    if name.endswith("get_state_dict") and given.get("weights_only") != "True":
        found.append(f"{name} without weights_only")
    if name in NUMPY_LOADS and given.get("allow_pickle") != "False":
        found.append(f"{name} without allow_pickle=False")
    if name in ("yaml.load", "yaml.parse") and given.get("Loader") not in SAFE_LOADERS:
        found.append(f"{name} with {given.get('Loader')}")
    module, _, function = name.rpartition(".")
    if module == "subprocess" and function in PROCESSES:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.JoinedStr) or (isinstance(first, ast.Constant) and isinstance(first.value, str)):
            found.append(f"{name} with a text")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_that_could_run_code_from_a_file(path: Path) -> None:
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import urllib.request",
        "from urllib import request",
        "import requests",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "torch.hub.load('x', 'y')",
        "torch.hub.load_state_dict_from_url(url)",
        "published.get_state_dict(check_hash=True)",
        "something.load(path, weights_only=False)",
        "tar.extractall()",
        "tar.extract(member)",
        "shutil.unpack_archive(path)",
        "subprocess.run(words, shell=True)",
        "subprocess.run('touch x')",
        "subprocess.Popen(f'touch {x}')",
        "os.system('x')",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "urlopen(url)",
    ],
)
def test_what_could_is_seen(source: str) -> None:
    assert len(dangers(source)) >= 1


def test_loaders_of_yaml_are_safe() -> None:
    assert issubclass(yaml_text._Loader, yaml.SafeLoader | yaml.CSafeLoader)
    assert not issubclass(yaml_text._Loader, yaml.UnsafeLoader)


def test_source_of_pages_is_their_own() -> None:
    """No template, style or script of a report names another machine."""
    for path in filter(Path.is_file, (TOP / "stages" / "reports" / "templates").rglob("*")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"(src|href|url|import|fetch|XMLHttpRequest|WebSocket)\s*[=(]\s*[\"']?(https?:)?//", text
        ), path
        assert "eval(" not in text, path
