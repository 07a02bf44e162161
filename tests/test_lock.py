"""The lock: one holder, told by name, also where the file system has no locks or the lock file is another user's."""

import errno
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from children import exit_status, fork
from folders import unprivileged

from storage import lock as module
from storage.lock import Locked, take_lock


def test_one_holder_whose_name_the_others_are_told(tmp_path: Path) -> None:
    held = take_lock(tmp_path / ".lock")
    for _ in range(2):  # To be refused leaves the holder's name.
        with pytest.raises(Locked, match=f"^process {os.getpid()} on "):
            take_lock(tmp_path / ".lock")

    def another() -> None:
        with pytest.raises(Locked, match=f"^process {os.getppid()} on "):
            take_lock(tmp_path / ".lock")

    assert exit_status(fork(another)) == 0
    held.release()
    take_lock(tmp_path / ".lock").release()


def test_a_holder_on_another_machine_is_told_from_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = take_lock(tmp_path / ".lock")
    for host, elsewhere in ((socket.gethostname(), False), ("another", True)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with pytest.raises(Locked) as refusal:
            take_lock(tmp_path / ".lock")
        assert refusal.value.elsewhere is elsewhere
    held.release()


def test_a_lock_file_without_a_name_in_it(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Locked, match="^another process$") as refusal:
            take_lock(tmp_path / ".lock")
        assert not refusal.value.elsewhere


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_lock(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        take_lock(tmp_path / ".lock").release()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == mode


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_where_there_are_no_locks_there_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(module, "_warned", False)
    assert take_lock(tmp_path / ".lock") is take_lock(tmp_path / ".lock") is None
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: this file system has no locks")


def test_the_lock_is_taken_on_a_descriptor_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS answers EBADF to an exclusive lock on one that is open for reading."""
    flock = fcntl.flock

    def nfs(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    take_lock(tmp_path / ".lock").release()


def test_a_lock_file_that_cannot_be_written_is_no_lock() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / ".lock").touch(0o644)
        with unprivileged(), pytest.raises(PermissionError, match="belongs to .*, with mode 644: chmod g.w or remove"):
            take_lock(Path(folder) / ".lock")
