"""Notebooks are lessons that work: every cell runs on a fresh checkpoint."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
LESSONS = ("slice", "budget_control", "quantize")


def run(lesson: str, workdir: pathlib.Path):
    """The code cells of a lesson after a run from top to bottom."""
    notebook = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ELASTIC_JAX_CHECKPOINT", str(workdir / "checkpoint"))
        nbclient.NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOKS)}},
        ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(smoke_workdir):
    return run("slice", smoke_workdir)


@pytest.fixture(scope="module")
def controlled(control_workdir):
    return run("budget_control", control_workdir)


@pytest.fixture(scope="module")
def quantized(smoke_workdir):
    return run("quantize", smoke_workdir)


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def with_source(cells, part: str):
    return next(cell for cell in cells if part in cell.source)


def table(cell) -> list[list[str]]:
    """The rows of a Markdown table, without its head."""
    (text,) = (o.data["text/markdown"] for o in cell.outputs if "data" in o)
    rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    return [[word.strip() for word in row] for row in rows]


@pytest.mark.parametrize("lesson", ["executed", "controlled", "quantized"])
def test_every_cell_runs_and_the_last_is_a_plot(lesson, request):
    cells = request.getfixturevalue(lesson)
    assert all(cell.execution_count for cell in cells)
    plots = [o for o in cells[-1].outputs if "image/png" in o.get("data", {})]
    assert len(plots) == 1


def test_it_shows_what_it_claims(executed):
    rounds = printed(with_source(executed, "slice_fn = jax.jit")).splitlines()
    assert len({line.split(": ")[1] for line in rounds}) == 1  # compiled in the first

    gaps = printed(with_source(executed, "from its slice")).splitlines()
    named = {line.split()[0]: line.split() for line in gaps}
    assert set(named) == {"full", "small", "unplanned"}
    for name, words in named.items():
        from_slice, from_parent = float(words[4]), float(words[-1])
        assert from_slice < 1e-5
        assert (from_parent > 1e-2) == (name != "full")  # the masks do something

    answers = printed(with_source(executed, "ej.generate"))
    assert all(f"{name}: " in answers for name in named)


def test_a_thought_is_capped_and_both_hand_overs_cost_what_they_read(controlled):
    said = printed(with_source(controlled, "for cap in ("))
    assert said.count("of the thoughts were cut") == 2
    rows = table(with_source(controlled, "parameters x tokens"))
    work = {(pair, int(cap)): float(n) for pair, cap, _, n in rows}
    assert len(work) == len(rows) == 12
    longest = max(cap for _, cap in work)
    assert work["L->L (own cache)", longest] == 1
    for cap in {cap for _, cap in work}:
        for pair in ("S->L", "L->S"):
            again = work[f"{pair} (reprefill)", cap]
            assert again > work[f"{pair} (transplant)", cap]


def test_quantizing_and_cutting_commute_in_the_lesson(quantized):
    exact = printed(with_source(quantized, "assert same(first, then)")).splitlines()
    assert sum("unpack(cut(packed))" in line for line in exact) == 4
    assert printed(with_source(quantized, "differ = ")).endswith("True\n")
    rows = table(with_source(quantized, "divergence(small, cut"))
    by = {(budget, weights): float(kl) for budget, weights, _, kl in rows}
    for budget in ("full", "small"):
        assert 0 == by[budget, "bf16"] < by[budget, "fp8"] < by[budget, "nvfp4"]


@pytest.mark.parametrize("lesson", LESSONS)
def test_it_is_stored_without_outputs(lesson):
    """Outputs would age; a reader's own run makes them."""
    notebook = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
