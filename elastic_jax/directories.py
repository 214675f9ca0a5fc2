"""Directories that one process holds, and that appear as a whole or not at all."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the directory `path`, made if need be, against everybody else.

    Raises:
      ValueError: it is held, or cannot be a directory.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a")
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is in use by another run: stop that, or take another directory"
            ) from None
        yield


@contextlib.contextmanager
def appearing(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` at the end, by one rename.

    After an exception, and before the end, `path` is what it was. What a killed process
    left behind (`.NAME.partial-1a2b3c4d` beside `path`) is deleted by the next one that
    writes there. Who overwrites moves the old directory away first; should he be killed
    at that moment, it is `.NAME.replaced-1a2b3c4d`, and the next one puts it back.

    Raises:
      ValueError: `path` exists and `overwrite` is off, or cannot be written.
    """
    path = Path(path).absolute()
    _put_back_or_remove(path)
    check_free(path, overwrite=overwrite)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is not a directory: take another path")
    partial = _beside(path, "partial", secrets.token_hex(4))
    with locked(partial):
        try:
            yield partial
            _put(partial, path, overwrite)
            # Only now: without it, another writer would take it for abandoned.
            (path / LOCK).unlink(missing_ok=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_free(path: str | os.PathLike, *, overwrite: bool) -> None:
    """Refuses a path that is taken; also to say so before long work begins."""
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} exists: take another path, or overwrite (--force)")


def _beside(path: Path, kind: str, token: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{token}")


def _put(partial: Path, path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path} was made by somebody else meanwhile")
    if not path.exists():
        partial.rename(path)
    else:
        # Between the two renames `path` is absent, and both directories are whole.
        old = _beside(path, "replaced", secrets.token_hex(4))
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _put_back_or_remove(path: Path) -> None:
    """Mends what writers that are gone have left beside `path`.

    A directory that was moved away, and whose place is empty, is put back.
    """
    if not path.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(path.name)}\.(partial|replaced)-[0-9a-f]{{8}}")
    for entry in sorted(path.parent.iterdir()):
        found = ours.fullmatch(entry.name)
        if not found or entry.is_symlink() or not entry.is_dir():
            continue
        with contextlib.suppress(ValueError, OSError):
            if found[1] == "replaced" and not os.path.lexists(path):
                entry.rename(path)
            else:
                with locked(entry):
                    shutil.rmtree(entry, ignore_errors=True)
