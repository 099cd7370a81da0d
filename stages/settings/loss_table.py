"""The supervised losses as a table: what `simclr losses` prints, and docs/metric-learning.md holds."""

from typing import get_args

from stages.settings.losses import LOSSES, LossSettings

COLUMNS = ("name", "what it does", "learns from", "labels", "sampler", "mining", "paper", "choose it when")


def loss_rows() -> list[dict[str, str]]:
    """One row a loss, by column, in the order of the registry; of mining the default comes first."""
    return [dict(zip(COLUMNS, _row(loss), strict=True)) for loss in LOSSES]


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The table as Markdown."""
    cells = [[row[name].replace("|", "\\|") for name in COLUMNS] for row in rows]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(loss: type[LossSettings]) -> list[str]:
    name = get_args(loss.model_fields["name"].annotation)[0]
    assert loss.__doc__ is not None
    what = " ".join(loss.__doc__.split()).removesuffix(".")
    labels = "several" if loss.several_labels else "one"
    return [name, what, loss.learns_from, labels, loss.sampler, _mining(loss), loss.paper, loss.choose_when]


def _mining(loss: type[LossSettings]) -> str:
    field = loss.model_fields.get("mining")
    if field is None:
        return "\N{EN DASH}"
    return ", ".join([field.default, *(kind for kind in get_args(field.annotation) if kind != field.default)])
