"""Floors and doors: what may import what, read from the imports themselves."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module imports only from floors below its own; within a floor, from what stands
# to its left.
FLOORS = (
    ("axes", "config", "presets", "lazy", "directories"),
    (
        *("masks", "nesting", "latency_grid", "latency_table", "cost", "budget"),
        *("quantize", "quantization_error", "parts", "sharding"),
    ),
    ("layers.norm", "layers.attention", "layers.mamba2", "layers.mlp", "layers.moe"),
    ("model", "exact"),
    (
        "budgets",
        "router",
        "distill",
        "scores",
        "fold",
        "importance",
        "calibration",
        "curriculum",
        "sampling",
        "stopping",
        "listeners",
        "data",
        "tokenizer",
        "corpus",
        "packing",
        *("manifest", "contents", "prefixes"),
        "stored",
        "checkpoint",
        "saves",
        *("huggingface.untrusted", "huggingface.shards"),
        *("huggingface.quantization_config", "huggingface.quantized"),
        "huggingface.config",
        "huggingface.uniform",
        *("huggingface.turning", "huggingface.names"),
        "huggingface.reading",
        "huggingface.writing",
        "tables",
        "measures",
        "findings",
        *("fronts", "control_findings", "verdicts"),
        *("claims.claim", "claims.training", "claims.compression", "claims.control"),
        "claims.table",
    ),
    (
        *("elastic", "train", "objectives", "quantized_training", "metrics", "fit"),
        *("speculative", "decoding", "generate", "budget_control"),
        *("convert", "post_training", "request", "serving", "latency"),
        *("report", "control_report", "quantization_report", "claims_report"),
    ),
    ("console", "__main__"),
)
ALONE = {
    *("layers.attention", "layers.mlp", "layers.moe"),
    *("convert", "latency", "report"),
}

DOORS = {
    "flax": {"router"},
    "optax": {"train"},
    "orbax": {"stored"},
    "tensorstore": {"stored"},
    "grain": {"data"},
    "tokenizers": {"tokenizer"},
    "pyarrow": {"corpus"},
    "tensorboardX": {"metrics"},
    "matplotlib": {
        *("report", "control_report", "quantization_report", "claims_report"),
    },
    "rich": {"console"},
    "torch": set(),
    "triton": set(),
    "ml_collections": set(),
    "absl": set(),
}


def modules():
    package = ROOT / "elastic_jax"
    for file in sorted(package.rglob("*.py")):
        name = ".".join(file.relative_to(package).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, file


def imports(file):
    """Dotted names that a file imports, `from a import b` as `a.b` and `a`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


NAMES = dict(modules())
PLACES = {
    name: (floor, place)
    for floor, names in enumerate(FLOORS)
    for place, name in enumerate(names)
}


def test_every_module_has_a_floor():
    assert set(NAMES) == set(PLACES)


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_downwards(name):
    for imported in imports(NAMES[name]):
        other = imported.removeprefix("elastic_jax.")
        if imported.startswith("elastic_jax.") and other in PLACES:
            below = PLACES[other] < PLACES[name]
            same = PLACES[other][0] == PLACES[name][0]
            norm = other == "layers.norm"
            allowed = below and not (same and name in ALONE and not norm)
            assert allowed, f"{name} imports {other}"
        assert not imported.startswith("experiments"), f"{name} imports {imported}"


@pytest.mark.parametrize("name", NAMES)
def test_each_library_has_one_door(name):
    for imported in imports(NAMES[name]):
        library = imported.split(".")[0]
        if library in DOORS:
            assert name in DOORS[library], f"{name} imports {library}"


def test_kernels_stand_alone():
    for file in (ROOT / "kernels").rglob("*.py"):
        libraries = {imported.split(".")[0] for imported in imports(file)}
        assert not libraries & {"elastic_jax", "experiments", "flax", "grain"}, file


def test_the_source_roots_shadow_nothing():
    """A package called `kernels` would hide the one that transformers probes."""
    for folder in ("kernels", "tests", "tests/kernels"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_importing_takes_no_heavy_library():
    code = (
        "import sys, elastic_jax; "
        "heavy = {'torch', 'triton', 'grain', 'transformers', 'matplotlib', 'orbax'}; "
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
