"""Directories appear as a whole or not at all, whoever dies or writes beside."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import axes, directories
from elastic_jax.directories import LOCK, appearing, locked

KILLS = int(os.environ.get("KILLS", 12))


def content(path: Path) -> dict[str, str]:
    """What lies in a directory: name -> text."""
    return {f.name: f.read_text() for f in path.iterdir() if f.is_file()}


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def fill(partial: Path, text: str = "new") -> None:
    for name in "ab":
        (partial / name).write_text(text)


@pytest.fixture
def old(tmp_path) -> Path:
    """A directory that is there already."""
    path = tmp_path / "out"
    path.mkdir()
    fill(path, "old")
    return path


def test_it_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "out"
    with appearing(path) as partial:
        fill(partial)
        assert not path.exists() and partial.parent == path.parent
        assert names(partial) == {LOCK, "a", "b"}
    assert content(path) == {"a": "new", "b": "new"}
    assert names(path.parent) == {"out"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error), appearing(tmp_path / "out") as partial:
        fill(partial)
        raise error
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_after_an_exception_the_old_one_is_as_it_was(old, error):
    with pytest.raises(error), appearing(old, overwrite=True) as partial:
        fill(partial)
        raise error
    assert content(old) == {"a": "old", "b": "old"} and names(old.parent) == {"out"}


def test_overwriting_replaces_everything_and_must_be_asked_for(old):
    (old / "c").write_text("old")
    with pytest.raises(ValueError, match="overwrite"), appearing(old):
        raise AssertionError("nothing is written")
    with appearing(old, overwrite=True) as partial:
        fill(partial)
        assert content(old)["c"] == "old"
    assert content(old) == {"a": "new", "b": "new"} and names(old.parent) == {"out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_and_links_are_never_replaced(tmp_path, overwrite):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    for name in ("file", "link", "dangling", "pipe", "file/below"):
        with (
            pytest.raises(ValueError, match=name.partition("/")[0]),
            appearing(tmp_path / name, overwrite=overwrite),
        ):
            raise AssertionError("nothing is written")
    assert names(tmp_path) == before and (tmp_path / "file").read_text() == "mine"


def test_a_swap_that_fails_puts_the_old_one_back(old, monkeypatch):
    real = Path.rename

    def rename(self, target):
        if ".partial-" in self.name:
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"), appearing(old, overwrite=True) as partial:
        fill(partial)
    assert content(old) == {"a": "old", "b": "old"} and names(old.parent) == {"out"}


# ---------------------------------------------------------------------- beside others


def test_who_comes_second_overwrites_only_if_asked(tmp_path):
    """Both begin while nothing is there."""
    path = tmp_path / "out"
    with pytest.raises(ValueError, match="meanwhile"):
        with appearing(path) as first:
            fill(first, "first")
            with appearing(path) as second:
                fill(second, "second")
    assert content(path) == {"a": "second", "b": "second"}
    with appearing(path, overwrite=True) as first:
        fill(first, "first")
        with appearing(path, overwrite=True) as second:
            fill(second, "second")
        assert content(path)["a"] == "second"
    assert content(path) == {"a": "first", "b": "first"}
    assert names(tmp_path) == {"out"}


def test_many_at_once_leave_one_that_is_whole(tmp_path):
    path, done, refused = tmp_path / "out", [], []

    def write(i: int) -> None:
        for _ in range(20):
            try:
                with appearing(path, overwrite=True) as partial:
                    fill(partial, str(i))
                done.append(i)
            except (ValueError, OSError) as error:
                refused.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done and len({*content(path).values()}) == 1
    assert len(done) + len(refused) == 80
    with appearing(path, overwrite=True) as partial:
        fill(partial, "last")
    assert names(tmp_path) == {"out"} and content(path) == {"a": "last", "b": "last"}


def test_what_others_are_writing_is_left_alone(tmp_path):
    path = tmp_path / "out"
    with appearing(path) as first:
        fill(first, "first")
        with pytest.raises(RuntimeError), appearing(path) as second:
            assert first != second
            raise RuntimeError
        assert content(first)["a"] == "first"
    assert content(path)["a"] == "first"


ABANDONED = ".out.partial-0a1b2c3d"


def test_only_what_is_ours_is_cleaned_up(tmp_path):
    kept = {
        ".out.partial-notes",
        ".out.partial-0a1b2c3d4",
        ".other.partial-0a1b2c3d",
        "out.partial-0a1b2c3d",
        ".outX.partial-0a1b2c3d",
        ".out",
    }
    for name in (*kept, ABANDONED):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, "old")
    (tmp_path / ".out.partial-ffffffff").write_text("a file")
    (tmp_path / ".out.partial-eeeeeeee").symlink_to(".out")
    with appearing(tmp_path / "out") as partial:
        fill(partial)
    kept |= {"out", ".out.partial-ffffffff", ".out.partial-eeeeeeee"}
    assert names(tmp_path) == kept
    assert content(tmp_path / ".out") == {"a": "old", "b": "old"}


@pytest.mark.parametrize("name", ["o*t", "[out]", "o?t", "o t", "öut", "-out", "..."])
def test_names_that_mean_something_elsewhere(name, tmp_path):
    others = tmp_path / ".out.partial-0a1b2c3d"
    abandoned = tmp_path / f".{name}.partial-0a1b2c3d"
    for path in (others, abandoned):
        path.mkdir()
    with appearing(tmp_path / name) as partial:
        fill(partial)
    assert names(tmp_path) == {name, others.name}


def test_killed_between_the_renames_the_old_one_comes_back(old):
    """Then the next writer finds it beside, and nothing in its place."""
    old.rename(old.with_name(".out.replaced-0a1b2c3d"))
    old.with_name(ABANDONED).mkdir()
    with pytest.raises(ValueError, match="exists"), appearing(old):
        raise AssertionError("nothing is written")
    assert content(old) == {"a": "old", "b": "old"} and names(old.parent) == {"out"}
    old.with_name(".out.replaced-0a1b2c3e").mkdir()
    with appearing(old, overwrite=True) as partial:
        fill(partial)
    assert content(old) == {"a": "new", "b": "new"} and names(old.parent) == {"out"}


def test_a_lock_is_held_until_the_end(tmp_path):
    with locked(tmp_path / "x"):
        with pytest.raises(ValueError, match="in use"), locked(tmp_path / "x"):
            raise AssertionError
    with locked(tmp_path / "x"):
        assert names(tmp_path / "x") == {LOCK}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"), locked(tmp_path / "file"):
        raise AssertionError


# Without JAX, so that a kill costs little.
WRITER = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("directories", {directories.__file__!r})
directories = importlib.util.module_from_spec(spec)
spec.loader.exec_module(directories)
path, text = Path(sys.argv[1]), sys.argv[2]
print("started", flush=True)
while True:
    with directories.appearing(path, overwrite=True) as partial:
        for i in range(30):
            (partial / f"{{i}}").write_text(text * 1000)
"""


def test_killed_at_any_moment_there_is_a_whole_one(tmp_path):
    draw, path = random.Random(0), tmp_path / "out"
    with appearing(path) as partial:
        for i in range(30):
            (partial / str(i)).write_text("0" * 1000)
    for kill in range(KILLS):
        text = str(kill % 10)
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), text], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"started\n"
        time.sleep(draw.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with pytest.raises(ValueError, match="exists"), appearing(path):
            raise AssertionError("nothing is written")
        found = content(path)
        found.pop(LOCK, None)  # killed after the renames, before the lock goes
        assert len(found) == 30 and len({*found.values()}) == 1
        assert names(tmp_path) == {"out"}


# ------------------------------------------------------------------------ a full disk


@pytest.fixture(scope="module")
def model():
    cfg = ej.presets.tiny("M-")
    specs, draw = ej.param_specs(cfg), np.random.default_rng(0)
    leaf = lambda p, s: draw.normal(size=axes.shape(cfg, specs, p, s)).astype("f4")
    return axes.map_specs(leaf, specs), cfg


@pytest.fixture
def nearly_full():
    """A file of more than 100 kB cannot be written: what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, signals)


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_a_full_disk_leaves_nothing_behind(model, tmp_path, shard_bytes, nearly_full):
    """In the first shard, and after some of them."""
    params, cfg = model
    with pytest.raises(OSError):
        ej.to_hf(tmp_path / "out", params, cfg, shard_bytes=shard_bytes)
    assert not names(tmp_path)


def test_a_full_disk_leaves_the_old_one(model, tmp_path, request):
    params, cfg = model
    ej.to_hf(tmp_path / "out", params, cfg)
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    request.getfixturevalue("nearly_full")
    with pytest.raises(OSError):
        ej.to_hf(tmp_path / "out", params, cfg, overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == {"out"}
    assert json.loads(before["config.json"])["hidden_size"] == cfg.embed
