"""What can go wrong for a user. Every message says what was expected, what was got, what to do."""

from __future__ import annotations


class MraError(Exception):
    """Something the user can put right; shown as one line."""


class CheckpointError(MraError):
    """The model can't be found, read or trusted."""


class UnsupportedModelError(MraError):
    """The model has no attention that can be replaced."""


class InputError(MraError):
    """The text, image, length or setting does not fit."""


class ExportError(MraError):
    """The patched checkpoint can't be written."""


class VerifyError(MraError):
    """A patched checkpoint is not what it says."""


class SearchError(MraError):
    """No plan keeps what has to be kept."""
