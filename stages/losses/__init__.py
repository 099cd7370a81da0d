"""Losses."""

from stages.losses.loss import Loss, Task
from stages.losses.nt_xent import contrastive_accuracy, nt_xent
from stages.losses.registry import LOSSES, build_loss
from stages.losses.supcon import sup_con

__all__ = ["LOSSES", "Loss", "Task", "build_loss", "contrastive_accuracy", "nt_xent", "sup_con"]
