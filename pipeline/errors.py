"""Errors that a user can mend, each with the exit code that the command ends with.

Code that may not import `pipeline` (stages/images and its neighbours) raises an exception of its own with an
integer attribute `exit_code`; the command line treats it alike. Everything else is a fault of ours: exit 1.
"""


class PipelineError(Exception):
    """One clear line: what, where, how to mend it."""

    exit_code = 1


class UsageError(PipelineError):
    """Wrong command line, recipe or settings."""

    exit_code = 2


class DamagedArtifact(PipelineError):
    """A file of an artifact is not the one that was published."""

    exit_code = 4


class NoUsableCheckpoint(PipelineError):
    """Checkpoints are there and none of them can be read."""

    exit_code = 5


class BadData(PipelineError):
    """The images or labels do not serve for what was asked."""

    exit_code = 6


class NoSpace(PipelineError):
    """No space: the disk is full, or memory is exhausted."""

    exit_code = 7


class NotFinite(PipelineError):
    """A loss or gradient became infinite or NaN."""

    exit_code = 8


class RankLost(PipelineError):
    """Another rank died or hangs."""

    exit_code = 9


class Held(PipelineError):
    """Another process is at the same work."""

    exit_code = 75


class AlreadyTold(PipelineError):
    """The end because of a rank that failed, and that said why."""

    def __init__(self, exit_code: int):
        super().__init__(f"a rank ended with exit code {exit_code}")
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A signal asked for the end; the same command resumes. Not an Exception, so that no `except` swallows it."""

    def __init__(self, signal_number: int):
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number
