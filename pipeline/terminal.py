"""Words with a style, and tables: by rich on a terminal, for which alone it is loaded; plain lines elsewhere."""

import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console(*, stderr: bool = False) -> "Console":
    """One for each stream, so that lines go above a bar that is drawn there."""
    from rich.console import Console  # noqa: PLC0415 - quick commands that are piped need not wait for it

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def print_styled(*parts: str | tuple[str, str], stderr: bool = False) -> None:
    """One line of words, some of them with a style (`bold`, `yellow`) beside them."""
    stream = sys.stderr if stderr else sys.stdout
    if not stream.isatty():
        print("".join(part if isinstance(part, str) else part[0] for part in parts), file=stream)
        return
    from rich.text import Text  # noqa: PLC0415 - see above

    console(stderr=stderr).print(Text.assemble(*parts))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, whose cells fold on a terminal."""
    if not sys.stdout.isatty():
        _print_plain(columns, rows)
        return
    from rich.table import Table  # noqa: PLC0415 - see above
    from rich.text import Text  # noqa: PLC0415 - see above

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def _print_plain(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """The same for another program to read: one line a row, however long, without colours."""
    lines = [[*columns], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
