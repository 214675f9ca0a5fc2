"""What a run found, in words and tables: the text of a report.

It reads the plain rows of one run, as `report.write_report` describes them. Two rules
shape it: what was not measured is said where it would have stood, and nobody is
called the winner where the difference could be chance.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from elastic_jax.measures import DIVERGENCE, MEASURES, Measure
from elastic_jax.tables import (
    bullets,
    format_bytes,
    format_count,
    format_nats,
    format_ratio,
    format_seconds,
    format_several,
    format_share,
    listed,
    markdown_table,
)

Results = Mapping[str, Any]

EXPECTED = ("KL after 50 steps", "KL after 100 steps", "KL at the end")
BELOW_ALL = "Ours is below every random order"
BELOW_MEAN = "Ours is below their mean, not below every one"
NOT_BELOW = "Ours is not below their mean"
SLICES = (
    "of slices that are read from the nested checkpoint. *Untrained* is the same slice "
    "of the permuted parent before training; *random order* was trained alike, at the "
    "same counts, from a parent permuted at random; *KL* is from the parent, in nats "
    "per token of held-out rows."
)
SHOWN = set(
    "title measure command date versions device smoke seconds parent budgets "
    "evaluation divergence orders importance never_routed router metrics "
    "parent_metrics alarms latency".split()
)


def compare(results: Results) -> list[dict[str, Any]]:
    """The main run against the same training from random orders.

    Returns:
      one row for every budget and measure that both have: `budget`, `measure`,
      `ours`, `random` (one value per seed), `winner`: "ours", "random" or None, and
      `margin`, the difference in words. A winner differs from all seeds in one
      direction, and from their mean by more than chance, as the measure has it.
    """
    controls, own = dict(results.get("divergence") or {}), measure(results).name
    main, rows = controls.pop("main", {}), []
    for budget in results["budgets"]:
        name = budget["name"]
        measured = {own: (budget.get("value"), budget.get("random_values"))}
        for at, nats in main.get(name, {}).items():
            seeds = [control.get(name, {}).get(at) for control in controls.values()]
            seeds = [value for value in seeds if value is not None]
            when = "at the end" if at == "end" else f"after {at} steps"
            measured[f"KL {when}"] = (nats, seeds)
        for label, (ours, seeds) in measured.items():
            if ours is None or not seeds:
                continue
            row = {"budget": name, "measure": label, "ours": ours, "random": seeds}
            rows.append(row | _verdict(row, results.get("evaluation") or {}))
    return rows


def measure(results: Results) -> Measure:
    """What the budgets of a run were judged by."""
    return MEASURES[results["measure"]]


def _of(row) -> Measure:
    """The measure of a comparison: the run's own, or a divergence."""
    return MEASURES.get(row["measure"], DIVERGENCE)


def _verdict(row, evaluation):
    """Who wins, and by how much."""
    ours, seeds, judge = row["ours"], row["random"], _of(row)
    mean = statistics.fmean(seeds)
    apart = all(seed < ours for seed in seeds) or all(seed > ours for seed in seeds)
    gain = judge.gain(ours, mean)
    clear = apart and abs(gain) > judge.chance(ours, seeds, evaluation)
    winner = "ours" if gain > 0 else "random"
    return {"winner": winner if clear else None, "margin": judge.margin(ours, mean)}


def head(results: Results) -> list[str]:
    """Title, origin and the findings in a few sentences."""
    parts = [f"# {results['title']}"]
    if results.get("smoke"):
        parts.append(
            "> A smoke run: it shows that everything works; its numbers mean little."
        )
    made = f"Made {results.get('date') or 'at an unknown date'}"
    made += f" on {results.get('device') or 'an unknown device'}"
    if results.get("seconds"):
        made += f" in {format_seconds(sum(results['seconds'].values()))}"
    versions = [f"{name} {v}" for name, v in (results.get("versions") or {}).items()]
    made += f", with {', '.join(versions) or 'unknown versions'}"
    command = results.get("command")
    parts.append(f"{made}, by" if command else f"{made}; the command is unknown.")
    if command:
        parts.append(f"```sh\n{command}\n```")
    return [*parts, bullets(_findings(results))]


def _findings(results):
    parent, (full, *smaller) = results.get("parent") or {}, results["budgets"]
    judge = measure(results)
    yield _parent(parent, judge)
    if None not in (parent.get("value"), full.get("value")):
        gain = judge.gain(full["value"], parent["value"])
        where = f"{judge.margin(full['value'], parent['value'])} "
        where += "better than" if gain > 0 else "worse than"
        if judge.form(full["value"]) == judge.form(parent["value"]):
            where = "level with"
        yield f"`{full['name']}` ends {where} the parent."
    for budget in smaller:
        if budget.get("value") is not None:
            share = budget["active_params"] / full["active_params"]
            yield (
                f"`{budget['name']}`, {share:.0%} of the active parameters: "
                f"{judge.form(budget['value'])} {judge.name}; the same slice "
                f"untrained: {judge.form(budget.get('untrained_value'))}."
            )
    yield _score(compare(results))
    alarms = (results.get("alarms") or {}).items()
    if alarms:
        yield f"Alarms: {listed(f'`{cause}` {n} times' for cause, n in alarms)}."


def _parent(parent, judge):
    if parent.get("value") is None:
        return "*The parent was not evaluated.*"
    text = "The parent"
    if "imported" in parent:
        text += f", imported from `{parent['imported']}`,"
    text += f" has {judge.form(parent['value'])} {judge.name}"
    if "steps" in parent:
        text += f" after {format_count(parent['steps'])} steps"
    limits = []
    if parent.get("target") is not None:
        limits.append(f"training stops at {judge.form(parent['target'])}")
    if (floor := parent.get("floor")) is not None:
        worse = "under" if judge.higher_is_better else "over"
        limits.append(
            f"its floor is {judge.form(floor)}: any parent is accepted"
            if floor == judge.worst
            else f"{worse} {judge.form(floor)} the run fails"
        )
    return f"{text} ({'; '.join(limits)})." if limits else f"{text}."


def _score(rows):
    if not rows:
        return "*No control from a random order was measured: no win can be claimed.*"
    ours, random, close = (
        sum(row["winner"] == who for row in rows) for who in ("ours", "random", None)
    )
    return (
        f"Against the same training from a random order, ours wins {ours} of "
        f"{len(rows)} comparisons and loses {random}; too close to call: {close}."
    )


def quality(results: Results, picture: str) -> list[str]:
    """Every budget: what it costs, and how good it is."""
    budgets, judge = results["budgets"], measure(results)
    columns = {
        "budget": lambda b: b["name"],
        "active parameters": lambda b: format_count(b["active_params"]),
        "all parameters": lambda b: format_count(b.get("total_params")),
        "weights in bf16": lambda b: format_bytes(b.get("weight_bytes")),
        "target": lambda b: format_share(b.get("target")),
        "cost / target": lambda b: format_ratio(b.get("cost_over_target")),
        judge.name: lambda b: judge.form(b.get("value")),
        "untrained": lambda b: judge.form(b.get("untrained_value")),
        "random order": lambda b: format_several(b.get("random_values"), judge.form),
        "KL": lambda b: format_nats(b.get("kl")),
        "KL untrained": lambda b: format_nats(b.get("untrained_kl")),
    }
    how = judge.method(results.get("evaluation") or {})
    heading = judge.name[0].upper() + judge.name[1:]
    parts = [f"## {heading}", f"{how}, {SLICES}", picture]
    parts.append(markdown_table(budgets, columns))
    missing = [
        what
        for key, what in (
            ("value", "trained budgets"),
            ("untrained_value", "untrained slices"),
            ("random_values", "the control from a random order"),
            ("kl", "the KL of restored slices"),
        )
        if all(budget.get(key) in (None, []) for budget in budgets)
    ]
    if missing:
        parts.append(f"*Not measured: {listed(missing)}.*")
    names = dict.fromkeys(name for b in budgets for name in b.get("parts") or {})
    if all(budget.get("parts") is None for budget in budgets):
        parts.append(f"*{heading} by {judge.parts} were not recorded.*")
    if not names:
        return parts
    columns = {judge.name: lambda b: b["name"]}
    part = lambda budget, name: (budget.get("parts") or {}).get(name)
    for name in names:
        columns[name] = lambda b, name=name: judge.form(part(b, name))
    return [*parts, f"By {judge.parts}:", markdown_table(budgets, columns)]


def against_random(results: Results) -> list[str]:
    """Who wins by how much against the same training from a random order."""
    rows = compare(results)
    parts = ["## Who wins: importance order or random order", _score(rows)]
    if not rows:
        return parts
    seeds, evaluation = max(len(r["random"]) for r in rows), results.get("evaluation")
    rules = (judge.rule(evaluation or {}) for judge in (measure(results), DIVERGENCE))
    parts.append(
        f"Too close to call are differences up to {listed(rules)}. "
        + (
            "The control was run with one seed: how seeds differ is not known."
            if seeds == 1
            else f"A winner also differs from each of {seeds} seeds."
        )
    )
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    parts.append(bullets(_winners(label, rows) for label in measures))
    expected = measure(results).name, *EXPECTED
    missing = [label for label in expected if label not in measures]
    if missing:
        parts.append(f"*Not measured on both sides: {listed(missing)}.*")
    columns = {
        "budget": lambda row: row["budget"],
        "measure": lambda row: row["measure"],
        "ours": lambda row: _of(row).form(row["ours"]),
        "random order": lambda row: format_several(row["random"], _of(row).form),
        "difference": lambda row: row["margin"],
        "winner": lambda row: row["winner"] or "too close",
    }
    return [*parts, markdown_table(rows, columns)]


def _winners(label, rows):
    """One measure in words."""
    found = {"ours wins at": [], "random wins at": [], "too close to call at": []}
    for row in rows:
        if row["measure"] == label and row["winner"]:
            by = f"`{row['budget']}` by {row['margin']}"
            found[f"{row['winner']} wins at"].append(by)
        elif row["measure"] == label:
            found["too close to call at"].append(f"`{row['budget']}`")
    said = (f"{what} {listed(where)}" for what, where in found.items() if where)
    return f"{label[0].upper()}{label[1:]}: {'; '.join(said)}."


def router(results: Results, picture: str) -> list[str]:
    """The counts of every budget, and the router's own checks."""
    columns = {"budget": lambda b: b["name"]}
    for axis in dict.fromkeys(axis for b in results["budgets"] for axis in b["counts"]):
        columns[axis] = lambda b, axis=axis: _kept(axis, b["counts"].get(axis, "full"))
    columns["cost / target"] = lambda b: format_ratio(b.get("cost_over_target"))
    parts = ["## What the router chose", markdown_table(results["budgets"], columns)]
    checks = results.get("router") or {}
    lines = [line for key in ("feasible", "accept") for line in checks.get(key) or ()]
    text = "```text\n" + "\n".join(lines) + "\n```"
    said = text if lines else "*The checks of the router were not recorded.*"
    return [*parts, picture, said]


def latency(results: Results) -> list[str]:
    """Seconds by the table against whole models, where budgets are of latency."""
    found = results.get("latency")
    if not found:
        return []
    kind = {
        "prefill": "a prefill of {prompt} tokens",
        "decode": "one token behind a cache for {prompt} + {new_tokens}",
        "answer": "a prompt of {prompt} tokens and {new_tokens} more",
    }[found["phase"]]
    milliseconds = lambda x: f"{1e3 * x:.3g} ms"
    columns = {
        "budget": lambda row: row["name"],
        "by the table": lambda row: milliseconds(row["predicted"]),
        "measured": lambda row: milliseconds(row["measured"]),
        "error": lambda row: f"{row['predicted'] / row['measured'] - 1:+.1%}",
    }
    what = f"{kind.format(**found)}, batch {found['batch']}, on {found['device']}"
    said = (
        f"Of {what}: the sum over blocks that the router learned from, and the slice "
        "that the checkpoint restores, timed whole."
    )
    return ["## Latency", said, markdown_table(found["budgets"], columns)]


def _kept(axis, count):
    """A count; where blocks differ, that of each, or how many blocks."""
    if not isinstance(count, list | tuple):
        return count
    if axis == "layers":
        return f"{sum(count)} of {len(count)}"
    return count[0] if len(set(count)) == 1 else "/".join(map(str, count))


def importance(results: Results, picture: str, orders_picture: str) -> list[str]:
    """Scores, experts never reached, and untrained slices on one axis."""
    parts = ["## Importance", picture]
    unreached = results.get("never_routed")
    if unreached is None:
        parts.append("*Experts that no token reached were not recorded.*")
    elif not any(unreached.values()):
        parts.append("Every expert was reached by some token.")
    for block, experts in (unreached or {}).items():
        if experts:
            names = listed(f"expert {expert}" for expert in experts)
            parts.append(f"Block {block}: no token reached {names}.")
    parts += ["### Untrained slices, one axis at a time", orders_picture]
    orders = results.get("orders")
    if not orders:
        return parts
    found = {BELOW_ALL: [], BELOW_MEAN: [], NOT_BELOW: []}
    for row in orders:
        below = row["ours"] < statistics.fmean(row["random"])
        where = BELOW_MEAN if below else NOT_BELOW
        where = BELOW_ALL if _beaten(row) == len(row["random"]) else where
        found[where].append(f"`{order_name(row)}`")
    said = (f"{what}: {listed(names)}." for what, names in found.items() if names)
    parts.append(bullets(said))
    columns = {
        "axis": order_name,
        "kept": lambda row: f"{row['kept']} of {row['full']}",
        "ours": lambda row: format_nats(row["ours"]),
        "random orders": lambda row: format_several(row["random"], format_nats),
        "ours is below": lambda row: f"{_beaten(row)} of {len(row['random'])}",
    }
    return [*parts, markdown_table(orders, columns)]


def order_name(row: Mapping[str, Any]) -> str:
    """The axis of an untrained slice, with the metric of its order if named."""
    return row["axis"] + (f" ({row['variant']})" if row.get("variant") else "")


def _beaten(row):
    return sum(row["ours"] < nats for nats in row["random"])


def training(results: Results, picture: str) -> list[str]:
    """Losses of the elastic run and of the parent."""
    parts = ["## Training", picture]
    rows = results.get("parent_metrics") or ()
    losses = [row["loss"] for row in rows if "loss" in row]
    if losses:
        parts.append(
            f"The parent's own loss went from {format_nats(losses[0])} to "
            f"{format_nats(losses[-1])} nats per token."
        )
    elif "imported" not in (results.get("parent") or {}):
        parts.append("*The parent's losses were not recorded.*")
    alarms = results.get("alarms")
    if not alarms:
        unknown = "*Alarms were not recorded.*"
        parts.append(unknown if alarms is None else "No alarm was raised.")
    return parts


def times(results: Results) -> list[str]:
    """Seconds of every phase."""
    seconds = results.get("seconds") or {}
    total = sum(seconds.values())
    columns = {
        "phase": lambda row: row[0],
        "time": lambda row: format_seconds(row[1]),
        "share": lambda row: f"{row[1] / total:.0%}" if total else None,
    }
    table = markdown_table([*seconds.items(), ("total", total)], columns)
    parts = ["## Where the time went", table if seconds else "*Not recorded.*"]
    unknown = sorted(set(results) - SHOWN)
    if unknown:
        parts.append(f"Not shown here, in the results only: {listed(unknown)}.")
    return parts
