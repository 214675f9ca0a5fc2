"""What thinking with one size and answering with another is worth, in words and tables.

It reads the rows of a sweep over pairs of budgets and caps of the thought, as
`control_report.write_control_report` describes them. Nobody wins by a difference whose
interval holds zero, and where nothing wins, that is what is said.
"""

import statistics
from collections.abc import Sequence

from elastic_jax.fronts import (
    COSTS,
    OWN_CACHE,
    Point,
    Results,
    front,
    gain,
    interval,
    points,
    rival,
    spread,
)
from elastic_jax.tables import (
    bullets,
    format_count,
    format_share,
    listed,
    markdown_table,
)


def control_text(results: Results, picture: str) -> list[str]:
    """All parts of the report; `picture` is the plot, or why there is none."""
    each = points(results)
    last = [p for p in each if p.stage == results["stages"][-1]]
    parts = ["# Thinking and answering", *_head(results)]
    parts += ["## What is found", bullets(_findings(results, each, last))]
    parts += ["## Accuracy against cost", picture, _how(results), _table(last)]
    if len(results["stages"]) > 1:
        parts += ["## Stage by stage", _stages(results), _stage_table(results, each)]
    return parts


def _head(results):
    if results.get("smoke"):
        yield "> A smoke run: it shows that everything works; its numbers mean little."
    seeds, large, small = (results[name] for name in ("seeds", "large", "small"))
    active = [seed["active_params"] for seed in seeds.values()]
    shares = sorted({f"{each[small] / each[large]:.0%}" for each in active})
    asked = results["evaluation"]
    times = "once" if len(seeds) == 1 else f"{len(seeds)} times, with other seeds"
    yield (
        f"L is `{large}`, S is `{small}` with {listed(shares)} of its "
        "active parameters, both cut from one nested checkpoint; S->L means that S "
        "thinks and L answers. Elastic training was run "
        f"{times}. Every row solves the same {format_count(asked['problems'])} "
        f"held-out problems of {asked['min_steps']} to {asked['max_steps']} steps. "
        f"Measured on {results.get('device') or 'an unknown device'}."
    )


def _findings(results, each, last):
    """Sentences that say no more than the numbers."""
    cap = max(point.cap for point in last)
    at = {point.name: point for point in last if point.cap == cap}
    alone = {pair: at[pair] for pair in ("L->L", "S->S")}
    said = (f"{name} {format_share(p.accuracy)}" for name, p in alone.items())
    yield (
        f"At the largest cap, {cap} tokens: {listed(said)}; "
        f"{format_share(at['L->L'].capped)} of the thoughts of L were still cut."
    )
    for name, point in at.items():
        if point.hand_over == OWN_CACHE:
            continue
        against = (_against(n, *gain(point, p)) for n, p in alone.items())
        yield f"{name} at that cap is {listed(against)}{_costs(point)}."
    for kind in COSTS:
        if all(getattr(point, kind) for point in last):
            yield from _on_the_front(last, kind)
    yield from _transplants(results, each, cap)


def _against(name: str, found: float, half: float) -> str:
    """How a difference of accuracies to something named reads behind "is"."""
    if abs(found) <= half:
        return f"not clearly different from {name} ({_change(found, half)})"
    side, size = ("ahead of", found) if found > 0 else ("behind", -found)
    low, high = (f"{100 * x:.1f}" for x in (size - half, size + half))
    return f"{side} {name} by {100 * size:.1f} points (95%: {low} to {high})"


def _change(found: float, half: float) -> str:
    low, high = (f"{100 * x:+.1f}" for x in (found - half, found + half))
    return f"{100 * found:+.1f} points, 95%: {low} to {high}"


def _costs(point):
    """What a point costs, behind a sentence about it."""
    measured = [
        f"{point.cost(kind):.2f} of the {words}"
        for kind, words in COSTS.items()
        if getattr(point, kind)
    ]
    return f"; it costs {listed(measured)} of L->L"


def _on_the_front(last, kind):
    """The front, and every mixed point against what one budget does as cheaply."""
    words, on = COSTS[kind], {}
    for point in front(last, kind):
        on.setdefault(point.name, []).append(str(point.cap))
    named = (f"{name} at {listed(caps)}" for name, caps in on.items())
    yield f"On the front of {words}, by means, with these caps: {'; '.join(named)}."
    mixed = [point for point in last if point.hand_over != OWN_CACHE]
    for name in dict.fromkeys(point.name for point in mixed):
        curve = [point for point in mixed if point.name == name]
        yield (
            f"Against the best single budget that is not clearly dearer in {words}, "
            f"{name} is {_against_rivals(curve, last, kind)}."
        )


def _against_rivals(curve: Sequence[Point], last: Sequence[Point], kind: str) -> str:
    """At which caps a pair wins against `rival`, and at which it does not."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "close": [], "free": []}
    for point in curve:
        other = rival(point, last, kind)
        if other is None:
            found["free"].append(str(point.cap))
            continue
        more, half = gain(point, other)
        if abs(more) <= half:
            found["close"].append(str(point.cap))
        elif more < 0:
            found["behind"].append(str(point.cap))
        else:
            said = f"{point.cap} ({_change(more, half)}, over {other.name} at"
            found["ahead"].append(f"{said} {other.cap})")
    ahead = listed(found["ahead"]) if found["ahead"] else ""
    texts = [f"ahead at caps {ahead}" if ahead else "nowhere ahead"]
    for where, words in (
        ("behind", "behind at"),
        ("close", "not clearly different at"),
        ("free", "cheaper than anything to compare with at"),
    ):
        if found[where]:
            texts.append(f"{words} {listed(found[where])}")
    return "; ".join(texts)


def _transplants(results, each, cap):
    """Transplant against re-reading, at the end of every stage."""
    for pair in ("S->L", "L->S"):
        said = []
        for stage in results["stages"]:
            at = {
                p.hand_over: p
                for p in each
                if (p.pair, p.stage, p.cap) == (pair, stage, cap)
            }
            if {"transplant", "reprefill"} <= set(at):
                found, half = gain(at["transplant"], at["reprefill"])
                accuracy = format_share(at["transplant"].accuracy)
                said.append(
                    f"{accuracy} after `{stage}`{_mixing(results, stage)}, "
                    f"{_against('re-reading', found, half)}"
                )
        if said:
            yield f"Transplanted caches, {pair}: {'; '.join(said)}."


def _mixing(results, stage):
    return " with mixed prefixes" if stage in results["mixed"] else ""


def _how(results):
    turns = results["repeats"]
    return (
        "Latency is seconds of reading, thinking, handing over and answering, for all "
        "problems in one batch, which runs until its longest row is done; the median "
        f"of {turns} turns taken alternately. Parameters x tokens counts, row by row, "
        "the active parameters of each submodel once per token that it processes, "
        "re-read ones too. Both are relative to L->L at the largest cap, seed by seed. "
        "A pair of one budget keeps its own cache, so L->L is plain capping of L. "
        "What is read is padded to a power of two, which makes steps in the latency of "
        "re-reading. The last columns are differences in points to the best single "
        "budget that is not clearly dearer, seed by seed. "
        "± is half of a 95% interval: the larger of that between seeds (Student's t) "
        "and that between problems."
    )


def _table(last):
    fronts = {kind: _measured_front(last, kind) for kind in COSTS}
    columns = {
        "pair": lambda p: p.pair,
        "hand-over": lambda p: p.hand_over,
        "cap": lambda p: p.cap,
        "exact answers": lambda p: _accuracy(p),
        "thought, tokens": lambda p: f"{p.thought_tokens:.1f}",
        "answer, tokens": lambda p: f"{p.answer_tokens:.1f}",
        "cut": lambda p: format_share(p.capped),
        "ms per problem": lambda p: _milliseconds(p.seconds),
        "latency": lambda p: _relative(p.latency),
        "parameters x tokens": lambda p: _relative(p.work),
        "on the front": lambda p: _fronts(p, fronts),
        "against one budget as fast": lambda p: _alone(p, last, "latency"),
        "with as little work": lambda p: _alone(p, last, "work"),
    }
    order = {name: i for i, name in enumerate(dict.fromkeys(p.name for p in last))}
    rows = sorted(last, key=lambda p: (order[p.name], p.cap))
    return markdown_table(rows, columns)


def _measured_front(last, kind):
    return front(last, kind) if all(getattr(p, kind) for p in last) else []


def _fronts(point, fronts):
    on = [kind for kind, kept in fronts.items() if point in kept]
    return ", ".join(on) or None


def _alone(point, last, kind):
    """The rival of a mixed pair, and the difference to it in points."""
    timed = all(getattr(p, kind) for p in last)
    if point.hand_over == OWN_CACHE or not timed:
        return None
    if (other := rival(point, last, kind)) is None:
        return "nothing as cheap"
    found, half = gain(point, other)
    return f"{100 * found:+.1f} ± {100 * half:.1f} to {other.name} at {other.cap}"


def _accuracy(point):
    return f"{100 * point.accuracy:.1f}% ± {100 * interval(point.right):.1f}"


def _milliseconds(seconds):
    return f"{1e3 * statistics.fmean(seconds):.2f}" if seconds else None


def _relative(costs):
    if not costs:
        return None
    half = spread(costs)
    text = f"{statistics.fmean(costs):.2f}"
    return text if half is None else f"{text} ± {half:.2f}"


def _stages(results):
    mixed = [f"`{name}`" for name in results["mixed"] if name in results["stages"]]
    text = "The same at the end of earlier stages, where no seconds were taken."
    if mixed:
        text += f" Prefixes are mixed in {listed(mixed)}."
    return text


def _stage_table(results, each):
    """Accuracy of every arm at every cap, one column per stage."""
    rows: dict[tuple, dict[str, Point]] = {}
    for point in sorted(each, key=lambda p: p.cap):
        rows.setdefault((point.name, point.cap), {})[point.stage] = point
    order = list(dict.fromkeys(point.name for point in each))
    listed = sorted(rows.items(), key=lambda item: order.index(item[0][0]))
    columns = {"pair": lambda item: item[0][0], "cap": lambda item: item[0][1]}
    for stage in results["stages"]:
        columns[f"after {stage}"] = lambda item, s=stage: _accuracy(item[1][s])
    return markdown_table(listed, columns)
