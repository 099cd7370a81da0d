"""States of a training, to save."""

from typing import Any

import torch

from stages.models import build_encoder


def trained(step: int, width: int = 8) -> dict[str, Any]:
    """What a training loop of a small encoder saves after a step: 0.7 MB of tensors at width 8, and some text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step)
        encoder = build_encoder("resnet10", width, 64, False, 16)
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
        encoder(torch.rand(2, 3, 16, 16)).square().mean().backward()
        optimiser.step()
        loop = {"metrics": f'{{"step":{step}}}\n' * 1000, "random": [torch.get_rng_state()]}
    return {"loop": loop, "state": {"encoder": encoder.state_dict(), "optimiser": optimiser.state_dict()}}
