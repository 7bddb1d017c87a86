"""A file system without locks, as `fcntl.flock` answers there: in this process, and in a second one
that begins with NO_LOCKS.
"""

from __future__ import annotations

import errno

NO_LOCKS = """
import errno, fcntl
def refuse(*_):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
fcntl.flock = refuse
"""


def no_locks(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")
