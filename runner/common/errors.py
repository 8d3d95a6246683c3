"""The exception for errors that the user can fix, and the errors of file systems that are reported in one line."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
TRANSIENT_ERRNOS = (errno.EIO, errno.ESTALE)  # often over in a moment


class UserError(ValueError):
    """Raised for invalid user input. The message states the invalid value, what was expected, and the remedy."""
