"""What strangers wrote: their paths, their JSON, and how it is quoted in errors."""

import collections
import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Parsed, the worst JSON takes twenty times its text. Names of tensors, their shapes and
# offsets take 150 bytes each: this is room for 50 000 in a shard.
LARGEST_JSON_BYTES = 2**23
# In this order: a whole surrogate pair, half of one, anything else.
ESCAPES = re.compile(
    r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u(?P<half>[dD][89a-fA-F])?|\\[^u]"
)


def inside(directory: Path, name: str) -> Path:
    """A file of the directory, where it really is one.

    A link may lead within the directory, and to the `blobs` beside the `snapshots`
    that hold it, as in the cache of Hugging Face.

    Raises:
      ValueError: it is missing, no plain file, or leads elsewhere.
    """
    file, home = directory / name, directory.resolve()
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file} is missing or leads nowhere") from error
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{file} leads outside its directory, to {real}")
    if not real.is_file():
        raise ValueError(f"{file} is no plain file")
    return real


def read_json(file: Path) -> Any:
    """What a JSON file holds, read as data.

    Raises:
      ValueError: too large, or no JSON; names the file.
    """
    try:
        if (size := file.stat().st_size) > LARGEST_JSON_BYTES:
            raise ValueError(f"{size} bytes, at most {LARGEST_JSON_BYTES}")
        return parse_json(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error


def parse_json(text: bytes) -> Any:
    """Strict JSON: no key twice, no NaN, no depth that exhausts the stack.

    Of Unicode text, also where it is escaped: half of a surrogate pair is refused.
    """

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            often = collections.Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the JSON says {short(often[0][0])} twice")
        return found

    def constant(name):
        raise ValueError(f"the JSON holds {name}, which is no number")

    try:
        decoded = text.decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    if any(escape["half"] for escape in ESCAPES.finditer(decoded)):
        raise ValueError("the JSON holds half of a surrogate pair")
    return value


def short(value: Any, limit: int = 120) -> str:
    """`repr` of what a stranger wrote, cut to a length that can be read.

    Little more is looked at than is shown: however long or deep the value is.
    """
    if isinstance(value, str):
        text = repr(value[:limit])
        return text if len(value) <= limit else f"{text}... ({len(value)} characters)"
    text = _brief.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


_brief = reprlib.Repr()
_brief.maxlist = _brief.maxdict = 16
_brief.maxstring = _brief.maxlong = _brief.maxother = 60


def refuse(what: str, problems: Iterable[str], shown: int = 50) -> None:
    """Raises one ValueError for all problems, if there are any."""
    first: list[str] = []
    count = 0
    for count, problem in enumerate(problems, 1):
        if count <= shown:
            first.append(problem)
    if count:
        more = [f"and {count - shown} more"] if count > shown else []
        raise ValueError("\n  ".join([f"{what}:", *first, *more]))
