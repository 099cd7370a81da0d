"""The stages and their settings. Torch-free: the command line reads it to validate recipes and to write the schema."""

from pipeline.stage import Stage
from stages.settings.augment import Augment
from stages.settings.embed import Embed
from stages.settings.finetune import Finetune
from stages.settings.loss_table import as_markdown, loss_rows
from stages.settings.pretrain import Pretrain
from stages.settings.probe import Probe
from stages.settings.pseudo_label import PseudoLabel
from stages.settings.report import Report
from stages.settings.retrieve import Retrieve
from stages.settings.shard import IMAGE_SUFFIXES, Shard

__all__ = ["IMAGE_SUFFIXES", "STAGES", "as_markdown", "loss_rows"]

STAGES = {
    name: Stage(name, settings, module=f"stages.{name}")
    for name, settings in {
        "shard": Shard,
        "augment": Augment,
        "pretrain": Pretrain,
        "finetune": Finetune,
        "embed": Embed,
        "pseudo_label": PseudoLabel,
        "probe": Probe,
        "retrieve": Retrieve,
        "report": Report,
    }.items()
}
"""Every stage by name; adding one is a file here, a file in stages/, and a line."""
