"""One nested checkpoint, quantized: what it keeps, and what training gives back.

For every seed the elastic model is calibrated once and quantized as a whole by every
arm: by rounding alone ("ptq"), after distillation from itself ("qad"), or after
training on the data ("qat"). Every arm is stored as one nested checkpoint, and every
budget is what that checkpoint restores: no size is quantized on its own. Bytes are
those of stored weights, all that is not quantized in BF16; computing is in float32.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import elastic_jax as ej
from elastic_jax import checkpoint, convert, fold, quantization_report
from elastic_jax.calibration import InputStatistics, input_statistics
from elastic_jax.manifest import plain
from elastic_jax.quantization_error import Error, quantization_errors
from elastic_jax.quantize import names, size_bytes, table
from elastic_jax.quantized_training import QuantizedTraining, quantized_objective
from elastic_kernels import QuantArray
from experiments import evaluation, ranking, training
from experiments.settings import ARMS, Plan
from experiments.workdir import Workdir, bar, console

FILE = "quantization.json"
REFERENCE = "bf16"  # the arm that the others are measured by
NUMBERS = Error._fields[2:]
LOSSES = {"qad": "distillation", "qat": "cross_entropy"}


def measure(
    plan: Plan, workdir: Workdir, nested: Any, *, allow_changes: bool
) -> None:
    """Trains, quantizes and evaluates every seed and arm that is missing.

    Args:
      nested: the permuted parent that elastic training starts from.
    """
    asked = plan.values["quantization"]
    name = training.identity(plan, plan.stages)
    given = {k: v for k, v in asked.items() if k not in ("seeds", "arms")}
    name["quantization"] = plain(given, "quantization")
    found = workdir.read(FILE)
    if found is None or found["identity"] != name:
        found = {"identity": name, "seeds": {}}
    for seed in range(asked["seeds"]):
        rows = found["seeds"].setdefault(str(seed), [])
        done = {row["arm"] for row in rows}
        missing = [arm for arm in (REFERENCE, *asked["arms"]) if arm not in done]
        if not missing:
            continue
        run = Seed(plan, workdir, nested, seed, allow_changes)
        for arm in missing:
            with workdir.phase("quantization", f"quantization: seed {seed}, {arm}"):
                rows += run.rows(arm)
                workdir.write(FILE, found)
    found |= {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "smoke": plan.values["smoke"],
        "measure": plan.task.measure.name,
        "evaluation": dict(plan.task.evaluation),
        "steps": plan.quantized_stage.total_steps,
        "rounded": "weights and activations" if asked["activations"] else "weights",
        "everything": ["*", "arm"] in plain(asked["rules"], "rules"),
        "arms": [REFERENCE, *asked["arms"]],
        "budgets": [name for name, _ in plan.budgets],
        "table": _tables(plan),
    }
    kept = {str(i): found["seeds"][str(i)] for i in range(asked["seeds"])}
    found["seeds"] = {
        seed: [row for row in rows if row["arm"] in found["arms"]]
        for seed, rows in kept.items()
    }
    workdir.write(FILE, found)


def report(workdir: Workdir) -> None:
    """Writes the report from the numbers, where there are any."""
    if (found := workdir.read(FILE)) is not None:
        path = quantization_report.write_quantization_report(workdir.path, found)
        console.print(f"quantization: {path}")


class Seed:
    """One elastic training, and what its arms start from."""

    def __init__(self, plan, workdir, nested, seed: int, allow_changes: bool):
        self.plan, folder = training.of_seed(plan, seed)
        self.workdir, self.seed, self.allow_changes = workdir, seed, allow_changes
        state, self.counts, elastic = training.elastic_training(
            self.plan,
            workdir,
            folder,
            nested,
            keep_stages=bool(plan.values["control"]["caps"]),
            allow_changes=allow_changes,
        )
        self.params = state.params
        self.elastic = dataclasses.replace(elastic, teacher=state.params)
        self.inputs = self._calibrated()

    def _calibrated(self) -> InputStatistics:
        batches = ranking.read_batches(self.plan)
        with bar("calibration", len(batches)) as advance:
            seen = iter(range(1, len(batches) + 1))
            return input_statistics(
                self.params,
                batches,
                self.plan.cfg,
                path=self.workdir.path / f"inputs-{self.seed}.npz",
                budgets=tuple(self.counts.values()),
                provenance={"data": self.plan.task.data["calibration"].digest()},
                on_batch=lambda _: advance(next(seen)),
            )

    def rows(self, arm: str) -> list[dict[str, Any]]:
        """One row per budget, of what the arm's checkpoint restores."""
        params, packed = self.weights(arm)
        opened = self.stored(arm, packed)
        errors = [] if arm == REFERENCE else self._errors(params, packed)
        rows = []
        for name, counts in self.counts.items():
            small, cfg = opened.restore(name, dtype=jnp.float32)
            teacher, teacher_cfg = evaluation.sliced(self.plan, self.params, counts)
            found = evaluation.evaluate(
                self.plan, small, cfg, teacher, teacher_cfg=teacher_cfg
            )
            row = {
                "arm": arm,
                "budget": name,
                "memory_bytes": size_bytes(opened.lazy(name)[0]),
                "disk_bytes": _alone_on_disk(self._path(arm), name),
                "nested_disk_bytes": opened.size_bytes,
                "errors": errors,
            }
            rows.append(row | found)
            said = self.plan.task.measure.form(found["value"])
            console.print(f"{name}: {said} {self.plan.task.measure.name}")
        return rows

    def weights(self, arm: str) -> tuple[Any, Any]:
        """The parent's tree, trained if the arm asks for that, and how it is stored."""
        params = self.params
        if arm == REFERENCE:
            return params, _in_bf16(params)
        plan, recipe, way = self.plan, self.plan.recipes[arm], ARMS[arm][1]
        asked, specs = plan.values["quantization"], ej.param_specs(plan.cfg)
        inputs = self.inputs.largest if asked["activations"] else None
        rounding = {"input_largest": inputs}
        if way != "ptq":
            if asked["scales"] == "frozen":
                like = ej.quantize(params, specs, plan.cfg, recipe, **rounding)
                rounding = {"like": like, "frozen": True}
            params = self._trained(arm, rounding)
        packed = ej.quantize(params, specs, plan.cfg, recipe, **rounding)
        return params, _in_bf16(packed)

    def stored(self, arm: str, packed: Any) -> checkpoint.Nested:
        """Saves one nested checkpoint, and opens it."""
        provenance = {"arm": arm, "calibration": dict(self.inputs.provenance)}
        checkpoint.save_nested(
            self._path(arm),
            packed,
            self.plan.cfg,
            budgets=self.counts,
            provenance=provenance,
            overwrite=True,
        )
        return ej.open_nested(self._path(arm))

    def _path(self, arm: str) -> pathlib.Path:
        return self.workdir.path / "quantized" / f"{arm}-{self.seed}"

    def _errors(self, params: Any, packed: Any) -> list[dict[str, Any]]:
        """What rounding did to every parameter that it touched."""
        specs = ej.param_specs(self.plan.cfg)
        named = names(specs, self.plan.cfg)
        return [
            {
                "name": named[path],
                "block": path[1] if path[0] == "layers" else None,
                "format": format,
            }
            | dict(zip(NUMBERS, numbers, strict=True))
            for path, format, *numbers in quantization_errors(params, packed, specs)
        ]

    def _trained(self, arm: str, rounding: Mapping[str, Any]) -> Any:
        plan, way, stage = self.plan, ARMS[arm][1], self.plan.quantized_stage
        asked = plan.values["quantization"]
        quantized = QuantizedTraining(
            plan.recipes[arm],
            scales=asked["scales"],
            teacher=asked["teacher"],
            loss=LOSSES[way],
        )
        scales = {k: v for k, v in rounding.items() if k != "frozen"}
        state, _ = training.run_stages(
            plan,
            self.workdir,
            f"{arm}-{self.seed}",
            (stage,),
            lambda stage, _: quantized_objective(
                self.elastic, stage, self.counts, quantized, **scales
            ),
            self.params,
            allow_changes=self.allow_changes,
            about={
                "arm": arm,
                "quantization": {k: asked[k] for k in asked if k != "seeds"},
                "start": fold.params_digest(self.params),
            },
        )
        return state.params


def _tables(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Arm -> the bytes that each choice of its recipe costs, of the whole parent."""
    specs = ej.param_specs(plan.cfg)
    return {arm: table(specs, plan.cfg, r) for arm, r in plan.recipes.items()}


def _in_bf16(params: Any) -> Any:
    """The tree with all that is not quantized in BF16."""
    packed = lambda leaf: isinstance(leaf, QuantArray)
    return jax.tree.map(
        lambda w: w if packed(w) else w.astype(jnp.bfloat16), params, is_leaf=packed
    )


def _alone_on_disk(path, budget: str) -> int:
    """Bytes of the submodel as a checkpoint of its own."""
    alone = path.with_name(f"{path.name}-{budget}")
    convert.slice_nested(path, alone, budget, overwrite=True)
    size = ej.open_nested(alone).size_bytes
    shutil.rmtree(alone)
    return size
