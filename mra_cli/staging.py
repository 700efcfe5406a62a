"""Directories that are either not there or complete, whatever happens while they are written.

All is written to a sibling, ``.NAME.part``, which takes the name at the end in one step. A process
that is killed leaves at most that sibling behind; the next one for the same name clears it away.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mra_cli.errors import ExportError

Mode = Literal["auto", "link", "copy"]

MARK = "mra_manifest.json"
"""The file by which a patched checkpoint is known; nothing else is ever replaced."""

_CHUNK = 8 << 20


def check_target(target: Path, *, force: bool) -> Path:
    """The target without links in its path, if it can be written.

    Raises:
        ExportError: Something is there that may not be replaced, or nothing can be written there.
    """
    target = target.expanduser().resolve()
    if target.exists() or target.is_symlink():
        if not target.is_dir():
            raise ExportError(f"--out must be a directory to make, got the file {target}")
        if any(target.iterdir()) and not (target / MARK).is_file():
            raise ExportError(
                f"--out must be a new directory, got {target}, which is there and no patched "
                "checkpoint, so it is never replaced; choose another name"
            )
        if not force:
            raise ExportError(
                f"--out must be a new directory, got {target}, which is there; pass --force to "
                "replace it"
            )
    if not target.parent.is_dir():
        raise ExportError(f"--out must lie in a directory, and {target.parent} is none; make it")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ExportError(f"can't write {target}: {target.parent} is read-only for you")
    return target


@contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A directory to fill, which is named ``target`` when the block ends without an error.

    Args:
        target: As `check_target` returns it.
        force: Replace a patched checkpoint that is there, once the new one is complete.

    Raises:
        ExportError: Disk full, no permission, or another process is writing the same target.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        lock = locked(part)
    except OSError as error:
        raise _failure(target, error) from error
    try:
        for leftover in part.iterdir():
            _remove(leftover)
        yield part
        check_target(target, force=force)
        if target.exists():
            _exchange(part, target)
        else:
            part.rename(target)
    except OSError as error:
        raise _failure(target, error) from error
    finally:
        _remove(part)  # what failed, or what has been replaced
        os.close(lock)


def place(source: Path, target: Path, mode: Mode) -> tuple[bool, str | None]:
    """Put a file into a staged directory, as a hard link or a copy, and make sure it arrived.

    Args:
        source: The file; symbolic links are followed.
        target: Where to put it; parents are made.
        mode: ``auto`` links where the file system can.

    Returns:
        Whether it is linked, and the SHA-256 if it was copied.

    Raises:
        ExportError: ``link`` and it can't be linked, or the copy reads otherwise than the source.
    """
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode != "copy":
        try:
            os.link(source, target)
        except OSError as error:
            if mode == "link":
                raise ExportError(
                    f"can't hard-link {source} to {target.parent}: {error.strerror}; put --out on "
                    "the same file system, or pass --copy"
                ) from error
        else:
            ours, theirs = target.stat(), source.stat()
            if (ours.st_ino, ours.st_dev) != (theirs.st_ino, theirs.st_dev):
                raise ExportError(f"{source} was replaced while it was linked; run this again")
            return True, None
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(_CHUNK):
            digest.update(chunk)
            writing.write(chunk)
    if sha256(target) != digest.hexdigest():
        raise ExportError(f"{target} reads otherwise than it was written; check the disk")
    return False, digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def locked(part: Path) -> int:
    """A directory to stage things in, made if need be, and locked until what this returns (a file
    descriptor) is closed.

    Raises:
        ExportError: Another process has it.
    """
    part.mkdir(exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.fstat(lock).st_ino == part.stat().st_ino  # else it was renamed as we opened it
    except OSError:
        ours = False
    if not ours:
        os.close(lock)
        raise ExportError(f"another process is writing {part}; wait for it, or choose another name")
    return lock


def _exchange(part: Path, target: Path) -> None:
    """Swap two directories in one step where the system can, else in two."""
    if sys.platform == "linux":
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(part), os.fsencode(target)
        if hasattr(libc, "renameat2") and not libc.renameat2(here, paths[0], here, paths[1], swap):
            return
    old = target.with_name(f".{target.name}.old")
    _remove(old)
    target.rename(old)
    part.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _failure(target: Path, error: OSError) -> ExportError:
    return ExportError(
        f"can't write {target}: {error.strerror or error}"
        f"{f' ({error.filename})' if error.filename else ''}; nothing was left there, and nothing "
        "that was there has changed"
    )
