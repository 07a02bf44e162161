"""One lock for all of the project: whoever writes to a folder or beside a file holds a lock file there.

The lock is the kernel's (flock, by the library filelock), so that it ends with the process that holds it, however that
ends. The lock file stays, and names its last holder. Where a file system has no such locks there is a warning.
"""

import contextlib
import errno
import logging
import os
import socket
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from storage.files import one_line, owner_of

logger = logging.getLogger(__name__)

# What flock answers where the file system has no locks: not built in, no lock server, not for this kind of file.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_warned = False


# How long the lock of a machine that is lost may outlive it, in seconds: what network file systems give its lease, from
# 90 s (NFS 4) to 300 s (Ceph).
LEASE = 360.0


class Locked(Exception):
    """Another process holds the lock; str() of it says which, `elsewhere` whether it is on another machine."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder or "another process")
        self.elsewhere = holder != "" and not holder.endswith(_here())


def take_lock(path: str | os.PathLike, *, wait: bool = False) -> BaseFileLock | None:
    """Hold the lock file `path`, which is made where it is missing, until `release` or the end of this process.

    Returns None, with a warning once a process, where the file system has no locks. Raises Locked where another process
    (or another part of this one) holds it, unless `wait` is set; OSError where the file cannot be opened for writing,
    with what to do where it is another user's.
    """
    # Without a mode of its own the file gets 0666 less the umask, so that a group can share a folder.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise Locked(_holder(path)) from None
    except PermissionError as error:
        if not os.path.exists(path):
            raise
        raise PermissionError(error.errno, f"{error.strerror} ({owner_of(path)})", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(path)
        return None
    return lock


def _sign(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()}{_here()}".encode())


def _here() -> str:
    return f" on {socket.gethostname()}"


def _holder(path: str | os.PathLike) -> str:
    """The name in a lock file, "" where there is none."""
    text = ""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        text = file.read(200).decode(errors="replace").strip()
    return one_line(text) if text else ""


def _warn(path: str | os.PathLike) -> None:
    global _warned
    if not _warned:
        folder = Path(path).parent
        logger.warning("%s: this file system has no locks; let no second process write there at the same time", folder)
    _warned = True
