"""The claims of the method, one by one: `python experiments/claims.py --workdir=DIR`.

    DIR/RESULTS.md what the lines say, made from them alone
    DIR/results/   a line per claim, arm and seed: `nested.jsonl`; a plot per claim
    DIR/parents/   toys that several claims start from
    DIR/trained/   what was trained, by claim and arm

`--claim=nested` is one of them, `--claim=all` all, the cheap ones first; `--smoke` runs
the same paths with a handful of steps. A rerun measures only the arms and seeds that
have no line yet. `--results=FOLDER` keeps the lines elsewhere, the page beside it:
`experiments/claims_run` is where those of `experiments/RESULTS.md` and of the README's
table are. `--report` writes the page again and runs nothing. Exit codes are those of
`run.py`.
"""

import argparse
import datetime
import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from experiments import process  # noqa: E402

if __name__ == "__main__":
    process.use_huge_pages()
    if "--smoke" in sys.argv:
        process.compile_quickly()
    else:  # on two cores a fifth less time to compile, and steps that take as long
        process.add_flags("--xla_backend_optimization_level=1")

import jax  # noqa: E402

from elastic_jax import claims_report, directories, fit  # noqa: E402
from elastic_jax.claims import CLAIMS  # noqa: E402
from elastic_jax.manifest import plain  # noqa: E402
from experiments import settings, training  # noqa: E402
from experiments.arms.start import Start  # noqa: E402
from experiments.workdir import console, exit_code  # noqa: E402

COMMITTED = REPOSITORY / "experiments" / "claims_run"
README = REPOSITORY / "README.md"
TABLE = "<!-- claims: begin -->", "<!-- claims: end -->"  # around it in the README
# How often something is measured is no part of what is measured.
REPEATED = ("seeds", "repeats")


def plan(claim: str, *, smoke: bool = False) -> settings.Plan:
    """A claim's configuration as validated values."""
    config = importlib.import_module(f"experiments.configs.claims.{claim}").get_config()
    config.smoke = smoke
    return settings.plan(config)


def run(
    claim: str, plan: settings.Plan, root: pathlib.Path, results: pathlib.Path
) -> None:
    """Measures every arm and seed of a claim that has no line in `results` yet.

    Raises:
      ValueError: lines of another configuration.
    """
    arms = importlib.import_module(f"experiments.arms.{claim}")
    start = Start(plan, root, claim)
    kept = Lines(results / f"{claim}.jsonl", identity(plan))
    for seed in range(start.asked["seeds"]):
        missing = [a for a in arms.arms(start, seed) if not kept.has(a, seed)]
        if not missing:
            continue
        console.rule(f"[bold]{claim}, seed {seed}", align="left")
        began, start = time.monotonic(), start.of_seed(seed)
        for arm, found in arms.rows(start, seed, missing):
            now = time.monotonic()
            about = {"claim": claim, "arm": arm, "seed": seed}
            about["seconds"] = round(now - began, 1)
            kept.add(about | _origin(plan) | {"found": found})
            console.print(f"{claim}, seed {seed}: {arm}")
            began = now


def identity(plan: settings.Plan) -> dict[str, Any]:
    """What lines of a claim belong to."""
    named = training.identity(plan, plan.stages)
    for group in ("claim", "control", "quantization"):
        values = plan.values[group].items()
        named[group] = plain({k: v for k, v in values if k not in REPEATED}, group)
    return named


class Lines:
    """Results of a claim, a JSON object per line."""

    def __init__(self, path: pathlib.Path, identity: dict[str, Any]):
        self.path, self.rows = path, claims_report.read_lines(path)
        text = json.dumps(identity, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        beside = path.with_name(f".{path.stem}.identity.json")
        others = [row for row in self.rows if row["configuration"] != self.digest]
        if others:
            known = json.loads(beside.read_text()) if beside.exists() else {}
            changed = fit.differences(known, identity) if known else ["(not recorded)"]
            raise ValueError(
                f"{path}: {len(others)} of {len(self.rows)} lines are of another "
                "configuration:\n  " + "\n  ".join(changed) + "\nuse a new --workdir, "
                "or move the file away to measure again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(identity, indent=1) + "\n")

    def has(self, arm: str, seed: int) -> bool:
        return any((row["arm"], row["seed"]) == (arm, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Writes the file with one line more, as a whole or not at all."""
        self.rows.append(plain(row | {"configuration": self.digest}, "row"))
        beside = self.path.with_suffix(".tmp")
        lines = (json.dumps(row, sort_keys=True) for row in self.rows)
        beside.write_text("".join(f"{line}\n" for line in lines))
        beside.replace(self.path)


def _origin(plan: settings.Plan) -> dict[str, Any]:
    return {
        "smoke": plan.values["smoke"],
        "evaluation": dict(plan.task.evaluation),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    asked = (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "-uno"])
    try:
        found = [
            subprocess.run([*git, *a], capture_output=True, text=True, check=True)
            for a in asked
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    head, changes = (each.stdout.strip() for each in found)
    return f"{head}+" if changes else head


def main(arguments: Sequence[str]) -> None:
    """Plans all that was asked for before any of it runs."""
    asked = _parsed(arguments)
    results = asked.results or asked.workdir / "results"
    if asked.report:
        console.print(f"written: {write(results)}")
        return
    claims = list(CLAIMS) if asked.claim == "all" else [asked.claim]
    plans = {claim: plan(claim, smoke=asked.smoke) for claim in claims}
    root = asked.workdir
    with directories.locked(root):
        jax.config.update("jax_compilation_cache_dir", str(root / "jax_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        for claim, each in plans.items():
            run(claim, each, root, results)
            said = write(results)
            # Linux maps 65,530 regions for a process, and XLA a hundred per program:
            # without this, compiling fails for want of memory in the seventh claim.
            jax.clear_caches()
    console.print(f"done: {said}")


def write(results: pathlib.Path) -> pathlib.Path:
    """Writes the page of a folder of lines; of the committed ones the README's too."""
    page = claims_report.write_claims_report(results)
    if results.resolve() == COMMITTED:
        README.write_text(with_table(README.read_text(), results))
    return page


def with_table(readme: str, results: pathlib.Path) -> str:
    """The README with a table of what the lines say now."""
    begin, end = TABLE
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    page = COMMITTED.with_name(claims_report.PAGE).relative_to(REPOSITORY)
    table = claims_report.summary(claims_report.read_folder(results), str(page))
    return f"{before}{begin}\n{table}\n{end}{after}"


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError for what argparse does not check."""
    parser = argparse.ArgumentParser(description=__doc__, exit_on_error=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--claim", default="all", choices=("all", *CLAIMS))
    parser.add_argument("--workdir", type=pathlib.Path, help="where everything is kept")
    parser.add_argument("--smoke", action="store_true", help="a handful of steps")
    parser.add_argument("--results", type=pathlib.Path, help="where lines are kept")
    parser.add_argument("--report", action="store_true", help="write the page alone")
    try:
        asked, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(f"unknown {' '.join(unknown)}; see --help")
    if asked.workdir is None and not (asked.report and asked.results):
        raise ValueError(
            "give --workdir=DIR to measure, or --report --results=FOLDER to write"
        )
    return asked


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
