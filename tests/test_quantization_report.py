"""The report on quantization says what the numbers say, and no more."""

import pytest

from elastic_jax.quantization_report import (
    kept,
    recovered,
    write_quantization_report,
)

VALUES = {  # arm -> budget -> a value per seed
    "bf16": {"full": (0.98, 0.96), "small": (0.90, 0.90)},
    "fp8_ptq": {"full": (0.98, 0.96), "small": (0.90, 0.88)},
    "nvfp4_ptq": {"full": (0.88, 0.86), "small": (0.60, 0.50)},
    "nvfp4_qad": {"full": (0.97, 0.95), "small": (0.80, 0.85)},
    "nvfp4_qat": {"full": (0.90, 0.96), "small": (0.60, 0.55)},
}


@pytest.fixture
def results():
    def row(arm, budget, seed):
        value = VALUES[arm][budget][seed]
        error = {"name": "moe/up", "relative": 0.09, "worst": 0.1, "saturated": 0.0}
        return {
            "arm": arm,
            "budget": budget,
            "value": value,
            "kl": 1 - value,
            "parts": {"2 steps": 1.0, "8 steps": value},
            "memory_bytes": 2048 if arm == "bf16" else 1024,
            "disk_bytes": 4096,
            "nested_disk_bytes": 8192,
            "errors": [] if arm == "bf16" else [error | dict(zeroed=0, dead_blocks=0)],
        }

    table = {"kind": "moe", "parameter": "up", "format": "nvfp4", "parameters": 9}
    return {
        "arms": list(VALUES),
        "budgets": ["full", "small"],
        "seeds": {
            str(seed): [row(arm, b, seed) for arm in VALUES for b in ("full", "small")]
            for seed in (0, 1)
        },
        "evaluation": {"problems": 512, "min_steps": 2, "max_steps": 8},
        "rounded": "weights and activations",
        "everything": True,
        "steps": 100,
        "table": {arm: [table | {"bytes": 5}] for arm in VALUES if arm != "bf16"},
    }


def test_shares_are_taken_within_a_seed(results):
    assert kept(results, "nvfp4_qat", "full") == [0.90 / 0.98, 1.0]
    lost = (0.90 - (0.825)) / (0.90 - 0.55)
    assert recovered(results, "nvfp4_qad", "small") == pytest.approx(1 - lost)
    assert recovered(results, "fp8_ptq", "full") is None  # nothing was lost
    for row in results["seeds"]["1"]:
        row["value"] *= row["arm"] != "bf16"
    assert kept(results, "nvfp4_qat", "full") is None


def test_the_page(results, tmp_path):
    text = write_quantization_report(tmp_path, results).read_text()
    assert "NVFP4 PTQ keeps, of BF16, 89.7% (89.6% to 89.8%) at `full`" in text
    assert "(published for the 30B: 95.88%)" in text
    assert "NVFP4 QAD gives back 90% at `full` and 79% at `small`" in text
    assert "NVFP4 QAD against NVFP4 QAT: +3.0 points (-1.0 to +7.0) at `full`" in text
    assert "FP8 PTQ: 1.0 KiB in memory, 50% of BF16; all budgets" in text
    rows = [line for line in text.splitlines() if line.startswith("| small  |")]
    assert len(rows) == len(VALUES)
    assert "95.8% (94.4% to 97.2%)" not in text and "82.5% (80.0% to 85.0%)" in rows[3]
    assert "| small, NVFP4 QAD |  100.0% |   82.5% |" in text
    assert "| moe/up    |" in text and "9.0%" in text and "10.0%" in text
    assert (tmp_path / "quantization.png").stat().st_size > 10_000
    assert "smoke" not in text
    again = write_quantization_report(tmp_path, results | {"smoke": True}).read_text()
    assert "A smoke run" in again


def test_what_lost_nothing_is_not_said_to_be_recovered(results, tmp_path):
    for rows in results["seeds"].values():
        for row in rows:
            if row["budget"] == "full":
                row["value"] = 0.9
    text = write_quantization_report(tmp_path, results).read_text()
    assert "At `full` PTQ lost less than 0.5% of BF16: too little for NVFP4 QAD" in text


def test_results_that_lack_something(tmp_path):
    with pytest.raises(ValueError, match="lack arms, budgets, seeds"):
        write_quantization_report(tmp_path, {})
