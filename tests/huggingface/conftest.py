"""What code does to the system while it reads a stranger's files."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

FORBIDDEN = ("exec", "compile", "import", "pickle.", "marshal.", "ctypes.")
FORBIDDEN += ("socket.", "urllib.", "subprocess.")
FORBIDDEN += ("os.system", "os.exec", "os.posix_spawn", "os.fork")

_seen: list[tuple[str, str]] | None = None


def _hook(event: str, arguments: tuple) -> None:
    if _seen is not None and (event == "open" or event.startswith(FORBIDDEN)):
        _seen.append((event, arguments[0] if arguments else None))


@pytest.fixture(scope="session")
def watched():
    """`with watched(*roots):` fails if code runs, or opens a file that is in no root.

    Yields what was opened. A hook stays for good, so there is one, and a switch.
    """
    sys.addaudithook(_hook)

    @contextlib.contextmanager
    def watch(*roots: os.PathLike):
        global _seen
        _seen = seen = []
        opened = []
        try:
            yield opened
        finally:
            _seen = None
        allowed = [Path(root).resolve() for root in roots]
        for event, what in seen:
            assert event == "open", f"{event}: {what!r}"
            if isinstance(what, int):  # a descriptor that is open already
                continue
            opened.append(Path(os.path.realpath(os.fsdecode(what))))
        outside = [
            file
            for file in opened
            if not any(file.is_relative_to(root) for root in allowed)
        ]
        assert not outside

    return watch
