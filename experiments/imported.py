"""An imported parent: a Hugging Face checkpoint named by `--config.parent=HF_DIR`."""

import hashlib
import pathlib
from typing import Any

import elastic_jax as ej
from elastic_jax import huggingface


def read_config(directory: str) -> ej.ModelConfig:
    """What the parent is, without its weights; ValueError lists what is wrong."""
    return huggingface.read_config(directory)


def load(directory: str) -> Any:
    """The parent's parameters, in the types in which they are stored."""
    return ej.from_hf(directory)[0]


def companions(directory: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields of config.json for a later export, and the tokenizer's files."""
    if not directory:
        return {}, {}
    carried, files = huggingface.read_companions(directory)
    return dict(carried), {name: file.read_bytes() for name, file in files.items()}


def files(directory: str) -> dict[str, dict[str, Any]]:
    """Path -> `size_bytes` and `sha256` of every file that is not hidden."""
    found = {}
    for path in sorted(pathlib.Path(directory).rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(name)] = {"size_bytes": path.stat().st_size, "sha256": digest}
    return found
