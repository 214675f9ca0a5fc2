"""The page of claims: from lines alone, the committed one too."""

import json
import pathlib
import shutil

import pytest

from elastic_jax import claims_report
from elastic_jax.claims import CLAIMS

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
COMMITTED = EXPERIMENTS / "claims_run"
ROW = {
    "claim": "memory",
    "arm": "toy",
    "seed": 0,
    "seconds": 1.5,
    "smoke": False,
    "evaluation": {"problems": 8},
    "date": "2026-01-02",
    "commit": "abc",
    "device": "cpu, 2 cores",
    "versions": {"jax": "0"},
    "configuration": "one",
    "found": {"nested": {"bf16": 2**30}, "separate": {"a": 2**30, "b": 2**30}},
}


@pytest.fixture
def folder(tmp_path):
    """Of lines; the page is written beside it."""
    path = tmp_path / "claims_run"
    path.mkdir()
    return path


def written(folder, *rows, name="memory"):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return claims_report.write_claims_report(folder).read_text()


def test_the_committed_page_is_made_from_the_committed_lines(folder):
    """No result is written by hand, and no line is left out."""
    for lines in COMMITTED.glob("*.jsonl"):
        shutil.copy(lines, folder)
        assert lines.stem in CLAIMS
    page = claims_report.write_claims_report(folder).read_text()
    assert page == (EXPERIMENTS / claims_report.PAGE).read_text()
    pictures = {p.name for p in folder.glob("*.png")}
    assert pictures == {p.name for p in COMMITTED.glob("*.png")}
    assert "smoke" not in page
    means = [line for line in page.splitlines() if line.startswith("* ")]
    assert means and not any("|" in line for line in means)


def test_a_page_says_what_was_run_and_what_was_not(folder):
    twice = written(folder, ROW, ROW | {"seed": 1})
    assert "* toy: all sizes in one checkpoint take less room" in twice
    page = written(folder, ROW)
    assert "one nested checkpoint / 2 separate ones, BF16 |    0.500" in page
    assert "--claim=memory" in page and "commit abc" in page and "1.5 s" in page
    assert "* Where there is no ± there is one seed" in page
    assert "* toy: all sizes" not in page
    assert page.count("Not run.") == len(CLAIMS) - 1
    assert (folder / "memory.png").exists() and "![" in page
    (folder / "memory.jsonl").unlink()
    again = claims_report.write_claims_report(folder).read_text()
    assert again.count("Not run.") == len(CLAIMS)
    assert not (folder / "memory.png").exists()  # of rows that are gone
    assert "A smoke run" in written(folder, ROW | {"smoke": True})


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROW, "{"], "line 2: no JSON"),
        ([ROW, "[1]"], "line 2 is no row"),
        ([{k: v for k, v in ROW.items() if k != "date"}], "line 1 lacks date"),
        ([ROW, ROW], r"line 2: \('toy', 0\) stands in line 1 too"),
        ([ROW, ROW | {"seed": 1, "configuration": "two"}], "configurations"),
        ([ROW | {"claim": "nested"}], "has rows of nested"),
    ],
)
def test_lines_that_are_no_results_are_refused(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        written(folder, *rows)


def test_a_folder_that_is_none_is_refused(folder):
    with pytest.raises(ValueError, match="expected a folder"):
        claims_report.write_claims_report(folder / "nothing")


def test_every_claim_has_its_anchor(folder):
    page = written(folder, ROW)
    for claim in CLAIMS.values():
        assert f"## {claim.title}\n" in page
    for line in page.splitlines():
        if "](#" in line:
            anchor = line.split("](#")[1].split(")")[0]
            heads = (c.title.lower().replace(" ", "-") for c in CLAIMS.values())
            assert anchor in set(heads)
