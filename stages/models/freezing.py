"""Parts of an encoder that training leaves as they are."""

from torch import nn

from stages.models.encoders import Encoder


class UnknownPart(ValueError):
    """The encoder has no part of that name."""


def freeze(encoder: Encoder, part: str) -> list[nn.Module]:
    """Freeze an encoder's backbone from its first layer up to and with a part; the order is that of definition.

    Args:
        part: a name inside the backbone, such as `layer2` or `layer2.0`; or `encoder` for all of it and of the neck.

    Returns:
        The modules that are frozen: their parameters want no gradient, and training has to leave them in evaluation
        mode (`train_around`).

    Raises:
        UnknownPart: there is none of that name; the message lists what there is.
    """
    frozen: list[nn.Module] = [encoder]
    if part == "encoder":
        encoder.requires_grad_(False)
        return frozen
    frozen, module = [], encoder.library_module()
    for name in part.split("."):
        children = dict(module.named_children())
        if name not in children:
            top = encoder.library_module().named_children()
            names = [child for child, inner in top if next(inner.parameters(), None) is not None]
            raise UnknownPart(f"no part {part!r}; in order: {', '.join(names)}; parts of them as layer2.0")
        # What is no layer of its own (a class token, an embedding of positions) stands in front of the layers.
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        for before in list(children)[: list(children).index(name)]:
            frozen.append(children[before].requires_grad_(False))
        module = children[name]
    return [*frozen, module.requires_grad_(False)]


def train_around(encoder: Encoder, frozen: list[nn.Module]) -> None:
    """Training mode for all but the frozen modules: their batch norms keep their statistics, their dropouts pass."""
    encoder.train()
    for module in frozen:
        module.eval()
