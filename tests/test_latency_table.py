"""A table of seconds adds up over blocks, is linear between widths, and is believed
only where every number in it can be."""

import dataclasses
import itertools
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import budgets as zones
from elastic_jax.cost import Budget, parse_budget
from elastic_jax.latency_grid import ENDS, PHASES, Grid, axes_of
from elastic_jax.latency_table import FIXED, LatencyTable

CFG = dataclasses.replace(ej.presets.tiny("MEM*-E"), vocab=32)
SPECS = ej.param_specs(CFG)
WIDTHS = {
    "embed": (48, 64, 96),
    "heads_per_group": (1, 2, 4),
    "expert_ffn": (16, 32, 64),
    "experts": (4, 8),
    "q_per_kv": (1, 2),
    "ffn": (32, 128),
}
ELASTIC = ej.ElasticConfig(
    tuple((axis, widths[::-1]) for axis, widths in WIDTHS.items())
)


def made(cfg=CFG, phases=PHASES, seed=0, seconds=None) -> LatencyTable:
    """A table that nobody measured: random, or `seconds(kind, sizes, phase)`."""
    draw = np.random.default_rng(seed)
    seconds = seconds or (lambda *_: float(draw.uniform(1e-3, 2e-3)))

    def grid(kind):
        widths = tuple((a, WIDTHS.get(a, (getattr(cfg, a),))) for a in axes_of(kind))
        points = list(itertools.product(*(n for _, n in widths)))
        names = [axis for axis, _ in widths]
        of = lambda phase: tuple(
            seconds(kind, dict(zip(names, at, strict=True)), phase) for at in points
        )
        return Grid(kind, widths, tuple((phase, of(phase)) for phase in phases))

    return LatencyTable(
        device="a thought",
        date="2026-11-23",
        jax="0.0",
        dtype="float32",
        batch=1,
        prompt=16,
        context=32,
        scale=tuple((phase, 1.0) for phase in phases),
        fixed=tuple((name, getattr(cfg, name)) for name in FIXED),
        grids=tuple(map(grid, (*dict.fromkeys(cfg.pattern), ENDS))),
    )


TABLE = made()


def seconds(cfg=CFG, table=TABLE, phase="decode", **given):
    return ej.cost(ej.param_specs(cfg), cfg, **given).latency_seconds(
        table, phase=phase
    )


def looked_up(kind, phase="decode", **sizes):
    """The seconds that a grid holds at widths of its own."""
    grid = TABLE.grid[kind]
    at = [n.index(sizes.get(a, getattr(CFG, a))) for a, n in grid.widths]
    shape = [len(n) for _, n in grid.widths]
    return np.reshape(dict(grid.seconds)[phase], shape)[tuple(at)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_model_takes_what_its_parts_take(phase):
    every = sum(looked_up(kind, phase) for kind in (*CFG.pattern, ENDS))
    assert seconds(phase=phase) == pytest.approx(every, rel=1e-12)
    kept = {"embed": 64, "heads_per_group": (2, 1), "expert_ffn": 16, "experts": (4, 8)}
    parts = [
        looked_up("M", phase, embed=64, heads_per_group=2),
        looked_up("M", phase, embed=64, heads_per_group=1),
        looked_up("E", phase, embed=64, expert_ffn=16, experts=4),
        looked_up("E", phase, embed=64, expert_ffn=16, experts=8),
        *(looked_up(kind, phase, embed=64) for kind in ("*", "-", ENDS)),
    ]
    counts = ej.counts(CFG, **kept)
    whole = seconds(phase=phase, counts=counts)
    assert type(whole) is float and whole == pytest.approx(sum(parts), rel=1e-12)
    # A slice has the same widths as what it was sliced from, and the same blocks.
    small = ej.slice_config(CFG, counts)
    assert seconds(small, phase=phase) == pytest.approx(whole, rel=1e-12)
    for i in range(CFG.layers):
        layers = tuple(int(i != j) for j in range(CFG.layers))
        less = seconds(phase=phase, counts=ej.counts(CFG, layers=layers))
        one = looked_up(CFG.pattern[i], phase)
        assert seconds(phase=phase) - less == pytest.approx(one, rel=1e-9)
        # Blocks that choose for themselves are dropped alike.
        both = ej.counts(CFG, **kept, layers=layers)
        small = ej.slice_config(CFG, both)
        assert seconds(phase=phase, counts=both) == pytest.approx(
            seconds(small, phase=phase), rel=1e-12
        )


def test_between_widths_seconds_are_linear_in_each():
    at = lambda **sizes: TABLE.grid["E"].at(vars(CFG) | sizes, "decode")
    inside = {"embed": 80, "expert_ffn": 48, "experts": 5}
    for axis in inside:
        low, high = sorted(WIDTHS[axis])[-2:]
        shares = np.linspace(0, 1, 5)
        others = inside | {axis: low + shares * (high - low)}
        found = at(**others)
        ends = at(**inside | {axis: low}), at(**inside | {axis: high})
        np.testing.assert_allclose(found, ends[0] + shares * (ends[1] - ends[0]), 1e-12)
    # What is proportional to work, a sum of products of widths, is met exactly.
    work = lambda kind, sizes, _: (
        1e-9
        * float(
            sizes["embed"] * (3 + sizes.get("expert_ffn", 1) * sizes.get("experts", 1))
        )
    )
    table = made(seconds=work)
    found = table.grid["E"].at(vars(CFG) | inside, "decode")
    assert found == pytest.approx(work("E", vars(CFG) | inside, ""), rel=1e-12)


def test_masks_take_what_their_counts_take():
    for per_layer in (2, (2, 1)):
        counts = ej.counts(
            CFG, embed=64, heads_per_group=per_layer, layers=(1, 1, 1, 0, 1, 1)
        )
        masks = ej.masks_from_counts(CFG, counts)
        soft = jax.jit(lambda m: seconds(masks=m))(masks)
        assert soft.dtype == jnp.float32
        np.testing.assert_allclose(soft, seconds(counts=counts), rtol=1e-6)


def test_the_gradient_of_a_mask_is_the_slope_of_the_table():
    """Also at a width of the table, where one-hot choices put every mask."""
    slopes = jax.jit(jax.grad(lambda m: seconds(masks=m)))
    at = [seconds(counts=ej.counts(CFG, embed=n)) for n in (64, 96)]
    for width in (96, 80, 64):
        mask = (jnp.arange(96) < width).astype(jnp.float32)
        slope = slopes({"embed": mask})["embed"]
        np.testing.assert_allclose(slope, (at[1] - at[0]) / 32, rtol=1e-3)
    factors = slopes({"layers": jnp.ones(CFG.layers)})["layers"]
    each = [looked_up(kind) for kind in CFG.pattern]
    np.testing.assert_allclose(factors, each, rtol=1e-5)
    two = {"heads_per_group": (jnp.ones(4), jnp.ones(4)), "layers": jnp.full(6, 0.5)}
    for slope in jax.tree.leaves(slopes(two)):
        assert jnp.isfinite(slope).all() and slope.all()


def test_many_submodels_at_once_are_each_as_alone():
    rows = zones._combinations(ELASTIC)
    budget = Budget(1.0, "latency_seconds", latency=TABLE, phase="answer", new_tokens=5)
    shares = zones._relative_costs(ELASTIC, rows, SPECS, CFG, budget, None, None)
    for i in range(0, len(rows), 37):
        kept = {a: n[c] for (a, n), c in zip(ELASTIC.choices, rows[i], strict=True)}
        counts = ej.counts(CFG, **kept)
        np.testing.assert_allclose(
            shares[i], budget.ratio(SPECS, None, CFG, counts=counts), rtol=1e-6
        )


def test_an_answer_is_a_prompt_and_its_tokens():
    cost = ej.cost(SPECS, CFG)
    once, each = (cost.latency_seconds(TABLE, phase=phase) for phase in PHASES)
    whole = cost.latency_seconds(TABLE, phase="answer", new_tokens=7)
    assert whole == pytest.approx(once + 7 * each, rel=1e-12)


def test_equal_tables_compile_once():
    traced = []

    @partial(jax.jit, static_argnums=1)
    def loss(mask, budget):
        traced.append(budget)
        return budget.ratio(SPECS, None, CFG, masks={"embed": mask})

    for table in (TABLE, made(), LatencyTable.from_dict(TABLE.to_dict())):
        assert table == TABLE and hash(table) == hash(TABLE)
        loss(jnp.ones(96), Budget(0.5, "latency_seconds", latency=table))
    assert len(traced) == 1
    loss(jnp.ones(96), Budget(0.5, "latency_seconds", latency=made(seed=1)))
    assert len(traced) == 2
    assert len(repr(TABLE)) < 300  # it stands in messages


def test_other_models_and_widths_are_refused_by_name():
    for cfg, said in (
        (dataclasses.replace(CFG, vocab=64), "vocab: 64, measured at 32"),
        (dataclasses.replace(CFG, head_dim=8), "head_dim: 8, measured at 16"),
        (dataclasses.replace(CFG, embed=112), "embed: 112 in '.*', measured at 48 to"),
        (dataclasses.replace(CFG, shared_ffn=48), "shared_ffn: 48 in 'E', measured at"),
    ):
        with pytest.raises(ValueError, match=said):
            TABLE.check(cfg)
        with pytest.raises(ValueError, match=said):
            seconds(cfg)
    TABLE.check(CFG, ELASTIC)
    fewer = made(dataclasses.replace(CFG, pattern="ME*"))
    with pytest.raises(ValueError, match=r"pattern: no seconds of \['-'\]"):
        fewer.check(CFG)
    with pytest.raises(ValueError, match="embed: 32 in 'M', measured at 48 to 96"):
        TABLE.check(CFG, ej.ElasticConfig((("embed", (96, 32)),)))
    with pytest.raises(ValueError, match="embed: 32"):
        seconds(counts=ej.counts(CFG, embed=32))
    with pytest.raises(ValueError, match="no seconds of 'prefill'.*decode"):
        seconds(table=made(phases=("decode",)), phase="prefill")


def test_a_table_is_read_back_as_it_was_saved(tmp_path):
    file = tmp_path / "latency.json"
    TABLE.save(file)
    made(seed=1).save(file)  # replaced as a whole
    assert LatencyTable.read(file, device="a thought") == made(seed=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["latency.json"]
    with pytest.raises(ValueError, match="latency.json: device: .*a thought.*a dream"):
        LatencyTable.read(file, device="a dream")
    with pytest.raises(ValueError, match="nowhere.json: expected a file"):
        LatencyTable.read(tmp_path / "nowhere.json")


def changed(path, value):
    """TABLE as plain values with one of them replaced, or removed."""
    values = json.loads(json.dumps(TABLE.to_dict()))
    at = values
    for step in path[:-1]:
        at = at[step]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return values


HOSTILE = [
    (("device",), KeyError, "missing 'device'"),
    (("divice",), "x", "unknown 'divice'; did you mean 'device'"),
    (("device",), "", "device: expected text"),
    (("device",), ["x"], "device: expected text"),
    (("date",), 7, "date: expected text"),
    (("batch",), 0, "batch: expected a positive int"),
    (("batch",), True, "batch: expected a positive int"),
    (("context",), 1e9, "context: expected a positive int"),
    (("prompt",), 10**30, "prompt: expected a positive int"),
    (("scale",), [1.0], "scale: expected a dict"),
    (("scale", "decode"), KeyError, "different phases"),
    (("scale", "decode"), math.nan, "scale.decode: expected a positive factor"),
    (("scale", "decode"), "1", "scale.decode: expected a positive factor"),
    (("fixed",), [], "fixed: expected a dict"),
    (("fixed", "vocab"), KeyError, "fixed: expected"),
    (("fixed", "vocab"), -1, "fixed.vocab: expected a positive int"),
    (("fixed", "vacob"), 1, "fixed: expected"),
    (("grids",), {}, "grids: expected a list"),
    (("grids",), [], "grids: expected 'ends'"),
    (("grids", 0), 3, r"grids\[0\]: expected a dict"),
    (("grids", 0, "kind"), "X", r"grids\[0\].*kind: 'X'"),
    (("grids", 0, "kind"), ["M"], r"grids\[0\].*kind: \['M'\]"),
    (("grids", 0, "kind"), "E", r"grids\[0\].*widths: expected"),
    (("grids", 1), TABLE.to_dict()["grids"][0], "each once"),
    (("grids", 0, "widths"), KeyError, r"grids\[0\]:\n  missing 'widths'"),
    (("grids", 0, "widths", "embed"), KeyError, "widths: expected"),
    (("grids", 0, "widths", "embed"), [96, 64, 48], "widths.embed: expected ascending"),
    (("grids", 0, "widths", "embed"), [48, 64, 64], "widths.embed: expected ascending"),
    (("grids", 0, "widths", "embed"), [48, 64.0, 96], "widths.embed: expected"),
    (("grids", 0, "widths", "embed"), [0, 64, 96], "widths.embed: expected"),
    (("grids", 0, "widths", "embed"), [[48], 64, 96], "widths.embed: expected"),
    (("grids", 0, "widths", "embed"), [], "widths.embed: expected"),
    (("grids", 0, "widths", "embed"), [48, 64], r"seconds.prefill: 9 numbers, exp.* 6"),
    (("grids", 0, "widths", "embed"), [*range(1, 9**6)], "combinations, at most"),
    (
        ("grids", 0, "widths", "embed"),
        "48",
        r"grids\[0\].widths.embed: expected a list",
    ),
    (("grids", 0, "seconds", "decode"), KeyError, "different phases"),
    (("grids", 0, "seconds", "dekode"), [], "seconds: expected some of"),
    (("grids", 0, "seconds"), {}, "seconds: expected some of"),
    (("grids", 0, "seconds", "decode", 4), math.nan, r"decode\[4\]: .*got nan"),
    (("grids", 0, "seconds", "decode", 4), math.inf, r"decode\[4\]: .*got inf"),
    (("grids", 0, "seconds", "decode", 4), -1e-3, r"decode\[4\]: .*got -0.001"),
    (("grids", 0, "seconds", "decode", 4), 0.0, r"decode\[4\]: .*got 0.0"),
    (("grids", 0, "seconds", "decode", 4), "1", r"decode\[4\]: .*got '1'"),
    (("grids", 0, "seconds", "decode", 4), None, r"decode\[4\]: .*got None"),
    (("grids", 0, "seconds", "decode", 4), [1.0], r"decode\[4\]: .*got \[1.0\]"),
]


@pytest.mark.parametrize("path, value, said", HOSTILE)
def test_a_table_that_cannot_be_is_refused_with_file_and_field(
    path, value, said, tmp_path
):
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError) as caught:
        LatencyTable.read(file)
    text = str(caught.value)
    assert text.startswith(str(file)) and re.search(said, text, re.DOTALL), text
    assert len(text) < 1000


@pytest.mark.parametrize(
    "text", ["", "[", "null", "[]", '"x"', "7", "[" * 100_000, '{"device": "\\ud800"}']
)
def test_what_is_no_table_is_refused(text, tmp_path):
    file = tmp_path / "latency.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="latency.json"):
        LatencyTable.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="latency.json"):
        LatencyTable.read(file)
    with pytest.raises(ValueError, match="expected a file"):
        LatencyTable.read(tmp_path)


@pytest.mark.parametrize(
    "text, target, relative",
    [
        ("12ms", 0.012, False),
        ("3.5s", 3.5, False),
        (" 250 us", 2.5e-4, False),
        (0.6, 0.6, True),
    ],
)
def test_latency_budgets_are_read(text, target, relative):
    kind = "latency_seconds" if relative else None  # a unit says what is meant
    budget = parse_budget(text, kind=kind, latency=TABLE, phase="prefill")
    assert (budget.kind, budget.relative) == ("latency_seconds", relative)
    assert budget.target == pytest.approx(target, rel=1e-12)
    assert (budget.latency, budget.phase) == (TABLE, "prefill")


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("12ms", {"kind": "total_params"}, "in seconds, but its kind is"),
        ("2.8B", {"kind": "latency_seconds"}, "in parameters, but its kind is"),
        (12, {"kind": "latency_seconds"}, "in parameters, but its kind is"),
        ("24GiB", {"kind": "latency_seconds"}, "in bytes, but its kind is"),
        (0.5, {"kind": "latency"}, "did you mean 'latency_seconds'"),
        ("1s", {"phase": "prefil"}, "unknown phase 'prefil'; did you mean 'prefill'"),
        ("1s", {"phase": "answer"}, "needs new_tokens=, at least 1, got None"),
        ("1s", {"phase": "answer", "new_tokens": 0}, "at least 1, got 0"),
        ("12min", {}, "s, ms for time"),
    ],
)
def test_unreadable_latency_budgets_are_refused(text, options, said):
    with pytest.raises(ValueError, match=said):
        parse_budget(text, **options)


def test_budgets_without_or_with_two_tables_are_refused():
    pair = lambda *tables: tuple(
        (name, Budget(target, "latency_seconds", latency=table))
        for name, target, table in zip("ab", (1.0, 0.5), tables, strict=True)
    )
    with pytest.raises(ValueError, match="need a latency table"):
        zones.relative_targets(pair(None, None), SPECS, CFG)
    with pytest.raises(ValueError, match="must share .* latency"):
        zones.relative_targets(pair(TABLE, made(seed=1)), SPECS, CFG)
    with pytest.raises(ValueError, match="needs latency=, a table"):
        pair(None, None)[1][1].ratio(SPECS, None, CFG)
    absolute = Budget(0.5 * seconds(), "latency_seconds", False, latency=TABLE)
    assert zones.relative_targets(
        (pair(TABLE, TABLE)[0], ("b", absolute)), SPECS, CFG
    ) == pytest.approx((1.0, 0.5))
