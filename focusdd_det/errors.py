"""What can go wrong, and the exit code each kind of failure ends the program with.

Every message says what happened, in which file, what was expected and what to do next.
"""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # wherever it strikes, this is a full disk


class FocusDDError(Exception):
    """Base of all errors this package raises on purpose. `exit_code` is what the process returns."""

    exit_code = 1


class ConfigError(FocusDDError):
    """A wrong option, key, value or command line."""

    exit_code = 2


class DataError(FocusDDError):
    """Source pictures, class maps, sets or annotations that cannot be used."""

    exit_code = 3


class WeightsError(FocusDDError):
    """A checkpoint (teacher, selector, student) that is missing, damaged, unsafe or does not fit."""

    exit_code = 4


class DiskError(FocusDDError):
    """No space, no permission, a folder that is not ours, or one that another process is writing."""

    exit_code = 5


class VerifyError(FocusDDError):
    """A set on disk that is not what its manifest says."""

    exit_code = 6


class Interrupted(FocusDDError):
    """Stopped by the user; what is done is kept and the same command goes on."""

    exit_code = 130
