"""Losses; the supervised ones by name are in stages/losses/registry.py."""

from stages.losses.loss import Loss, Task
from stages.losses.nt_xent import contrastive_accuracy, nt_xent
from stages.losses.supcon import sup_con

__all__ = ["Loss", "Task", "contrastive_accuracy", "nt_xent", "sup_con"]
