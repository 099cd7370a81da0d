"""Hostile inputs, each with the command by which it would come in and the words by which it has to be refused."""

from faults.corpus.artifacts import make_artifacts
from faults.corpus.inputs import Hostile
from faults.corpus.recipes import make_recipes
from faults.corpus.sources import make_sources
from faults.corpus.store import make_manifests, make_names, make_words
from faults.corpus.tars import TARS
from faults.corpus.weights import make_checkpoints, make_weights

__all__ = ["CORPUS", "TARS", "Hostile"]

CORPUS = [
    *make_sources(), *make_recipes(), *make_weights(), *make_artifacts(), *make_names(), *make_manifests(),
    *make_checkpoints(), *make_words(),
]  # fmt: skip
assert len({one.name for one in CORPUS}) == len(CORPUS)
