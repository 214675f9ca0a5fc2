"""What a run found, in words and tables: the text of a report.

It reads the plain rows of one run, as `report.write_report` describes them. Two rules
shape it: what was not measured is said where it would have stood, and nobody is
called the winner where the difference could be chance.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from elastic_jax.tables import (
    format_bytes,
    format_count,
    format_nats,
    format_ratio,
    format_seconds,
    format_several,
    format_share,
    markdown_table,
)

Results = Mapping[str, Any]

ANSWERS = "exact answers"
EXPECTED = (ANSWERS, "KL after 50 steps", "KL after 100 steps", "KL at the end")
BELOW_ALL = "Ours is below every random order"
BELOW_MEAN = "Ours is below their mean, not below every one"
NOT_BELOW = "Ours is not below their mean"
CLEAR_SHARE, CLEAR_NATS = 0.05, 1e-3  # two KLs closer than either are a tie
SHOWN = set(
    "title command date versions device smoke seconds parent budgets evaluation "
    "divergence orders importance never_routed router metrics parent_metrics "
    "alarms".split()
)


def compare(results: Results) -> list[dict[str, Any]]:
    """The main run against the same training from random orders.

    Returns:
      one row for every budget and measure that both have: `budget`, `measure`,
      `ours`, `random` (one value per seed), `winner`: "ours", "random" or None, and
      `margin`, the difference in words. A winner differs from all seeds in one
      direction, and from their mean by two standard errors of the difference of two
      proportions (accuracy) or by 5% and 0.001 nats (KL).
    """
    controls = dict(results.get("divergence") or {})
    main, rows = controls.pop("main", {}), []
    for budget in results["budgets"]:
        name = budget["name"]
        measured = {ANSWERS: (budget.get("accuracy"), budget.get("random_accuracy"))}
        for at, nats in main.get(name, {}).items():
            seeds = [control.get(name, {}).get(at) for control in controls.values()]
            seeds = [value for value in seeds if value is not None]
            when = "at the end" if at == "end" else f"after {at} steps"
            measured[f"KL {when}"] = (nats, seeds)
        for measure, (ours, seeds) in measured.items():
            if ours is None or not seeds:
                continue
            row = {"budget": name, "measure": measure, "ours": ours, "random": seeds}
            rows.append(row | _verdict(row, _problems(results)))
    return rows


def _verdict(row, problems):
    """Who wins, and by how much."""
    ours, seeds = row["ours"], row["random"]
    mean = statistics.fmean(seeds)
    apart = all(seed < ours for seed in seeds) or all(seed > ours for seed in seeds)
    if row["measure"] == ANSWERS:
        gain, p = ours - mean, statistics.fmean([ours, *seeds])
        spread = p * (1 - p) * (1 + 1 / len(seeds))
        chance = 2 * math.sqrt(spread / problems) if problems else math.inf
        margin = f"{100 * abs(gain):.1f} points"
    else:
        gain, size = mean - ours, max(abs(ours), abs(mean))
        chance = max(CLEAR_SHARE * size, CLEAR_NATS)
        margin = f"{abs(gain) / size:.0%}" if gain else "0%"
    winner = "ours" if gain > 0 else "random"
    clear = apart and abs(gain) > chance
    return {"winner": winner if clear else None, "margin": margin}


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
    return [*parts, _bullets(_findings(results))]


def _findings(results):
    parent, (full, *smaller) = results.get("parent") or {}, results["budgets"]
    yield _parent(parent)
    if None not in (parent.get("accuracy"), full.get("accuracy")):
        points = 100 * (full["accuracy"] - parent["accuracy"])
        where = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
        where = where if round(points, 1) else "level with"
        yield f"`{full['name']}` ends {where} the parent."
    for budget in smaller:
        if budget.get("accuracy") is not None:
            share = budget["active_params"] / full["active_params"]
            yield (
                f"`{budget['name']}`, {share:.0%} of the active parameters, answers "
                f"{format_share(budget['accuracy'])} exactly; the same slice "
                f"untrained: {format_share(budget.get('untrained_accuracy'))}."
            )
    yield _score(compare(results))
    alarms = (results.get("alarms") or {}).items()
    if alarms:
        yield f"Alarms: {_and(f'`{cause}` {n} times' for cause, n in alarms)}."


def _parent(parent):
    if parent.get("accuracy") is None:
        return "*The parent's accuracy was not recorded.*"
    text = f"The parent answers {format_share(parent['accuracy'])} of problems exactly"
    if "steps" in parent:
        text += f" after {format_count(parent['steps'])} steps"
    limits = []
    if parent.get("target") is not None:
        limits.append(f"training stops at {format_share(parent['target'])}")
    if parent.get("floor") is not None:
        limits.append(
            f"under {format_share(parent['floor'])} the run fails"
            if parent["floor"] > 0
            else "its floor is 0: any parent is accepted"
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


def accuracy(results: Results, picture: str) -> list[str]:
    """Every budget: what it costs, and what it answers."""
    budgets = results["budgets"]
    columns = {
        "budget": lambda b: b["name"],
        "active parameters": lambda b: format_count(b["active_params"]),
        "all parameters": lambda b: format_count(b.get("total_params")),
        "weights in bf16": lambda b: format_bytes(b.get("weight_bytes")),
        "target": lambda b: format_share(b.get("target")),
        "cost / target": lambda b: format_ratio(b.get("cost_over_target")),
        ANSWERS: lambda b: format_share(b.get("accuracy")),
        "untrained": lambda b: format_share(b.get("untrained_accuracy")),
        "random order": lambda b: format_several(
            b.get("random_accuracy"), format_share
        ),
    }
    parts = ["## Accuracy", _evaluation(results), picture]
    parts.append(markdown_table(budgets, columns))
    missing = [
        what
        for key, what in (
            ("accuracy", "trained budgets"),
            ("untrained_accuracy", "untrained slices"),
            ("random_accuracy", "the control from a random order"),
        )
        if all(budget.get(key) in (None, []) for budget in budgets)
    ]
    if missing:
        parts.append(f"*Answers were not measured of {_and(missing)}.*")
    lengths = {n for b in budgets for n in b.get("accuracy_by_steps") or {}}
    if not lengths:
        return [*parts, "*Accuracy by length of a problem was not recorded.*"]
    columns = {ANSWERS: lambda b: b["name"]}
    for n in sorted(lengths, key=int):
        columns[f"{n} steps"] = lambda b, n=n: format_share(
            (b.get("accuracy_by_steps") or {}).get(n)
        )
    return [*parts, "By length of the problem:", markdown_table(budgets, columns)]


def _evaluation(results):
    seen, text = results.get("evaluation") or {}, ""
    if "problems" in seen:
        text += f" to {format_count(seen['problems'])} problems"
    if "min_steps" in seen and "max_steps" in seen:
        text += f" of {seen['min_steps']} to {seen['max_steps']} steps"
    return (
        f"Answers are generated{text}, by slices that are read from the nested "
        "checkpoint. *Untrained* is the same slice of the permuted parent before "
        "training; *random order* was trained alike, at the same counts, from a parent "
        "permuted at random."
    )


def against_random(results: Results) -> list[str]:
    """Who wins by how much against the same training from a random order."""
    rows = compare(results)
    parts = ["## Who wins: importance order or random order", _score(rows)]
    if not rows:
        return parts
    seeds, problems = max(len(row["random"]) for row in rows), _problems(results)
    chance = (
        f"An accuracy differs by more than two standard errors over {problems} problems"
        if problems
        else "The number of problems is unknown, so no accuracy is called different"
    )
    parts.append(
        f"{chance}, a KL by more than {CLEAR_SHARE:.0%} and {CLEAR_NATS} nats per "
        "token. "
        + (
            "The control was run with one seed: how seeds differ is not known."
            if seeds == 1
            else f"A winner also differs from each of {seeds} seeds."
        )
    )
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    parts.append(_bullets(_winners(measure, rows) for measure in measures))
    missing = [measure for measure in EXPECTED if measure not in measures]
    if missing:
        parts.append(f"*Not measured on both sides: {_and(missing)}.*")
    columns = {
        "budget": lambda row: row["budget"],
        "measure": lambda row: row["measure"],
        "ours": lambda row: _form(row)(row["ours"]),
        "random order": lambda row: format_several(row["random"], _form(row)),
        "difference": lambda row: row["margin"],
        "winner": lambda row: row["winner"] or "too close",
    }
    return [*parts, markdown_table(rows, columns)]


def _form(row):
    return format_share if row["measure"] == ANSWERS else format_nats


def _winners(measure, rows):
    """One measure in words."""
    found = {"ours wins at": [], "random wins at": [], "too close to call at": []}
    for row in rows:
        if row["measure"] == measure and row["winner"]:
            by = f"`{row['budget']}` by {row['margin']}"
            found[f"{row['winner']} wins at"].append(by)
        elif row["measure"] == measure:
            found["too close to call at"].append(f"`{row['budget']}`")
    said = (f"{what} {_and(where)}" for what, where in found.items() if where)
    return f"{measure[0].upper()}{measure[1:]}: {'; '.join(said)}."


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
            names = _and(f"expert {expert}" for expert in experts)
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
    said = (f"{what}: {_and(names)}." for what, names in found.items() if names)
    parts.append(_bullets(said))
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
    parts.append(
        f"The parent's own loss went from {format_nats(losses[0])} to "
        f"{format_nats(losses[-1])} nats per token."
        if losses
        else "*The parent's losses were not recorded.*"
    )
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
        parts.append(f"Not shown here, in the results only: {_and(unknown)}.")
    return parts


def _problems(results):
    return (results.get("evaluation") or {}).get("problems")


def _bullets(lines):
    return "\n".join(f"* {line}" for line in lines)


def _and(words):
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
