"""Errors a user can cause and mend. Each message has the value, the reason and the way out."""

from __future__ import annotations


class GenembedError(Exception):
    """Base of every error that genembed raises on purpose."""


class ConfigurationError(GenembedError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(GenembedError, ValueError):
    """A model folder that is incomplete, unsafe, or does not fit its base model."""


class TextError(GenembedError):
    """Base of the errors that one text can be at fault for."""

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        """Position of the text in the caller's list; None if no single text is at fault."""


class InputError(TextError, ValueError):
    """A text that cannot be embedded; the message names its row."""


class DataError(GenembedError, ValueError):
    """Training data that cannot be used; the message names the file and, where there is one, the line."""


class NonFiniteError(TextError, ArithmeticError):
    """A vector that came out non-finite or zero; the message names its row."""


class OutOfMemoryError(TextError, MemoryError):
    """One single row does not fit into memory, so splitting the batch cannot help."""


class TrainingError(GenembedError, RuntimeError):
    """A training run that cannot go on, such as one whose checkpoint cannot be written."""


class JobError(GenembedError, RuntimeError):
    """A corpus job that cannot go on; what it has done is kept."""


class GenembedWarning(UserWarning):
    """Something the user should know and that is no error, such as texts that were cut."""


class MissingExtraError(GenembedError, ImportError):
    """An optional dependency is not installed; the message has the command that installs it."""


def missing_extra(extra: str, package: str) -> MissingExtraError:
    """Name the extra that provides `package` and the command that installs it."""
    return MissingExtraError(
        f"{package} is not installed: this needs the extra {extra!r}. Install it with: pip install 'genembed[{extra}]'"
    )
