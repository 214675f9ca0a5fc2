"""Safetensors files of strangers: read as data, or refused by name, quickly.

The real library is the judge of what is written, and writes what must be read.
"""

import json
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax.huggingface.shards import (
    DTYPES,
    INDEX,
    LARGEST_TENSOR_COUNT,
    SINGLE,
    read_header,
    read_shards,
    write_shards,
)
from elastic_jax.huggingface.untrusted import LARGEST_JSON_BYTES, parse_json, short
from elastic_jax.lazy import lazy


def shard(header, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header (bytes, or what JSON can say) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets), **more}


def without(key: str) -> dict:
    return {name: value for name, value in entry().items() if name != key}


EIGHT = bytes(8)
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)
HEADERS = {
    "an empty file": b"",
    "seven bytes": bytes(7),
    "a length and nothing": shard(b""),
    "length 0": shard({"a": entry()}, EIGHT, length=0),
    "length 1": shard({"a": entry()}, EIGHT, length=1),
    "length beyond the file": shard({"a": entry()}, EIGHT, length=10**4),
    "length 2^63": shard({"a": entry()}, EIGHT, length=2**63),
    "length 2^64 - 1": shard({"a": entry()}, EIGHT, length=2**64 - 1),
    "cut short in the header": shard({"a": entry()})[:20],
    "length covers data": shard({"a": entry()}, EIGHT, length=80),
    "not UTF-8": shard(b'{"\xff\xfe": 1}'),
    "UTF-16": shard('{"a": 1}'.encode("utf-16")),
    "a byte order mark": shard(b"\xef\xbb\xbf{}"),
    "no JSON": shard(b"PK\x03\x04 is a zip"),
    "a pickle": pickle.dumps({"a": np.ones(2)}),
    "two values": shard(b"{} {}"),
    "an array": shard([entry()], EIGHT),
    "a number": shard(b"12"),
    "text": shard(b'"tensors"'),
    "null": shard(b"null"),
    "depth 10^5": shard(b"[" * 10**5),
    "depth 10^5, objects": shard(b'{"a":' * 10**5),
    "depth 900": shard(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "depth 980": shard(b'{"a":' + b"[" * 980 + b"]" * 980 + b"}"),
    "key twice": shard(TWICE, EIGHT),
    "field twice": shard(b'{"a":{"dtype":"F32","dtype":"F32"}}'),
    "NaN": shard({"a": entry(shape=[float("nan")])}, EIGHT),
    "Infinity": shard(b'{"a":Infinity}'),
    "a number of 5000 digits": shard(b'{"a":' + b"9" * 5000 + b"}"),
    "an entry is a list": shard({"a": [1]}),
    "no dtype": shard({"a": without("dtype")}, EIGHT),
    "no shape": shard({"a": without("shape")}, EIGHT),
    "no offsets": shard({"a": without("data_offsets")}, EIGHT),
    "a field more": shard({"a": entry(file="../x")}, EIGHT),
    "unknown dtype": shard({"a": entry(dtype="F7")}, EIGHT),
    "complex dtype": shard({"a": entry(dtype="C64", shape=[1])}, EIGHT),
    "object dtype": shard({"a": entry(dtype="object")}, EIGHT),
    "dtype is a list": shard({"a": entry(dtype=["F32"])}, EIGHT),
    "shape negative": shard({"a": entry(shape=[-2])}, EIGHT),
    "shape negative twice": shard({"a": entry(shape=[-1, -2])}, EIGHT),
    "shape float": shard({"a": entry(shape=[2.0])}, EIGHT),
    "shape bool": shard({"a": entry(shape=[True, 2])}, EIGHT),
    "shape text": shard({"a": entry(shape="2")}, EIGHT),
    "shape of text": shard({"a": entry(shape=["2"])}, EIGHT),
    "shape null": shard({"a": entry(shape=None)}, EIGHT),
    "shape 2^62 x 4 overflows": shard({"a": entry(shape=[2**62, 4])}, EIGHT),
    "shape 2^40 of nothing": shard({"a": entry(shape=[2**40], offsets=(0, 0))}),
    "shape of 2^100": shard({"a": entry(shape=[2**100])}, EIGHT),
    "shape of 9 dimensions": shard({"a": entry(shape=[1] * 8 + [2])}, EIGHT),
    "shape of 10^5 dimensions": shard({"a": entry(shape=[1] * 10**5)}, EIGHT),
    "offsets reversed": shard({"a": entry(offsets=(8, 0))}, EIGHT),
    "offsets negative": shard({"a": entry(offsets=(-8, 0))}, EIGHT),
    "offsets float": shard({"a": entry(offsets=(0.0, 8.0))}, EIGHT),
    "offsets bool": shard({"a": entry([1], (False, True), "U8")}, b"1"),
    "one offset": shard({"a": entry(offsets=(8,))}, EIGHT),
    "three offsets": shard({"a": entry(offsets=(0, 8, 8))}, EIGHT),
    "offsets overlap": shard({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "offsets alike": shard({"a": entry(), "b": entry()}, EIGHT),
    "a gap in front": shard({"a": entry(offsets=(8, 16))}, bytes(16)),
    "a gap between": shard({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "offsets beyond the file": shard({"a": entry()}, bytes(7)),
    "offsets far beyond": shard({"a": entry([2**40], (0, 2**42))}, EIGHT),
    "trailing bytes": shard({"a": entry()}, bytes(9)),
    "data without tensors": shard({}, EIGHT),
    "size is half": shard({"a": entry(offsets=(0, 4))}, bytes(4)),
    "size is twice": shard({"a": entry(offsets=(0, 16))}, bytes(16)),
    "metadata is a list": shard({"__metadata__": [], "a": entry()}, EIGHT),
    "metadata is null": shard({"__metadata__": None, "a": entry()}, EIGHT),
    "metadata is half a character": shard({"__metadata__": {"x": "\ud800"}}, b""),
    "a name is half a character": shard({"a\udfff": entry()}, EIGHT),
    "metadata is nested": shard({"__metadata__": {"x": {}}, "a": entry()}, EIGHT),
    "metadata is numbers": shard({"__metadata__": {"x": 1}, "a": entry()}, EIGHT),
    "a name of 1 MB": shard({"n" * 10**6: entry(dtype="F7")}, EIGHT),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused_quickly(name, tmp_path):
    file = tmp_path / SINGLE
    file.write_bytes(HEADERS[name])
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        with pytest.raises(ValueError) as refused:
            read_shards(tmp_path)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 1000
    tracemalloc.start()
    with pytest.raises(ValueError):
        read_shards(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_most_of_them_are_refused_by_the_real_library_too():
    """The others are legal there, and ours to judge."""
    legal = set()
    for name, content in HEADERS.items():
        try:
            safetensors.deserialize(content)
            legal.add(name)
        except safetensors.SafetensorError:
            pass
    assert legal <= {
        "key twice",
        "a field more",
        "complex dtype",
        "shape of 9 dimensions",
        "metadata is null",
    }


@pytest.mark.parametrize("size", [LARGEST_JSON_BYTES + 1, 2**40])
def test_a_long_header_in_a_longer_file_is_not_read(size, tmp_path):
    file = tmp_path / SINGLE
    file.write_bytes(shard(b"{", length=size))
    os.truncate(file, size + 100)  # sparse
    tracemalloc.start()
    with pytest.raises(ValueError, match="header"):
        read_shards(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_the_worst_json_takes_less_than_a_quarter_of_a_gigabyte():
    text = b"[" + b"[]," * 10**5 + b"[]]"
    tracemalloc.start()
    parse_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    assert peak * LARGEST_JSON_BYTES / len(text) < 2**28
    tracemalloc.stop()


def test_escaped_characters_are_read_where_they_are_whole():
    text = rb'{"\ud83d\ude00": ["\\ud800", "\\\\ud800"]}'
    assert parse_json(text) == {"\U0001f600": ["\\ud800", "\\\\ud800"]}
    for half in (rb'"\ud83d"', rb'["\ude00"]', rb'{"\ude00\ud83d": 1}'):
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            parse_json(half)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[[1] * 999] * 9] * 9, 10**4000, {}],
    ids=["text", "lists", "number", "nothing"],
)
def test_what_strangers_wrote_is_shown_in_short(value):
    assert len(short(value)) < 200
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert len(short(deep)) < 200
    while deep:  # freed level by level
        (deep,) = deep


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    file = tmp_path / SINGLE
    for change, words in [
        (lambda: os.truncate(file, file.stat().st_size - 1), "cut short"),
        (lambda: os.truncate(file, 9), "cut short"),
        (file.unlink, "no longer"),
    ]:
        file.write_bytes(shard({"a": entry()}, EIGHT))
        tensors = read_shards(tmp_path)
        np.testing.assert_array_equal(tensors["a"].read(), np.zeros(2, "f4"))
        change()
        with pytest.raises(ValueError, match=words):
            tensors["a"].read()


# ----------------------------------------------------------------------- the index


@pytest.fixture
def folder(tmp_path) -> Path:
    """A directory of two shards, and beside it a file that nobody should open."""
    (tmp_path / "secret.safetensors").write_bytes(shard({"a": entry()}, EIGHT))
    other = tmp_path / "model-other"
    other.mkdir()
    (other / "a.safetensors").write_bytes(shard({"a": entry()}, EIGHT))
    home = tmp_path / "model"
    home.mkdir()
    for name in "ab":
        content = shard({name: entry()}, EIGHT)
        (home / f"{name}.safetensors").write_bytes(content)
    place(home, {"a": "a.safetensors", "b": "b.safetensors"})
    return home


def place(home: Path, weight_map) -> None:
    (home / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


OUTSIDE = {
    "above": "../secret.safetensors",
    "beside": "../model-other/a.safetensors",
    "around": "../model/a.safetensors",
    "absolute": "{above}/secret.safetensors",
    "absolute, our own": "{home}/a.safetensors",
    "below": "sub/a.safetensors",
    "dot": "./a.safetensors",
    "backslash": "..\\secret.safetensors",
    "home": "~/a.safetensors",
    "address": "https://example.org/a.safetensors",
    "file address": "file:///etc/passwd",
    "NUL": "a.safetensors\x00.safetensors",
    "newline": "a.safetensors\n",
    "nothing": "",
    "a dot": ".",
    "two dots": "..",
    "hidden": ".a.safetensors",
    "another ending": "config.json",
    "pickle": "pytorch_model.bin",
    "long": "a" * 5000 + ".safetensors",
    "look-alike": "\uff41.safetensors",
    "half a character": "\ud800.safetensors",
    "missing": "c.safetensors",
    "the index": INDEX,
    "number": 1,
    "null": None,
    "list": ["a.safetensors"],
    "object": {"file": "a.safetensors"},
    "true": True,
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_nowhere_else(name, folder, watched):
    file = OUTSIDE[name]
    if isinstance(file, str):
        file = file.replace("{home}", str(folder)).replace(
            "{above}", str(folder.parent)
        )
    place(folder, {"a": file, "b": "b.safetensors"})
    with watched(folder) as opened, pytest.raises(ValueError, match="model"):
        read_shards(folder)
    assert opened


LINKS = {
    "to a file above": "../secret.safetensors",
    "to a file beside": "../model-other/a.safetensors",
    "to the system": "/etc/passwd",
    "to itself": "a.safetensors",
    "to nothing": "gone.safetensors",
    "to a device": "/dev/zero",
    "to a folder": ".",
}


@pytest.mark.parametrize("name", LINKS)
def test_links_out_are_not_followed(name, folder, watched):
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to(LINKS[name])
    with watched(folder), pytest.raises(ValueError, match=r"a\.safetensors"):
        read_shards(folder)


@pytest.mark.parametrize("name", ["a.safetensors", INDEX])
def test_only_plain_files_are_opened(name, folder):
    """A pipe would keep the reader waiting for ever."""
    for make in (os.mkfifo, os.mkdir):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(ValueError, match="no plain file"):
            read_shards(folder)
        os.unlink(folder / name) if make is os.mkfifo else os.rmdir(folder / name)


def test_links_within_are_followed_and_so_is_the_cache_of_hugging_face(
    folder, tmp_path, watched
):
    (folder / "a.safetensors").rename(folder / "real.safetensors")
    (folder / "a.safetensors").symlink_to("real.safetensors")
    assert {*read_shards(folder)} == {"a", "b"}

    snapshot = tmp_path / "cache" / "snapshots" / "0a1b"
    blobs = tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(["a.safetensors", "b.safetensors", INDEX]):
        (blobs / f"{i}").write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    with watched(tmp_path / "cache"):
        tensors = read_shards(snapshot)
        np.testing.assert_array_equal(tensors["b"].read(), np.zeros(2, "f4"))
    (tmp_path / "cache" / "refs").mkdir()
    (tmp_path / "cache" / "refs" / "x").write_bytes((blobs / "0").read_bytes())
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to("../../refs/x")
    with watched(blobs, snapshot), pytest.raises(ValueError, match="outside"):
        read_shards(snapshot)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": "a.safetensors"}',
        '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
        '{"weight_map": {"a": "a.safetensors"}, "weight_map": {}}',
        '{"weight_map": {"a": NaN}}',
        "[" * 10**5,
        "\ufeff{}",
    ],
    ids=range(13),
)
def test_an_index_that_is_none(index, folder):
    (folder / INDEX).write_text(index)
    with pytest.raises(ValueError, match=INDEX):
        read_shards(folder)


def test_everything_that_index_and_shards_disagree_on_is_listed(folder):
    both = shard({"a": entry(), "x": entry(offsets=(8, 16))}, bytes(16))
    (folder / "a.safetensors").write_bytes(both)
    (folder / "b.safetensors").write_bytes(both)
    (folder / "c.safetensors").write_bytes(b"")
    place(
        folder,
        {
            "a": "a.safetensors",
            "b": "b.safetensors",
            "c": "c.safetensors",
            "d": "d.safetensors",
        },
    )
    with pytest.raises(ValueError) as refused:
        read_shards(folder)
    said = str(refused.value)
    for words in (
        "'a' is in b.safetensors and in another shard",
        "'x' is in b.safetensors and in another shard",
        "a.safetensors holds 'x'",
        "b.safetensors holds 'a'",
        "b.safetensors lacks 'b'",
        "c.safetensors: not a safetensors file",
        "d.safetensors is missing",
    ):
        assert words in said


def test_an_index_of_very_many_files_takes_no_time(folder):
    place(folder, {f"t{i}": f"f{i}.safetensors" for i in range(10**5)})
    started = time.perf_counter()
    with pytest.raises(ValueError, match="and 99950 more"):
        read_shards(folder)
    assert time.perf_counter() - started < 5
    place(folder, {f"{i}": "" for i in range(LARGEST_TENSOR_COUNT + 1)})
    with pytest.raises(ValueError, match="tensors"):
        read_shards(folder)


def test_a_whole_file_and_an_index_together_are_refused(folder):
    (folder / SINGLE).write_bytes(shard({"a": entry()}, EIGHT))
    with pytest.raises(ValueError, match="remove one"):
        read_shards(folder)
    with pytest.raises(ValueError, match="neither"):
        read_shards(folder / "nowhere")


# ------------------------------------------------------------- formats that carry code


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


BOOBY_TRAPPED = (
    "pytorch_model.bin",
    "model.pt",
    "consolidated.00.pth",
    "model.npy",
    "params.npz",
    "model.ckpt",
    "model.pkl",
)


def set_trap(folder: Path, name: str) -> Path:
    sprung = folder.parent / "sprung"
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    return sprung


@pytest.mark.parametrize("name", BOOBY_TRAPPED)
def test_pickles_instead_are_never_read(name, tmp_path, watched):
    folder = tmp_path / "model"
    folder.mkdir()
    sprung = set_trap(folder, name)
    with watched(), pytest.raises(ValueError, match="save_pretrained"):
        read_shards(folder)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with watched(), pytest.raises(ValueError, match="save_pretrained"):
        read_shards(folder)
    assert not sprung.exists()


@pytest.mark.parametrize("name", BOOBY_TRAPPED)
def test_pickles_beside_are_never_read(name, folder, watched):
    sprung = set_trap(folder, name)
    with watched(folder) as opened:
        assert {*read_shards(folder)} == {"a", "b"}
    assert folder / name not in opened and not sprung.exists()
    set_trap(folder, SINGLE)
    (folder / INDEX).unlink()
    with watched(folder), pytest.raises(ValueError, match="not a safetensors file"):
        read_shards(folder)
    assert not sprung.exists()


# ---------------------------------------------------------------------- both ways

# The library's NumPy side writes bfloat16 and float8, and does not load them.
ITS_OWN = [dtype for name, dtype in DTYPES.items() if name[:2] not in ("BF", "F8")]


def some_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    draw, found = np.random.default_rng(seed), {}
    for i, dtype in enumerate(DTYPES.values()):
        for shape in [(3, i + 1), (5,), (), (0, 4), (2, 1, 3)]:
            raw = draw.integers(0, 2, int(np.prod(shape)) * dtype.itemsize, np.uint8)
            value = raw.view(dtype).reshape(shape)
            found[f"{dtype.name}.{len(shape)}.{value.size}"] = value
    return found


def assert_same(have: np.ndarray, want: np.ndarray) -> None:
    assert have.dtype == want.dtype and have.shape == want.shape
    assert have.tobytes() == want.tobytes()


@pytest.mark.parametrize("shard_bytes", [1, 40, 300, 10**9])
def test_the_library_reads_what_we_write(shard_bytes, tmp_path):
    tensors = some_tensors()
    calls = []
    write_shards(
        tmp_path,
        {name: lazy(value) for name, value in tensors.items()},
        shard_bytes=shard_bytes,
        on_bytes=lambda *done: calls.append(done),
    )
    total = sum(value.nbytes for value in tensors.values())
    assert calls[-1] == (total, total)
    found = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        held = dict(safetensors.deserialize(file.read_bytes()))
        assert sum(len(e["data"]) for e in held.values()) <= shard_bytes or (
            sum(len(e["data"]) > 0 for e in held.values()) == 1
        )
        found |= held
        if shard_bytes == 10**9:
            assert (struct.unpack("<Q", file.read_bytes()[:8])[0] + 8) % 8 == 0
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert DTYPES[found[name]["dtype"]] == value.dtype
        assert tuple(found[name]["shape"]) == value.shape
        assert bytes(found[name]["data"]) == value.tobytes()
    for name, value in read_shards(tmp_path).items():
        assert_same(value.read(), tensors[name])


def test_the_library_loads_what_we_write(tmp_path):
    tensors = {n: v for n, v in some_tensors().items() if v.dtype in ITS_OWN}
    given = {name: lazy(value) for name, value in tensors.items()}
    write_shards(tmp_path, given, shard_bytes=10**9)
    for name, value in safetensors.numpy.load_file(tmp_path / SINGLE).items():
        assert_same(value, tensors[name])


def test_we_read_what_the_library_writes(tmp_path):
    tensors = some_tensors(1)
    metadata = {"format": "pt", "by": "the library"}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, metadata)
    found = read_shards(tmp_path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_same(found[name].read(), value)


def test_what_cannot_be_written_is_refused(tmp_path):
    for value in (np.ones(2, "c8"), np.ones(2, ">f4"), np.array(["text"])):
        with pytest.raises(ValueError, match="dtypes"):
            write_shards(tmp_path, {"a": lazy(value)}, shard_bytes=8)
    assert not list(tmp_path.iterdir())


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BF16", "F7"]) | st.none(),
                "shape": st.lists(st.integers(-1, 3) | st.just(2**62), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 12), max_size=3),
            }
        )
        | st.recursive(st.none() | st.text(), st.lists, max_leaves=4),
        max_size=3,
    ),
    st.binary(max_size=16),
)
def test_any_header_is_read_as_the_library_does_or_refused(
    tmp_path_factory, header, data
):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    content = shard(header, data)
    file.write_bytes(content)
    try:
        found = {name: tensor.read() for name, tensor in read_header(file).items()}
    except ValueError:
        return
    theirs = dict(safetensors.deserialize(content))
    assert found.keys() == theirs.keys()
    for name, value in found.items():
        assert bytes(theirs[name]["data"]) == value.tobytes()
