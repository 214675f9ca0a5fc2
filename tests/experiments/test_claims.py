"""Claims: every one is a plan, one runs from end to end, the arms are what they say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax as ej
from elastic_jax import fit, train, verdicts
from elastic_jax.claims import CLAIMS
from elastic_jax.curriculum import Stage
from elastic_jax.elastic import settled_counts
from experiments import claims, evaluation, training
from experiments.arms import balance, between, depth, memory, nested, router
from experiments.arms.start import Start, reweighted


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in which two claims that share their models ran at smoke size."""
    folder = tmp_path_factory.mktemp("claims")
    claims.main(["--claim=between", "--smoke", f"--workdir={folder}"])
    return folder


def test_the_readme_has_the_table_of_the_committed_lines():
    readme = claims.README.read_text()
    assert claims.with_table(readme, claims.COMMITTED) == readme
    for line in readme.split(claims.TABLE[0])[1].split(claims.TABLE[1])[0].split("\n"):
        assert not line.startswith("| [") or "](experiments/RESULTS.md#" in line


def lines(root, claim):
    text = (root / "results" / f"{claim}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_a_plan(claim, smoke):
    plan = claims.plan(claim, smoke=smoke)
    assert plan.values["claim"]["seeds"] >= (2 if smoke else 3)
    assert plan.stages[0].router == "train"
    if not smoke:
        problems = plan.task.evaluation["problems"]
        assert problems >= 256


def test_a_claim_runs_and_is_not_run_again(root, capsys):
    rows = lines(root, "between")
    assert [(r["arm"], r["seed"]) for r in rows] == [("between", 0), ("between", 1)]
    for row in rows:
        found = row["found"]
        assert list(found["budgets"]) == ["full", "small"]
        costs = [each["active_params"] for each in found["between"].values()]
        assert (
            len(costs) == 2 and max(costs) < found["budgets"]["full"]["active_params"]
        )
        assert len(found["budgets"]["small"]["right"]) == row["evaluation"]["problems"]
    page = root / "RESULTS.md"
    before = page.read_text(), (root / "results" / "between.jsonl").read_text()
    page.unlink()
    claims.main(["--claim=between", "--smoke", f"--workdir={root}"])
    assert before == (
        page.read_text(),
        (root / "results" / "between.jsonl").read_text(),
    )
    page.unlink()
    claims.main(["--report", f"--results={root / 'results'}"])
    assert page.read_text() == before[0]
    assert "seed 0" not in capsys.readouterr().out


def test_every_seed_has_a_parent_of_its_own_where_the_claim_says_so(root):
    assert len([*(root / "parents").iterdir()]) == 2
    for claim, own in {"nested": 1, "depth": 1, "experts": 0}.items():
        second = Start(claims.plan(claim), root, claim).of_seed(1)
        each = second, second.of_pattern("ME"), second.balanced()
        assert [start.parent_seed for start in each] == [own] * 3


def test_programs_of_a_claim_are_given_back(root):
    """All claims in one process would compile more than it may map."""
    program = jax.jit(lambda x: x + 1)
    program(1)
    assert program._cache_size() == 1
    claims.main(["--claim=between", "--smoke", f"--workdir={root}"])
    assert program._cache_size() == 0


def test_a_missing_line_is_measured_from_what_was_trained(root):
    path = root / "results" / "between.jsonl"
    whole = path.read_text()
    path.write_text(whole.splitlines(keepends=True)[1])
    saves = (root / "trained" / "nested" / "nested-0").glob("step_*/**/*")
    made = {p: p.stat().st_mtime_ns for p in saves if p.is_file()}
    claims.main(["--claim=between", "--smoke", f"--workdir={root}"])
    again = {row["seed"]: row["found"] for row in lines(root, "between")}
    assert again == {r["seed"]: r["found"] for r in map(json.loads, whole.splitlines())}
    assert made and made == {p: p.stat().st_mtime_ns for p in made}


def test_lines_of_another_configuration_are_refused(root):
    with pytest.raises(ValueError, match=r"(?s)2 of 2 lines.*config.smoke: was True"):
        claims.run("between", claims.plan("between"), root, root / "results")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--claim=nestd", "--workdir=x"], "invalid choice: 'nestd'"),
        (["--claim=nested"], "give --workdir=DIR"),
        (["--report"], "--report --results=FOLDER"),
        (["--workdir=x", "--sedes=3"], "unknown --sedes=3"),
    ],
)
def test_a_wrong_command_is_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        claims.main(arguments)


def test_what_takes_no_training_is_measured(tmp_path):
    """Against counts by hand, and files on disk."""
    start = Start(claims.plan("memory", smoke=True), tmp_path, "memory")
    found = dict(memory.rows(start, 0, memory.arms(start, 0)))
    nano, toy = found["Nemotron 3 Nano"], found["toy"]
    assert nano["nested"]["bf16"] == 2 * 31_577_940_288
    assert f"{sum(nano['separate'].values()) / 2**30:.1f}" == "126.1"
    arrays = ej.open_nested(start.workdir.path / "nested").size_bytes
    assert arrays < toy["nested"]["bf16"] < 1.1 * arrays  # and metadata
    assert toy["nested"]["bf16"] < 1.05 * toy["separate"]["full"]


# ----------------------------------------------------------------------------- arms


def test_sizes_lie_between_neighbours_and_are_new(tmp_path):
    start = Start(claims.plan("between"), tmp_path, "between")
    answered, filled = between.sizes_between(start, 16)
    sizes, trained = answered + filled, list(start.counts.values())
    assert 4 <= len(answered) < 16
    assert between.sizes_between(start, 4)[1] == []
    assert len({tuple(sorted(c.items())) for c in sizes}) == 16
    cost = lambda c: ej.cost(start.specs, start.plan.cfg, counts=c).active_params
    costs = sorted(map(cost, trained))
    assert all(costs[0] < cost(c) < costs[-1] for c in sizes)
    for counts in sizes:
        assert counts not in trained
        assert any(
            all(
                min(low[axis], high[axis]) <= n <= max(low[axis], high[axis])
                for axis, n in counts.items()
            )
            for high, low in zip(trained, trained[1:], strict=False)
        )
    with pytest.raises(ValueError, match="claim.sizes: 100000 sizes"):
        between.sizes_between(start, 100_000)


def test_fixed_shapes_cost_what_the_budgets_ask(tmp_path):
    start = Start(claims.plan("router"), tmp_path, "router")
    for arm, pair in start.asked["pairs"].items():
        for name, budget in start.plan.budgets[1:]:
            sizes = dict(zip(start.asked["axes"], pair[name], strict=True))
            counts = ej.counts(start.plan.cfg, **sizes)
            share = budget.ratio(start.specs, None, start.plan.cfg, counts=counts)
            assert abs(share - 1) <= 0.05, (arm, name)
    assert set(router.arms(start, 0)) == {
        "learned",
        "random order",
        *start.asked["pairs"],
    }


def test_narrower_models_are_as_large_as_shallower_ones(tmp_path):
    start = Start(claims.plan("depth"), tmp_path, "depth")
    for pattern, kept in (("MEM*ME", 4), ("MEM*MEME", 5)):
        this = start.of_pattern(pattern)
        ranks = ej.rank({"layers": np.arange(len(pattern), 0.0, -1)})
        fewer = ej.counts(this.plan.cfg, layers=ej.keep_layers(ranks, kept))
        for measure in ("total_params", "active_params"):
            counts = depth.narrowed(this, fewer, measure)
            sizes = (
                getattr(ej.cost(this.specs, this.plan.cfg, counts=c), measure)
                for c in (counts, fewer)
            )
            assert next(sizes) == pytest.approx(next(sizes), rel=0.05)
            assert "layers" not in counts


def test_a_nested_run_takes_a_third_of_the_work_of_separate_ones(tmp_path):
    start = Start(claims.plan("nested"), tmp_path, "nested")
    stages, names = start.plan.stages, list(start.counts)
    together = nested.training_work(start, stages, [(1 / 3, name) for name in names])
    apart = [nested.training_work(start, stages, [(1.0, name)]) for name in names]
    assert together == pytest.approx(sum(apart) / 3)
    (short,) = reweighted(stages, (0.0, 0.0, 1.0), 1 / 3)
    assert short.total_steps == stages[0].total_steps // 3
    assert short.sampling == (0.0, 0.0, 1.0)
    third = nested.training_work(start, [short], [(1.0, names[-1])])
    assert third == pytest.approx(apart[-1] / 3)


def test_balancing_moves_tokens_to_idle_experts():
    """A parent that sends all tokens to few experts, before and after some steps."""
    plan = claims.plan("experts", smoke=True)
    cfg = plan.cfg
    stage = Stage(
        name="parent", context=96, batch=4, micro_batch=4, learning_rate=0.02, steps=40
    )
    batches = evaluation.calibration_batches(plan, 4)
    rows = {k: v[:4] for k, v in batches[0].items()}
    params = jax.jit(ej.init_params, static_argnums=1)(jax.random.key(0), cfg)
    bias = jnp.where(jnp.arange(cfg.experts) < 2, 0.5, 0.0)
    layers = tuple(
        layer | {"router_bias": bias} if "router_bias" in layer else layer
        for layer in params["layers"]
    )
    params = params | {"layers": layers}
    optimizer = train.optimizer(ej.param_specs(cfg))
    state = train.init_state(params, optimizer)
    objective = balance.balanced_objective(cfg, stage)
    seen = lambda params: balance.loads(
        params, rows["tokens"], rows["segment_ids"], cfg
    )
    (before,) = seen(state.params).values()
    assert float(before[:2].sum()) > 0.7 and float(before.sum()) == pytest.approx(1)
    rates = {"rate/params": 0.02, "rate/router": 0.0}
    for step in range(stage.steps):
        gradients, _ = objective.gradients(state, rows, step)
        state, _ = train.update(optimizer, state, gradients, rates, True)
    (after,) = seen(state.params).values()
    assert float(after.max()) < 0.5 * float(before.max())


def test_choices_are_read_from_what_training_logged(tmp_path):
    start = Start(claims.plan("router", smoke=True), tmp_path, "router")
    folder = start.workdir.path / "learned-0"
    log = fit.MetricLog(folder / "metrics")
    for step in (1, 2):
        log.write(
            step,
            {"step": step, "stage": "short", "loss": 1.0}
            | {f"{name}/cost_over_target": 1.0 for name, _ in start.plan.budgets}
            | {f"{name}/embed/count": 96.0 for name, _ in start.plan.budgets},
        )
    log.write(3, {"step": 3, "stage": "long", "loss": 1.0})
    found = router.choices(start, "learned-0")
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["steps"][0]["counts"]["small"] == {"embed": 96.0}
    assert found["targets"]["small"] == 0.58 and found["total_steps"] == 3
    assert verdicts.exactly(None) is None


def test_a_router_that_misses_its_budgets_is_a_result(tmp_path, monkeypatch):
    """It keeps its choices; what needs no router is measured all the same."""
    start = Start(claims.plan("router"), tmp_path, "router")
    elastic = training.elastic_parent(start.plan, None)
    undecided = training.first_router(start.plan, elastic, 0)

    def trained(self, arm, seed, *, counts=None, teacher=None):
        return arm, counts or settled_counts(elastic, undecided)

    monkeypatch.setattr(Start, "train", trained)
    monkeypatch.setattr(Start, "each", lambda _, params, counts: dict(counts))
    monkeypatch.setattr(router, "choices", lambda *_: {"steps": []})
    arms = router.arms(start, 0)
    found = dict(router.rows(start, 0, arms))
    assert set(found) == set(arms)
    for arm in start.asked["pairs"]:
        assert set(found[arm]["budgets"]) == {"full", "mid", "small"}
    missed = found["learned"].pop("missed")
    assert missed.startswith("the router missed its budgets")
    assert found["learned"] == {"choices": {"steps": []}}
    assert found["random order"] == {"missed": missed}

    def broken(*_, **__):
        raise ValueError("something else")

    monkeypatch.setattr(Start, "train", broken)
    with pytest.raises(ValueError, match="something else"):
        list(router.rows(start, 0, arms))
