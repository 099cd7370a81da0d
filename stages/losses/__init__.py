"""Losses."""

from stages.losses.nt_xent import contrastive_accuracy, nt_xent

__all__ = ["contrastive_accuracy", "nt_xent"]
