"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("pipeline", "stages") for path in (TOP / package).rglob("*.py"))
FOLDERS = ("encoders", "evaluation", "images", "labels", "losses", "models", "reports", "sources", "views")

# Each module of pipeline/ may import those on its right, and those that they may import.
LAYERS = {
    "__main__": {"cli"},
    "cli": {"runner", "display", "schema", "launcher", "encoders", "resources", "host", "sweep"},
    "display": {"runner", "terminal", "resources", "sweep"},
    "schema": {"stage", "templates"},
    "runner": {"recipe", "store", "comparison", "launcher", "resources"},
    "comparison": {"store"},
    "worker": {"run", "recipe", "store", "environment", "resources", "host", "workplace"},
    "training": {"run", "checkpoint", "finite", "tracking", "stopwatch", "resources"},
    "run": {"tracking", "progress", "settings", "ranks", "workplace"},
    "workplace": {"manifest", "resources"},
    "finite": {"manifest", "ranks"},
    "ranks": {"launcher"},
    "launcher": {"errors"},
    "checkpoint": {"manifest"},
    "failpoints": set(),
    "processes": set(),
    "tracking": {"errors"},
    "progress": {"terminal"},
    "terminal": set(),
    "stopwatch": set(),
    "recipe": {"stage", "store", "templates", "yaml_text"},
    "yaml_text": set(),
    "templates": set(),
    "sweep": {"store"},
    "store": {"provenance", "encoders", "uses"},
    "uses": {"manifest"},
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
    for name in imports_of(path):
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


FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.unsafe_load", "os.system"}


def test_indexes_are_read_in_one_place() -> None:
    """faiss trusts what it reads: `gallery` of the store has held the files against their digests by then."""
    assert [name_of(path) for path in SOURCES if "faiss.read_index(" in path.read_text()] == [
        "stages.evaluation.indexed_gallery"
    ]
    callers = {name_of(path) for path in SOURCES if "read_indexed_gallery(" in path.read_text()}
    assert callers == {"stages.evaluation.indexed_gallery", "stages.encoders.search"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_that_could_run_code_from_a_file(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            assert "extractall" not in ast.unparse(node.func)
            assert not any(keyword.arg == "shell" for keyword in node.keywords)
