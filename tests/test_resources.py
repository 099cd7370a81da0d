"""What counts as a full disk and as memory that ran out, and what does not."""

import errno
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipeline.errors import UsageError
from pipeline.resources import exhausted, is_full_disk, is_out_of_memory
from pipeline.workplace import append_line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
)
def test_a_full_disk(error: Exception) -> None:
    assert is_full_disk(error)
    assert not is_out_of_memory(error)
    told = exhausted(error, "simclr")
    assert told is not None
    assert told.exit_code == 7
    assert str(told).startswith("simclr: the disk is full")
    assert "`simclr gc`" in str(told)
    assert str(exhausted(error)).startswith("the disk is full"), "the command line puts its name before it"


def test_memory_that_ran_out() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60)
    errors = [
        of_torch.value,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        BrokenProcessPool("A process in the process pool was terminated abruptly"),
    ]
    for error in errors:
        assert is_out_of_memory(error), error
        assert not is_full_disk(error), error
        told = exhausted(error, "simclr", ["simclr.batch_size", "views.image_size"])
        assert told is not None
        assert told.exit_code == 7
        assert "lower simclr.batch_size or views.image_size" in str(told)
        assert "\n" not in str(told)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory"),
        UsageError("No space left on device, says a user's own word"),
    ],
)
def test_everything_else_keeps_its_own_words(error: Exception) -> None:
    assert exhausted(error, "simclr") is None


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})

    class Full:
        """A file on a disk with room for three more bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line: bytes) -> int:
            return self.file.write(line[:3])

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda *given, **options: Full(real(*given, **options)))
    with pytest.raises(OSError, match="No space left"):
        append_line(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"step":1}\n'
