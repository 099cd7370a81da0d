"""SimCLR's projector: embeddings -> the vectors that the contrastive loss compares."""

from collections import OrderedDict

from torch import nn


def build_projector(embedding_size: int, layers: int, hidden: int, dimension: int) -> nn.Sequential:
    """[N, embedding_size] -> [N, dimension] (Chen et al. 2020, section 2.1; layers as in google-research/simclr).

    Each linear layer goes without bias, since a batch norm follows. Between layers stands a ReLU; the last batch norm
    has a scale and no shift.

    Args:
        layers: linear layers, at least 1.
        hidden: width of all layers but the last.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    width_in = embedding_size
    for layer in range(1, layers):
        modules[f"linear{layer}"] = nn.Linear(width_in, hidden, bias=False)
        modules[f"norm{layer}"] = nn.BatchNorm1d(hidden)
        modules[f"relu{layer}"] = nn.ReLU(inplace=True)
        width_in = hidden
    modules[f"linear{layers}"] = nn.Linear(width_in, dimension, bias=False)
    last_norm = nn.BatchNorm1d(dimension)
    last_norm.register_parameter("bias", None)
    modules[f"norm{layers}"] = last_norm
    return nn.Sequential(modules)
