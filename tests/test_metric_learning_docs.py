"""docs/metric-learning.md: its table is that of the registry, and the loss that it adds works."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from loss_references import negatives_of, positives_of, unit

from pipeline.settings import kinds_of, one_or_several, setting
from stages.losses import Loss, Task
from stages.losses.registry import LOSSES, build_loss
from stages.settings import losses
from stages.settings.finetune import Finetune
from stages.settings.loss_table import as_markdown, loss_rows

PAGE = (Path(__file__).resolve().parent.parent / "docs/metric-learning.md").read_text(encoding="utf-8")
LABELS = [0, 1, 0, 2, 1, 0, -1, 2]


def test_the_table_is_that_of_the_registry() -> None:
    (table,) = re.findall(r"<!-- simclr losses --markdown -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert table == as_markdown(loss_rows())
    assert [row["name"] for row in loss_rows()] == list(LOSSES)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {len(loss_rows()[0]) + 1}
    for row in loss_rows():
        assert all(row.values())
        for sampler in row["sampler"].split(", "):
            assert f"| `{sampler}` |" in PAGE


def test_the_loss_that_it_adds_is_its_formula(monkeypatch: Any) -> None:
    implementation, settings = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(implementation.strip().splitlines()) <= 30
    module = ModuleType("tuplet")
    exec(compile(implementation, "tuplet.py", "exec"), module.__dict__)
    monkeypatch.setitem(LOSSES, "tuplet", module.Tuplet)
    exec(compile(settings, "losses.py", "exec"), namespace := vars(losses) | {})
    choice = one_or_several([*losses.LOSSES, namespace["Tuplet"]])

    class WithIt(Finetune):
        loss: choice = setting(...)

    kinds = kinds_of(WithIt.model_fields["loss"])
    assert [*kinds] == [*LOSSES]
    recipe = {"shards": "shards", "encoder": "random", "loss": {"name": "tuplet", "scale": 5.0}}
    (chosen,) = WithIt.model_validate(recipe).losses
    assert get_args(kinds["tuplet"].model_fields["name"].annotation) == ("tuplet",)
    loss_of: Loss = build_loss("tuplet", chosen.options, Task(4, (3, 2, 2)))
    rows = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, figures = loss_of(rows, torch.tensor(LABELS), 1.0)
    units, wanted = unit(rows), []
    for a in range(8):
        for p in positives_of(a, LABELS):
            terms = [(5 * (units[a] @ units[n] - units[a] @ units[p])).exp() for n in negatives_of(a, LABELS)]
            wanted.append((1 + torch.stack(terms).sum()).log())
    torch.testing.assert_close(found, torch.stack(wanted).mean())
    assert figures["idle"] == 0
