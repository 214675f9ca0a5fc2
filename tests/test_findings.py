"""Nobody wins by chance, a win is not missed, and gaps are said."""

import pytest

from elastic_jax import findings


def results(**parts):
    budget = {"name": "mid", "active_params": 100, "counts": {"embed": 32}}
    own = {k: parts.pop(k) for k in ("value", "random_values") if k in parts}
    return {
        "title": "t",
        "measure": "exact answers",
        "budgets": [budget | own],
        **parts,
    }


def answers(ours, seeds, problems=512):
    given = results(value=ours, random_values=seeds, evaluation={"problems": problems})
    (row,) = findings.compare(given)
    return row


def bits(ours, *seeds):
    given = results(value=ours, random_values=seeds, measure="bits per byte")
    (row,) = findings.compare(given)
    return row


def divergence(ours, *seeds, at="50"):
    runs = {"main": {"mid": {at: ours}}}
    runs |= {f"random-{i}": {"mid": {at: kl}} for i, kl in enumerate(seeds)}
    (row,) = findings.compare(results(divergence=runs))
    return row


def test_a_clear_difference_wins_on_either_side():
    assert answers(0.9, [0.7])["winner"] == "ours"
    assert answers(0.7, [0.9])["winner"] == "random"
    assert divergence(0.1, 0.2)["winner"] == "ours"
    assert divergence(0.2, 0.1)["winner"] == "random"
    assert bits(2.0, 2.1)["winner"] == "ours"
    assert bits(2.1, 2.0)["winner"] == "random"


def test_the_margin_is_the_difference():
    assert answers(0.9, [0.7])["margin"] == "20.0 points"
    assert divergence(0.1, 0.2)["margin"] == "50%"
    assert bits(2.1, 2.0)["margin"] == "0.100 (5.0%)"


def test_latency_is_shown_with_its_error_where_budgets_are_of_it():
    assert findings.latency(results()) == []
    asked = {"phase": "answer", "batch": 2, "prompt": 16, "new_tokens": 8}
    row = {"name": "mid", "predicted": 0.0011, "measured": 0.001}
    found = {**asked, "device": "an abacus", "budgets": [row]}
    text = "\n".join(findings.latency(results(latency=found)))
    for said in ("16 tokens and 8 more, batch 2, on an abacus", "1.1 ms", "+10.0%"):
        assert said in text


def test_accuracy_within_the_sampling_error_is_no_win():
    assert answers(0.90, [0.88])["winner"] is None
    assert answers(0.90, [0.88], problems=50_000)["winner"] == "ours"


def test_accuracy_needs_the_number_of_problems():
    assert answers(0.9, [0.1], problems=None)["winner"] is None


@pytest.mark.parametrize("ours, seed", [(0.100, 0.104), (0.0005, 0.0009), (0.0, 0.0)])
def test_nearly_equal_divergences_are_no_win(ours, seed):
    assert divergence(ours, seed)["winner"] is None


def test_nearly_equal_bits_are_no_win():
    assert bits(2.0, 2.015)["winner"] is None
    assert bits(2.0, 2.1, 1.99)["winner"] is None


def test_a_win_has_to_beat_every_seed():
    assert divergence(0.1, 0.2, 0.3, 0.4)["winner"] == "ours"
    assert divergence(0.1, 0.09, 0.3, 0.4)["winner"] is None
    assert answers(0.8, [0.5, 0.6, 0.81])["winner"] is None


def test_a_measure_of_one_side_only_is_not_compared():
    assert findings.compare(results(value=0.9)) == []
    assert findings.compare(results(value=0.9, random_values=[])) == []
    runs = {"main": {"mid": {"50": 0.1}}, "random-0": {"mid": {"100": 0.2}}}
    assert findings.compare(results(divergence=runs)) == []


def test_the_words_name_winner_and_margin():
    runs = {"main": {"mid": {"end": 0.1}}, "random-0": {"mid": {"end": 0.2}}}
    text = "\n".join(findings.against_random(results(divergence=runs)))
    assert "KL at the end: ours wins at `mid` by 50%." in text
    assert "Not measured on both sides: exact answers, KL after 50 steps" in text
    runs["main"]["mid"]["end"] = 0.2
    text = "\n".join(findings.against_random(results(divergence=runs)))
    assert "wins 0 of 1" in text and "too close to call at `mid`" in text


def test_a_lost_comparison_is_told():
    runs = {"main": {"mid": {"end": 0.2}}, "random-0": {"mid": {"end": 0.1}}}
    text = "\n".join(findings.against_random(results(divergence=runs)))
    assert "random wins at `mid` by 50%" in text and "loses 1" in text


@pytest.mark.parametrize(
    "ours, phrase",
    [
        (0.5, findings.BELOW_ALL),
        (1.5, findings.BELOW_MEAN),
        (2.5, findings.NOT_BELOW),
    ],
)
def test_untrained_slices_are_placed_among_random_orders(ours, phrase):
    row = {"axis": "embed", "kept": 1, "full": 2, "ours": ours, "random": [1, 2, 3]}
    text = "\n".join(findings.importance(results(orders=[row]), "", ""))
    assert f"{phrase}: `embed`." in text
    others = {findings.BELOW_ALL, findings.BELOW_MEAN, findings.NOT_BELOW} - {phrase}
    assert not any(f"{other}:" in text for other in others)


def test_counts_of_blocks_are_told_apart_from_one_count():
    given = results()
    given["budgets"][0]["counts"] = {"ffn": [32, 16], "layers": [1, 0, 1], "embed": 64}
    table = findings.router(given, "")[1]
    assert "32/16" in table and "2 of 3" in table and " 64 " in table


def test_a_part_nobody_shows_is_named():
    assert "later" in findings.times(results(later=1))[-1]


def test_a_floor_of_zero_is_said():
    text = findings.head(results(parent={"value": 0.1, "floor": 0}))[-1]
    assert "floor is 0.0%: any parent" in text


@pytest.mark.parametrize(
    "measure, floor, value, words",
    [
        ("exact answers", 0.95, 0.9, ("90.0% exact answers", "under 95.0% the run")),
        ("bits per byte", 3.5, 3.0, ("3.000 bits per byte", "over 3.500 the run")),
    ],
)
def test_the_parent_is_told_in_the_measure_of_the_run(measure, floor, value, words):
    given = results(measure=measure, parent={"value": value, "floor": floor})
    assert all(said in findings.head(given)[-1] for said in words)


@pytest.mark.parametrize(
    "measure, parent, full, words",
    [
        ("exact answers", 0.90, 0.91, "1.0 points better than"),
        ("exact answers", 0.90, 0.89, "1.0 points worse than"),
        ("bits per byte", 2.0, 1.9, "0.100 (5.0%) better than"),
        ("bits per byte", 2.0, 2.1, "0.100 (5.0%) worse than"),
        ("bits per byte", 2.0, 2.0001, "level with"),
    ],
)
def test_better_and_worse_follow_the_measure(measure, parent, full, words):
    given = results(measure=measure, parent={"value": parent}, value=full)
    assert f"`mid` ends {words} the parent" in findings.head(given)[-1]


def test_an_imported_parent_is_named():
    given = results(parent={"value": 0.5, "imported": "some/where"})
    assert "imported from `some/where`, has 50.0%" in findings.head(given)[-1]
    assert not any("parent's losses" in part for part in findings.training(given, ""))
    assert any("parent's losses" in p for p in findings.training(results(), ""))


def test_experts_that_no_token_reached_are_listed():
    text = "\n".join(findings.importance(results(never_routed={"1": [3, 5]}), "", ""))
    assert "Block 1: no token reached expert 3 and expert 5." in text
