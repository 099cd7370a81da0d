"""Run a function in several processes that are joined by gloo, and bring back what each of them found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing


def run_in_processes(
    function: Callable[..., dict[str, Tensor]], folder: Path, *arguments: Any, processes: int = 2
) -> list[dict[str, Tensor]]:
    """Call `function(rank, *arguments)` once in each process; what they return comes back in order of rank.

    A start costs some seconds, most of it imports: do much in one call, in a fixture of the module's scope.

    Args:
        function: of a module's top level, so that a new process can import it; it finds a process group ready.
        folder: an empty folder that the processes meet in.
    """
    multiprocessing.spawn(_run_one, args=(processes, function, folder, arguments), nprocs=processes, join=True)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(processes)]


def _run_one(
    rank: int,
    processes: int,
    function: Callable[..., dict[str, Tensor]],
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    try:
        found = function(rank, *arguments)
        save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{rank}.safetensors")
    finally:
        distributed.destroy_process_group()
