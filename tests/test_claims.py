"""What each claim finds in rows whose truth is known."""

import random

import pytest

from elastic_jax import claims

EVALUATION = {"problems": 1400, "min_steps": 2, "max_steps": 8}
PROBLEMS = range(EVALUATION["problems"])


def steps_of(problem):
    return 2 + problem % 7


def row(arm, seed, found):
    return {"arm": arm, "seed": seed, "evaluation": EVALUATION, "found": found}


def answers(shares, seed=0, **more):
    """Budgets that answer each problem with the share of its steps."""
    draw = random.Random(f"{shares} {seed}")
    found = {}
    for budget, share in shares.items():
        of = share if callable(share) else lambda n, share=share: share
        marks = [draw.random() < of(steps_of(i)) for i in PROBLEMS]
        found[budget] = {"right": "".join("01"[m] for m in marks)} | more
    return {"budgets": found}


def verdicts_of(name, rows):
    return {f.what: f.verdict for f in claims.CLAIMS[name].findings(rows)}


def only(found, part):
    (verdict,) = (v for what, v in found.items() if part in what)
    return verdict


@pytest.mark.parametrize("true", [True, False])
def test_nested(true):
    rows = []
    for seed in range(3):
        rows.append(row("parent", seed, answers({"full": 0.99}, seed)))
        full = 0.99 if true else 0.8
        shares = {"full": full, "mid": 0.9, "small": 0.9}
        work = 36.0 if true else 38.0
        rows.append(row("nested", seed, answers(shares, seed) | {"work": work}))
        shares["small"] = 0.4 if true else 0.85
        third = answers(shares, seed) | {"work": 1.0}
        rows.append(row("separate, a third", seed, third))
        whole = answers(shares, seed) | {"work": 100.0}
        rows.append(row("separate, all", seed, whole))
    # The parent's problems are the full model's, so they agree one by one.
    if true:
        for each in rows:
            each["found"]["budgets"]["full"]["right"] = "1" * len(PROBLEMS)
    found = verdicts_of("nested", rows)
    expected = "shown" if true else "refuted"
    assert only(found, "minus separate, a third") == expected
    assert only(found, "its parent") == expected
    assert only(found, "training work of nested") == expected
    assert only(found, "separate, all, at") == "measured only"


def choices(ratio, counts_late, deadline=20):
    steps = [
        {
            "step": step,
            "counts": {"small": {"embed": 48.0 if step > 12 else counts_late}},
            "cost_over_target": {"full": 1.0, "small": ratio if step < 20 else 1.02},
        }
        for step in (5, 10, 12, 20)
    ]
    return {
        "total_steps": 20,
        "deadline": deadline,
        "targets": {"full": 1.0, "small": 0.4},
        "steps": steps,
    }


@pytest.mark.parametrize(
    "made, zone, ordered, stayed",
    [
        (choices(1.5, 64.0), "shown", "shown", "refuted"),
        (choices(1.5, 48.0), "shown", "shown", "shown"),
        (choices(1.5, 48.0, deadline=12), "refuted", "shown", "shown"),
        (choices(2.5, 48.0, deadline=12), "refuted", "refuted", "shown"),
    ],
)
def test_router(made, zone, ordered, stayed):
    shares = {"full": 1.0, "small": 0.8}
    rows = [
        row("learned", seed, answers(shares, seed) | {"choices": made})
        for seed in range(2)
    ]
    worse = {"full": 1.0, "small": 0.3}
    rows += [row("narrow", seed, answers(worse, seed)) for seed in range(2)]
    rows += [row("thin", seed, answers(shares, 7 + seed)) for seed in range(2)]
    each = list(claims.CLAIMS["router"].findings(rows))
    found = {f.what: f.verdict for f in each}
    assert only(found, "in its zone") == zone
    assert only(found, "ordered") == ordered
    assert only(found, "stayed") == stayed
    best = next(f for f in each if "best fixed" in f.what)
    mean = next(f for f in each if "mean of 2" in f.what)
    assert "`thin`" in best.what and abs(best.found.value) < 0.1
    assert 0.15 < mean.found.value < 0.35


def test_stages_look_at_the_longest_third():
    long = lambda share: lambda n: share if n >= 7 else 0.95
    rows = []
    for seed in range(3):
        for arm, share in (("short", 0.1), ("more", 0.1), ("uniform", 0.9)):
            shares = dict.fromkeys(("full", "mid", "small"), long(share))
            rows.append(row(arm, seed, answers(shares, f"{arm} {seed}")))
        shares = dict.fromkeys(("full", "mid", "small"), long(0.5))
        rows.append(row("weighted", seed, answers(shares, f"weighted {seed}")))
    each = list(claims.CLAIMS["stages"].findings(rows))
    asked = [f for f in each if f.asked is not None]
    assert [f.verdict for f in asked] == ["shown"] * 3
    assert all("7 to 8 steps" in f.what for f in each)
    weighted = [f for f in each if "weighted minus uniform" in f.what]
    assert all(-0.6 < f.found.value < -0.2 for f in weighted)
    cells = {(c.group, c.series): c for c in claims.CLAIMS["stages"].cells(rows)}
    assert cells["small, shorter", "short"].found.value > 0.9
    assert cells["small, 7 to 8 steps", "short"].found.value < 0.25


def test_quantization_looks_at_the_longest_problems_too():
    long = lambda share: lambda n: share if n >= 7 else 1.0
    shares = {"bf16": (1.0, 1.0), "fp8_ptq": (1.0, 1.0), "nvfp4_ptq": (0.7, 0.4)}
    shares |= {"nvfp4_qad": (1.0, 0.9), "nvfp4_qat": (0.8, 0.5)}
    shares = {arm: tuple(map(long, each)) for arm, each in shares.items()}
    rows = [
        row(arm, seed, answers(dict(zip(("full", "small"), each, strict=True)), seed))
        for arm, each in shares.items()
        for seed in range(3)
    ]
    found = verdicts_of("quantization", rows)
    assert only(found, "FP8 PTQ") == "shown" and only(found, "NVFP4 PTQ") == "shown"
    assert only(found, "NVFP4 QAD /") == "shown" and only(found, "closed") == "shown"
    assert only(found, "QAT") == "measured only"


@pytest.mark.parametrize("after, verdict", [(0.9, "shown"), (0.4, "refuted")])
def test_control(after, verdict):
    rows = []
    ways = [("full", "full", "own cache"), ("small", "small", "own cache")]
    ways += [("small", "full", how) for how in ("reprefill", "transplant")]
    for seed in range(3):
        for think, answer, how in ways:
            made = []
            for stage in ("long", "mixed"):
                share = after if (how, stage) == ("transplant", "mixed") else 0.9
                draw = random.Random(f"{seed} {stage}")  # the same draws for all ways
                right = "".join("01"[draw.random() < share] for _ in PROBLEMS)
                made.append(
                    {
                        "stage": stage,
                        "think": think,
                        "answer": answer,
                        "hand_over": how,
                        "cap": 31,
                        "right": right,
                        "seconds": 1.0 if stage == "mixed" else None,
                        "work": 1.0 if think == "full" else 0.5,
                        "thought_tokens": 9.0,
                        "answer_tokens": 4.0,
                        "capped": 0.0,
                    }
                )
            found = {"large": "full", "small": "small", "rows": made}
            rows.append(row(f"{think} {answer} {how}", seed, found))
    # A seed whose arms are not all there does not count.
    rows.append(row("full full own cache", 3, rows[0]["found"]))
    found = verdicts_of("control", [r for r in rows if r["seed"] < 3])
    assert found == verdicts_of("control", rows)
    part = "S->L by transplant minus by reading again, after `mixed`"
    assert only(found, part) == verdict
    assert only(found, part.replace("mixed", "long")) == "measured only"


def test_experts_depth_and_memory():
    rows = [
        row(
            f"balanced: {order}",
            seed,
            {w: {"kl": kl} for w in ("untrained", "trained")},
        )
        for order, kl in (("reap", 0.1), ("reversed", 0.9), ("random", 0.5))
        for seed in range(3)
    ]
    rows[-1]["found"]["untrained"]["kl"] = 0.6
    each = {f.what: f for f in claims.CLAIMS["experts"].findings(rows)}
    better = each["KL of random orders minus that of reap, untrained, balanced"]
    assert better.found.value == pytest.approx(0.5333 - 0.1, abs=1e-3)
    assert 0 < better.found.half < 0.2 and better.verdict == "measured only"
    assert (
        each["KL of random orders minus that of mass, trained, balanced"].found is None
    )

    rows = [
        row(f"deep: {kind}", seed, answers({"small": share}, seed))
        for kind, share in (("depth", 0.9), ("width, equal total", 0.5))
        for seed in range(2)
    ]
    (total, active) = claims.CLAIMS["depth"].findings(rows)
    assert total.found.value < -0.3 and active.found is None

    sizes = {"nested": {"bf16": 60 * 2**30}, "separate": {"a": 60 * 2**30, "b": 2**32}}
    again = sizes | {"nested": {"bf16": 61 * 2**30}}
    rows = [row("toy", 0, sizes), row("toy", 1, again)]
    rows += [row("Nemotron 3 Nano", 0, sizes)]
    said = {f.what: f.said for f in claims.CLAIMS["memory"].findings(rows)}
    assert said["toy: one nested checkpoint / 2 separate ones, BF16"] == "0.945 ± 0.099"
    assert [s for w, s in said.items() if "58.9" in w] == ["60.00 GiB"]


def test_between_is_measured_against_the_line():
    def one(params, share, seed):
        found = answers({"x": share}, seed)["budgets"]["x"]
        value = found["right"].count("1") / len(PROBLEMS)
        return found | {"active_params": params, "value": value}

    rows = []
    for seed in range(3):
        trained = {"full": one(100, 1.0, seed), "small": one(50, 0.0, seed)}
        others = {f"size {n}": one(n, 0.2, seed) for n in range(60, 92, 2)}
        rows.append(row("between", seed, {"budgets": trained, "between": others}))
    for each in rows:
        each["found"]["between"]["size 60"]["from_router"] = True
    many, apart, own = claims.CLAIMS["between"].findings(rows)
    assert own.found.value == pytest.approx(0.2 - 0.2, abs=0.05)
    assert many.verdict == "shown" and many.found.value == 16
    assert apart.found.value == pytest.approx(0.2 - 0.5, abs=0.03)
    few = [row("between", 0, rows[0]["found"] | {"between": {"a": one(70, 0.5, 0)}})]
    assert next(claims.CLAIMS["between"].findings(few)).verdict == "refuted"
    line = {
        c.at: c.found.value
        for c in claims.CLAIMS["between"].cells(rows)
        if c.series == "the line"
    }
    assert line[0.6] == pytest.approx(0.2) and line[0.9] == pytest.approx(0.8)
