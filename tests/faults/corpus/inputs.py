"""What a hostile input is."""

from collections.abc import Callable
from dataclasses import dataclass

from faults.world import World

Command = list[str]


@dataclass(frozen=True)
class Hostile:
    """An input that must not get in.

    Attributes:
        bring: writes it and gives the command by which a user would bring it in.
        told: words that the refusal has to have: the file and the field.
        needs_store: a recipe has to have run before.
    """

    name: str
    bring: Callable[[World], Command]
    told: tuple[str, ...]
    needs_store: bool = False
