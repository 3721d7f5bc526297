"""What may be wrong with a user's files."""

from __future__ import annotations


class DataError(ValueError):
    """A file or folder of images is missing, damaged or of another kind; the message names it."""
