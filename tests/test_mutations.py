"""Checkpoints of strangers, changed in every way that a seed can think of.

Two small checkpoints, a Hugging Face folder in shards and a nested checkpoint, are
changed at random, knowing their structure, and read. What may come out of that:

  * a ValueError; or
  * of a Hugging Face folder: what is in it. A change may give other weights or another
    model that is whole: then every tensor must have the values, and the configuration
    the sizes, that the real safetensors library and plain JSON find in the same files,
    all of them within the folder, all finite;
  * of a nested checkpoint: the parameters that were saved, to the bit. Where the
    manifest was signed anew it is believed in what nothing contradicts: a dtype of the
    same width, numbers of the configuration that have no shape, other budgets, weights
    whose activations were not calibrated. Then the bytes must be those that were saved,
    the configuration the one that it says, and a budget the slice that it says.

Never another exception, more than a second, or 256 MB on top.

Each of them is tried in 16 bits and, for half as long, quantized.

Environment: MUTATION_SECONDS is how long; for a night,

    MUTATION_SECONDS=14400 MUTATION_SEED=123456789 pytest -s tests/test_mutations.py

A failure says its seed; MUTATION_SEED=seed MUTATION_SECONDS=0 repeats that one alone.
"""

import collections
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors

import elastic_jax as ej
from elastic_jax import axes, manifest, nesting
from elastic_jax.huggingface.names import Layout, Table, weights
from elastic_jax.huggingface.quantized import as_lazy, formats_of
from elastic_jax.huggingface.shards import DTYPES, INDEX, SINGLE
from elastic_kernels import QuantArray

SECONDS = float(os.environ.get("MUTATION_SECONDS", 40))
SEED = int(os.environ.get("MUTATION_SEED", 0))
LONGEST_SECONDS, LARGEST_GROWTH_BYTES = 1.0, 2**28

CFG = dataclasses.replace(
    ej.presets.tiny("ME*-"),
    vocab=32,
    embed=32,
    heads_per_group=2,
    ssm_head_dim=4,
    ssm_state=4,
    head_dim=4,
    experts=4,
    expert_ffn=16,
    shared_ffn=16,
    ffn=32,
)


def random_params():
    """Parameters of two dtypes, so that one taken for another would show."""
    draw, specs = np.random.default_rng(0), ej.param_specs(CFG)

    def leaf(path, spec):
        wide = path[-1] in ("router_bias", "A_log", "final_norm")
        value = draw.normal(size=axes.shape(CFG, specs, path, spec))
        return value.astype("f4" if wide else DTYPES["BF16"])

    return axes.map_specs(leaf, specs)


def quantized_params():
    """The same in both formats, with calibrated inputs of one of them."""
    recipe = ej.Recipe("nvfp4", (("mamba/out", "fp8"), ("mlp/up", "fp8")))
    met = {("layers", 1, name): np.ones(CFG.experts) for name in ("up", "down")}
    specs = ej.param_specs(CFG)
    return ej.quantize(random_params(), specs, CFG, recipe, input_largest=met)


# ------------------------------------------------------------- a directory in memory


@dataclasses.dataclass(frozen=True)
class Odd:
    """What is no plain file: a link to `target`, a pipe or a directory."""

    kind: str
    target: str = ""


Files = dict[str, bytes | Odd]


def loaded(directory: Path) -> Files:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def clear(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def bring(directory: Path, have: Files, want: Files) -> None:
    """Makes a directory that holds `have` hold `want`."""
    for name in have.keys() - want.keys():
        clear(directory / name)
    for name, content in want.items():
        if name in have and have[name] is content:
            continue
        file = directory / name
        clear(file)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content.kind == "link":
            file.symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()


# -------------------------------------------------------------------------- JSON, bytes

# Text that stands for what `json.dumps` cannot write, and is replaced in its output.
DEEP, AGAIN = "<deep>", "<again>"
NASTY = [
    None, True, False, 0, 1, -1, 2, 3, 16, 2**24, 2**31, 2**40, 2**63, 2**64, -(2**63),
    10**400, 0.0, -0.0, 1.5, 1e-300, 1e300, math.nan, math.inf, -math.inf,
    "", "M", "ME*-", "..", "../secret", "/etc/passwd", "a\x00b", "\ud800", "\u202e",
    "x" * 10**5, "M" * 10**5, "https://example.org/x", "float32", "F32", "bfloat16",
    [], {}, [[]], [0], [2**40, 2**40], {"": 0}, DEEP,
]  # fmt: skip


def nodes(value, path=()):
    """The path of every node of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from nodes(item, (*path, key))


def change_json(draw: random.Random, value) -> tuple[object, str]:
    """A copy with one node changed, and what was done to it."""
    value = json.loads(json.dumps(value))
    path = draw.choice([*nodes(value)])
    if not path:
        return draw.choice(NASTY), "the root is replaced"
    *above, key = path
    parent = value
    for step in above:
        parent = parent[step]
    how = draw.choice(["nasty", "nasty", "nudge", "other", "drop", "rename", "twice"])
    if how == "nudge" and type(parent[key]) in (int, float):
        by = draw.choice([-16, -8, -4, -2, -1, 1, 2, 4, 8, 16])
        parent[key] = draw.choice([parent[key] + by, parent[key] * by, -parent[key]])
    elif how == "other":  # what stands elsewhere in the same file
        source = value
        for step in draw.choice([*nodes(value)]):
            source = source[step]
        parent[key] = json.loads(json.dumps(source))
    elif how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        new = draw.choice([*parent, key + "x", key[:-1], key.upper(), "", "\x00", ".."])
        parent[new] = parent.pop(key)
    elif how == "twice" and isinstance(parent, dict):
        parent[key + AGAIN] = draw.choice([parent[key], *NASTY])
    else:
        how, parent[key] = "nasty", draw.choice(NASTY)
    return value, f"{how} at {path}"[:200]


def json_text(draw: random.Random, value) -> bytes:
    depth = draw.choice([3, 700, 950, 990, 10**5])
    try:
        text = json.dumps(value)
    except RecursionError:  # deep since another change, and read all the same
        text = json.dumps(DEEP)
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.replace(AGAIN, "").encode()


def change_bytes(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    at = draw.randrange(len(data) + 1)
    n = draw.choice([1, 1, 2, 4, 8, 64, 1000])
    how = draw.choice(["flip", "flip", "set", "insert", "delete", "cut", "swap", "add"])
    if how == "flip" and at < len(data):
        new = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    elif how == "set":
        fill = draw.choice([b"\x00", b"\xff", b"\x7f", draw.randbytes(1)]) * n
        new = data[:at] + fill[: len(data) - at] + data[at + n :]
    elif how == "delete":
        new = data[:at] + data[at + n :]
    elif how == "cut":
        new = data[:at]
    elif how == "swap":
        other = draw.randrange(len(data) + 1)
        one, two = sorted((at, other))
        m = min(n, two - one, len(data) - two)
        parts = (
            data[:one],
            data[two : two + m],
            data[one + m : two],
            data[one : one + m],
        )
        new = b"".join((*parts, data[two + m :]))
    else:
        new = data[:at] + draw.randbytes(n) + data[at:]
    return new, f"{how} of {n} at byte {at}"


def change_shard(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file, changed as one."""
    size = int.from_bytes(data[:8], "little")
    text, tensors = data[8 : 8 + size], data[8 + size :]
    try:
        header = json.loads(text)
        names = [name for name in header if name != "__metadata__"]
        draw.choice(names)
    except (ValueError, IndexError, TypeError, RecursionError):
        return change_bytes(draw, data)
    ways = ["json", "json", "length", "bytes", "bytes", "entry", "span", "dtype"]
    how = draw.choice(ways)
    if how == "bytes":
        return change_bytes(draw, data)
    if how == "length":
        lengths = [
            0,
            1,
            2,
            size - 1,
            size + 1,
            len(data),
            2**24,
            2**40,
            2**63,
            2**64 - 1,
        ]
        new = draw.choice(lengths)
        return struct.pack("<Q", new) + data[8:], f"length {new}"
    said = how
    if how == "entry":
        one, other = draw.choice(names), draw.choice(names)
        header[one], header[other] = header[other], header[one]
        said = f"entries of {one!r} and {other!r} change places"[:200]
    elif how == "span" and all(isinstance(header[name], dict) for name in names):
        one = draw.choice(names)
        alike = [n for n in names if header[n].get("shape") == header[one].get("shape")]
        other = draw.choice(alike)
        header[one]["data_offsets"] = header[other].get("data_offsets")
        said = f"{one!r} is where {other!r} is"[:200]
    elif how == "dtype":
        name, kind = draw.choice(names), draw.choice([*DTYPES])
        if isinstance(header[name], dict):
            header[name]["dtype"] = kind
        said = f"{name!r} is said to be {kind}"[:200]
    else:
        header, said = change_json(draw, header)
    text = json_text(draw, header)
    new = len(text) if draw.random() < 0.9 else size
    return struct.pack("<Q", new) + text + tensors, f"header: {said}"


def change_files(draw: random.Random, files: Files, outside: Path) -> str:
    """Changes which files there are."""
    name, other = draw.choice([*files]), draw.choice([*files])
    how = draw.choice(["drop", "rename", "swap", "copy", "empty", "link", "odd"])
    if how == "drop":
        del files[name]
    elif how == "rename":
        files[f"{name}.old"] = files.pop(name)
    elif how == "swap":
        files[name], files[other] = files[other], files[name]
    elif how == "copy":
        files[name] = files[other]
    elif how == "empty":
        files[name] = b""
    elif how == "link":
        up = "../" * name.count("/")
        targets = [
            *[str(outside / name)] * 3,
            str(outside / other),
            up + other,
            name.rpartition("/")[2],
            "gone",
        ]
        targets += ["/dev/zero", "/dev/tty", "/proc/self/mem", ".", "/"]
        files[name] = Odd("link", draw.choice(targets))
        return f"{name} is a link to {files[name].target}"
    else:
        files[name] = Odd(draw.choice(["pipe", "directory"]))
        return f"{name} is a {files[name].kind}"
    return f"{how} {name}, {other}"


# ------------------------------------------------------------------------- the property


REFUSED = object()


class Hangs(BaseException):
    """Raised in the middle of what takes far too long, such as opening a pipe."""


def memory_bytes() -> tuple[int, int]:
    """Resident now, and at most since the last reset."""
    fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def timed(read: Callable[[], Any], name: str) -> tuple[Any, float, int]:
    """What `read` gives, or `REFUSED`; its seconds, and the bytes it took."""
    fired = []

    def hang(*_):
        fired.append(name)
        if len(fired) > 1:  # it waits where no exception reaches it
            os.write(2, f"\n{name}\n".encode(errors="backslashreplace"))
            os._exit(1)
        raise Hangs

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before, _ = memory_bytes()
    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, *[20 * LONGEST_SECONDS] * 2)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = read()
    except ValueError as error:
        result = REFUSED
        str(error).encode()  # without half characters
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - started
    return result, seconds, memory_bytes()[1] - before


def try_mutations(
    directory: Path,
    mutate: Callable[[random.Random, Files], str],
    read: Callable[[], Any],
    judge: Callable[[Any, list[str]], str],
    seconds: float = SECONDS,
) -> collections.Counter:
    """Mutates and reads until the time is over; counts what came out.

    Args:
      mutate: changes a dict of files, and says what it did.
      read: reads the directory.
      judge: of what was read, and what `mutate` said: its kind, if it is right.
    """
    intact, kinds = loaded(directory), collections.Counter()
    longest, largest, trials = 0.0, 0, 0
    until = time.monotonic() + seconds
    while not trials or time.monotonic() < until:
        draw, files = random.Random(SEED + trials), dict(intact)
        done = [mutate(draw, files) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
        bring(directory, intact, files)
        name = f"MUTATION_SEED={SEED + trials}: {'; '.join(done)}"
        try:
            result, took, growth = timed(read, name)
            for _ in range(3):  # others may have been busy
                if took > LONGEST_SECONDS:
                    took = min(took, timed(read, name)[1])
            assert took < LONGEST_SECONDS
            assert growth < LARGEST_GROWTH_BYTES
            kind = "refused" if result is REFUSED else judge(result, done)
        except BaseException as error:
            error.add_note(name)
            raise
        kinds[kind] += 1
        longest, largest = max(longest, took), max(largest, growth)
        bring(directory, files, intact)
        trials += 1
    print(
        f"\n{directory.name}: {trials} mutations in {seconds:.0f} s, {dict(kinds)}; "
        f"at most {longest:.2f} s and {largest / 2**20:.0f} MiB"
    )
    return kinds


@pytest.mark.parametrize("quantized", [False, True])
def test_a_mutated_hugging_face_folder(tmp_path, quantized):
    home, outside = tmp_path / "huggingface", tmp_path / "secret"
    params = quantized_params() if quantized else random_params()
    ej.to_hf(home, params, CFG, shard_bytes=7_000 if quantized else 12_000)
    (home / "tokenizer.json").write_text("{}")
    assert len([*home.glob("*.safetensors")]) >= 3
    shutil.copytree(home, outside)
    original, specs = contents(home), ej.param_specs(CFG)

    def mutate(draw: random.Random, files: Files) -> str:
        if draw.random() < 0.15:
            return change_files(draw, files, outside)
        likely = [n for n in files if n.endswith(".safetensors")] + [INDEX] * 2
        likely += ["config.json"] * 3 + ["hf_quant_config.json"] * quantized
        name = draw.choice([n for n in likely if n in files] or [*files])
        content = files[name]
        if not isinstance(content, bytes):
            return change_files(draw, files, outside)
        if name.endswith(".safetensors"):
            files[name], said = change_shard(draw, content)
        elif draw.random() < 0.2:
            files[name], said = change_bytes(draw, content)
        else:
            try:
                value, said = change_json(draw, json.loads(content))
            except (ValueError, RecursionError):
                return change_files(draw, files, outside)
            files[name] = json_text(draw, value)
        return f"{name}: {said}"

    def judge(result, _) -> str:
        params, cfg = result
        params = axes.map_specs(lambda p, _, leaf: as_lazy(p, leaf), specs, params)
        found = contents(home)
        assert_is(cfg, json.loads((home / "config.json").read_bytes()))
        names = {name for name in found if not name.startswith("mtp.")}
        memory = any(name.startswith("model.") for name in names)
        layout = Layout("model." if memory else "backbone.", stacked=False)
        stored = formats_of(weights(cfg, layout), params)
        tensors = Table(cfg, layout, stored).tensors(params, None)
        assert tensors.keys() == names
        for name, tensor in tensors.items():
            value = np.asarray(tensor, np.float64)
            assert np.isfinite(value).all()
            np.testing.assert_array_equal(value, found[name], err_msg=name)
        same = found.keys() == original.keys() and all(
            np.array_equal(found[name], original[name]) for name in found
        )
        if cfg != CFG:
            return "another configuration"
        return "unchanged" if same else "other weights"

    seconds = SECONDS / 2 if quantized else SECONDS
    kinds = try_mutations(home, mutate, lambda: ej.from_hf(home), judge, seconds)
    if SECONDS >= 10:
        assert set(kinds) >= {"refused", "unchanged", "other weights"}


def contents(home: Path) -> dict[str, np.ndarray]:
    """Every tensor in float64, as the real library reads the files of a folder."""
    files = {SINGLE}
    if not (home / SINGLE).exists():
        files = {*json.loads((home / INDEX).read_bytes())["weight_map"].values()}
    found = {}
    for name in files:
        assert (home / name).resolve().parent == home.resolve()
        for tensor, entry in safetensors.deserialize((home / name).read_bytes()):
            raw = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
            assert tensor not in found
            found[tensor] = raw.reshape(entry["shape"]).astype(np.float64)
    return found


def assert_is(cfg: ej.ModelConfig, said: dict) -> None:
    """The configuration is what its file says, or a default where that is silent."""
    pattern = said.get("hybrid_override_pattern")
    if pattern is None:
        short = {"mamba": "M", "moe": "E", "attention": "*", "mlp": "-"}
        pattern = "".join(short[kind] for kind in said["layers_block_type"])
    epsilon = said.get("layer_norm_epsilon") or said.get("norm_eps") or 1e-5
    assert (cfg.pattern, cfg.norm_eps) == (pattern, epsilon)
    assert cfg.routed_scaling_factor == said.get("routed_scaling_factor", 1.0)
    for field, value in {
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.embed,
        "n_groups": cfg.ssm_groups,
        "mamba_num_heads": cfg.ssm_groups * cfg.heads_per_group,
        "mamba_head_dim": cfg.ssm_head_dim,
        "ssm_state_size": cfg.ssm_state,
        "num_key_value_heads": cfg.kv_heads,
        "num_attention_heads": cfg.kv_heads * cfg.q_per_kv,
        "head_dim": cfg.head_dim,
        "n_routed_experts": cfg.experts,
        "moe_intermediate_size": cfg.expert_ffn,
        "moe_shared_expert_intermediate_size": cfg.shared_ffn,
        "intermediate_size": cfg.ffn,
        "num_experts_per_tok": cfg.top_k,
    }.items():
        assert said[field] == value, field
    assert said.get("conv_kernel", 4) == cfg.conv_width
    assert said.get("n_group", 1) == cfg.n_group
    assert said.get("topk_group", 1) == cfg.topk_group


@pytest.mark.parametrize("quantized", [False, True])
def test_a_mutated_nested_checkpoint(tmp_path, quantized):
    home, outside = tmp_path / "nested", tmp_path / "secret"
    params = quantized_params() if quantized else random_params()
    ej.save_nested(
        home,
        params,
        CFG,
        budgets={"small": ej.counts(CFG, embed=16, ffn=16, experts=3)},
        scores={"embed": np.arange(32.0)},
        provenance={"loss": 1.5, "steps": [1, 2]},
    )
    (home / ".lock").unlink(missing_ok=True)
    shutil.copytree(home, outside)
    specs = ej.param_specs(CFG)

    def mutate(draw: random.Random, files: Files) -> str:
        name = draw.choice([*files])
        if draw.random() < 0.5 and manifest.MANIFEST in files:
            name = manifest.MANIFEST
        content = files[name]
        if draw.random() < 0.15 or not isinstance(content, bytes):
            said = change_files(draw, files, outside)
        elif name == manifest.MANIFEST and draw.random() < 0.8:
            try:
                value, said = change_json(draw, json.loads(content))
            except (ValueError, RecursionError):
                return "nothing"
            files[name] = json_text(draw, value)
        else:
            files[name], said = change_bytes(draw, content)
        signed = draw.random() < 0.7 and sign(files, sizes=draw.random() < 0.8)
        return f"{name}: {said}{', signed' if signed else ''}"

    def read():
        nested = ej.open_nested(home)
        small = {name: nested.restore(name)[0] for name in nested.budgets}
        return nested, *nested.restore(), small

    def judge(result, done: list[str]) -> str:
        nested, found, cfg, small = result
        signed = any("signed" in said for said in done)
        formats = lambda tree: jax.tree.map(lambda w: w.format, tree, is_leaf=is_packed)
        assert formats(packed(found)) == formats(packed(params))

        def saved(have, want):
            left_out = signed and is_packed(have) and have.input_scale is None
            return dataclasses.replace(want, input_scale=None) if left_out else want

        expected = jax.tree.map(saved, found, params, is_leaf=is_packed)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        for have, want in pairs:
            assert have.shape == want.shape
            assert np.asarray(have).tobytes() == want.tobytes()
            assert signed or have.dtype == want.dtype
        record = json.loads((home / manifest.MANIFEST).read_bytes())["record"]
        assert cfg == ej.ModelConfig.from_dict(record["config"])
        assert signed or cfg == CFG
        for name, counts in nested.budgets.items():
            said = record["budgets"][name]
            assert counts == ej.counts(
                cfg,
                **{a: tuple(n) if isinstance(n, list) else n for a, n in said.items()},
            )
            want = nesting.slice_params(jax.tree.map(np.asarray, found), specs, counts)
            for a, b in zip(
                jax.tree.leaves(small[name]), jax.tree.leaves(want), strict=True
            ):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        return "another manifest" if signed else "unchanged"

    seconds = SECONDS / 2 if quantized else SECONDS
    kinds = try_mutations(home, mutate, read, judge, seconds)
    if SECONDS >= 10:
        assert set(kinds) == {"refused", "unchanged", "another manifest"}


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantArray)


def packed(tree: Any) -> list[QuantArray]:
    return [w for w in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(w)]


def sign(files: Files, *, sizes: bool) -> bool:
    """Gives the manifest a right digest, and with `sizes` those of the files there."""
    try:
        found = json.loads(files[manifest.MANIFEST])
        found.pop("sha256", None)
        if sizes:
            folder = f"{found['folder']}/"
            found["files"] = {
                name.removeprefix(folder): len(content)
                for name, content in files.items()
                if name.startswith(folder) and isinstance(content, bytes)
            }
        digest = manifest._digest(found)
        text = json.dumps({"sha256": digest, **found})
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    files[manifest.MANIFEST] = text.encode()
    return True


def _pipe(home: Path, found: dict) -> None:
    folder = home / found["folder"]
    (folder / "manifest.ocdbt").unlink()
    os.mkfifo(folder / "manifest.ocdbt")
    del found["files"]["manifest.ocdbt"]


def _half_a_character(_, found: dict) -> None:
    found["files"]["\ud800"] = 1


def _provenance(_, found: dict) -> None:
    found["record"]["provenance"] = ["not", "a", "dict"]


def _very_long(_, found: dict) -> None:
    found["record"]["provenance"] = {"x": "x" * 2**23}


FOUND = {
    "a pipe that no manifest names": (_pipe, "neither file nor directory"),
    "names that cannot be printed": (_half_a_character, r"\\ud800"),
    "provenance is a list": (_provenance, "provenance"),
    "a manifest of 8 MB": (_very_long, "at most"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_refused(name, tmp_path):
    change, words = FOUND[name]
    ej.save_nested(tmp_path / "c", random_params(), CFG, budgets={})
    file = tmp_path / "c" / manifest.MANIFEST
    found = json.loads(file.read_bytes())
    del found["sha256"]
    change(tmp_path / "c", found)
    file.write_text(json.dumps({"sha256": manifest._digest(found), **found}))
    with pytest.raises(ValueError, match=words) as error:
        ej.open_nested(tmp_path / "c")
    str(error.value).encode()


def test_no_manifest_is_written_that_is_too_long_to_read(tmp_path):
    with pytest.raises(OSError, match="provenance"):
        ej.save_nested(
            tmp_path / "c",
            random_params(),
            CFG,
            budgets={},
            provenance={"x": "x" * 2**23},
        )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("seed", range(20))
def test_the_mutator_repeats_itself(seed):
    """A seed is enough to see a failure again."""
    value, data = {"a": [1, {"b": 2.5}], "c": "text"}, bytes(range(200))
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}})
    shard = struct.pack("<Q", len(header)) + header.encode() + bytes(4)
    for change, given in [
        (change_json, value), (change_bytes, data), (change_shard, shard),
    ]:  # fmt: skip
        draws = random.Random(seed), random.Random(seed)
        assert repr(change(draws[0], given)) == repr(change(draws[1], given))
