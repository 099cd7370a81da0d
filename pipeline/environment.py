"""What a result was made with, for the record: code, machine and libraries.

Only runs import it: it reads what is installed, for which the quick commands would have to wait.
"""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from pipeline.manifest import canonical_json, sha256_bytes, sha256_file

LIBRARIES = (
    "torch",
    "torchvision",
    "kornia",
    "timm",
    "accelerate",
    "webdataset",
    "scikit-learn",
    "faiss-cpu",
    "numpy",
    "pillow",
)


def code() -> dict[str, Any]:
    """Git commit, whether the tree was changed, and a hash over the source of both packages."""
    top = Path(__file__).resolve().parent.parent
    sources = sorted(path for package in ("pipeline", "stages") for path in (top / package).rglob("*.py"))
    listing = [[path.relative_to(top).as_posix(), sha256_file(path)] for path in sources]
    commit = _git(top, "rev-parse", "HEAD") if (top / ".git").exists() else None
    return {
        "commit": commit,
        "dirty": bool(_git(top, "status", "--porcelain")) if commit else None,
        "source_sha256": sha256_bytes(canonical_json(listing)),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Python, platform, processors and library versions."""
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": versions,
    }
