"""The machinery: recipes, the artifact store, the runner. It knows nothing of images or of SimCLR."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.store import open_store

__all__ = ["open_store"]


def __getattr__(name: str) -> Any:
    """`open_store` is imported when it is asked for (PEP 562): pipeline/__main__.py comes before what it needs."""
    if name == "open_store":
        from pipeline import store  # noqa: PLC0415 - that is what this function is for

        return store.open_store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
