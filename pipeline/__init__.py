"""The machinery: recipes, the artifact store, the runner. It knows nothing of images or of SimCLR."""

from pipeline.store import open_store

__all__ = ["open_store"]
