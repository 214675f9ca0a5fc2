"""The notebook is a lesson that works: every cell runs on a fresh checkpoint."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
SLICE = NOTEBOOKS / "slice.ipynb"


@pytest.fixture(scope="module")
def executed(smoke_workdir):
    """The cells of the slicing lesson after a run from top to bottom."""
    notebook = nbformat.read(SLICE, as_version=4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ELASTIC_JAX_CHECKPOINT", str(smoke_workdir / "checkpoint"))
        nbclient.NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOKS)}},
        ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def with_source(cells, part: str):
    return next(cell for cell in cells if part in cell.source)


def test_every_cell_runs_and_the_last_is_a_plot(executed):
    assert all(cell.execution_count for cell in executed)
    plots = [o for o in executed[-1].outputs if "image/png" in o.get("data", {})]
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


def test_it_is_stored_without_outputs():
    """Outputs would age; a reader's own run makes them."""
    notebook = nbformat.read(SLICE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
