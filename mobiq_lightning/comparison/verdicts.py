"""Says in words what a comparison found: routing against its controls, and strategies against each other.

Both are said twice: at equal used bits, and at equal all-in bits, which count what is stored beside the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mobiq_lightning.comparison.all_in import APART, AllInCurves
from mobiq_lightning.comparison.grid import RULES_SEEDS
from mobiq_lightning.comparison.table import CellRow, Lead, Points, lead
from mobiq_lightning.runs import CONTROLS, SHORT, TIE

_SAME = 1e-6  # relative; at the ends of the range, and on whole slices, all allocations read the same weights


def verdicts(points: Points, strategies: Sequence[str], bits: Sequence[float], n_seeds: int) -> list[str]:
    """The sentences for the head of the report.

    Args:
        points: Points of all finished runs.
        strategies: Names of the strategies, in the order of the grid.
        bits: Used bits at which strategies were compared.
        n_seeds: Number of seeds of the grid.
    """
    sentences = []
    if n_seeds < RULES_SEEDS:
        sentences.append(
            f"This comparison has {n_seeds} seed{'s' if n_seeds > 1 else ''}; with fewer than {RULES_SEEDS}, spreads say "
            "little and no difference should be called one."
        )
    sentences += [routing_verdict(points, strategy, bits) for strategy in strategies]
    if len(strategies) > 1:
        sentences += strategy_verdicts(points, strategies, bits)
    return sentences


def all_in_verdicts(rows: Sequence[CellRow], strategies: Sequence[str], bits: Sequence[float]) -> list[str]:
    """The sentences at equal all-in bits: what is stored beside the codes, what that leaves of routing, and of strategies.

    Args:
        rows: Rows of all finished runs.
        strategies: Names of the strategies, in the order of the grid.
        bits: Used bits at which strategies were compared.
    """
    curves = AllInCurves(rows)
    routing = [all_in_routing_verdict(curves, strategy, bits) for strategy in strategies]
    stored = storage_verdict(curves, strategies)
    between = all_in_strategy_verdicts(curves, strategies, bits) if stored else []
    return [*stored, *(sentence for sentence in routing if sentence), *between]


def routing_verdict(points: Points, strategy: str, bits: Sequence[float]) -> str:
    """Says at which bits a strategy's router beats its controls, and by how much against the spread over seeds.

    It is ahead only if it is ahead of each control by more than the spread of that lead, and behind if it is behind
    one. A control that none of the strategy's runs has measured, as may be with older runs, is not mentioned.

    Args:
        points: Points of all finished runs.
        strategy: Name of the strategy.
        bits: Used bits at which strategies were compared.
    """
    said = _against_controls(points, strategy, bits)
    if said:
        return f"{strategy}: {said}."
    mine = [point for key, by_seed in points.items() if key[:2] == (strategy, "router") for point in by_seed.values()]
    if any(not math.isfinite(point.perplexity) for point in mine):
        return f"{strategy}: perplexities are not finite, so nothing can be said of its routing."
    return f"{strategy}: at these bits all allocations read the same weights, so routing has nothing to win."


def all_in_routing_verdict(curves: AllInCurves, strategy: str, bits: Sequence[float]) -> str:
    """Says at which bits a strategy's router beats its controls if these may spend what the router stores of its own.

    The rule is that of equal used bits: ahead of each control by more than the spread of that lead, or behind one.

    Args:
        curves: Curves of all finished runs.
        strategy: Name of the strategy.
        bits: Used bits of the router at which it is compared.

    Returns:
        A sentence; an empty text if no control was measured, or no lead is finite.
    """
    router, controls = curves.beside(strategy, "router"), curves.beside(strategy, *CONTROLS)
    if router is None or controls is None:
        return ""
    if router - controls < APART:
        return f"{strategy}, at equal all-in bits: the same, as its router stores nothing of its own."
    said = _against_controls(curves.against_controls(strategy, bits), strategy, bits)
    own = f"the router's own {router - controls:.2f} bits per weight counted"
    return f"{strategy}, at equal all-in bits, {own}: {said}." if said else ""


def _against_controls(points: Points, strategy: str, bits: Sequence[float]) -> str:
    """Where a router is ahead, behind and level, with its leads; empty where there is nothing to choose or to compare."""
    controls = [control for control in CONTROLS if any((strategy, control, asked) in points for asked in bits)]
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "tied": []}
    for asked in bits:
        router = points.get((strategy, "router", asked), {})
        leads = {control: lead(router, points.get((strategy, control, asked), {})) for control in controls}
        known = {control: one for control, one in leads.items() if one is not None}
        if len(known) < len(controls) or all(_is_nothing(one) for one in known.values()):
            continue  # nothing is left to choose there
        says = {one.says for one in known.values()}
        side = "behind" if "behind" in says else "tied" if "tied" in says else "ahead"
        found[side].append(f"{asked:g} bits ({', '.join(f'{one} against {SHORT[c]}' for c, one in known.items())})")
    if not any(found.values()):
        return ""
    names = [SHORT[control] for control in controls]
    together = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    each = {1: "", 2: "both "}.get(len(names), "all of ")
    parts = [f"routing beats {each}{together} at {_join(found['ahead'])}"] if found["ahead"] else []
    parts = parts or [f"routing beats {together}{' together' if len(names) > 1 else ''} nowhere"]
    parts += [f"it is behind one of them at {_join(found['behind'])}"] if found["behind"] else []
    level = f"level with one, within the spread over seeds or {TIE:.1%}"
    parts += [f"{level}, at {_join(found['tied'])}"] if found["tied"] else []
    return "; ".join(parts)


def _join(items: Sequence[str]) -> str:
    return ", ".join(items)


def strategy_verdicts(points: Points, strategies: Sequence[str], bits: Sequence[float]) -> list[str]:
    """Says for each of the used bits which strategy's router has the lowest perplexity, and its lead over the next."""
    return [said for asked in bits if (said := _best_strategy(points, strategies, asked, f"{asked:g} used bits"))]


def all_in_strategy_verdicts(curves: AllInCurves, strategies: Sequence[str], bits: Sequence[float]) -> list[str]:
    """Says which strategy's router has the lowest perplexity at equal all-in bits, and its lead over the next.

    All are taken at the all-in bits of the strategy that stores least beside the codes; one that cannot be had for so few is
    named and left out.

    Args:
        curves: Curves of all finished runs.
        strategies: Names of the strategies, in the order of the grid.
        bits: Used bits of the strategy that stores least.
    """
    beside = _stored(curves, strategies)
    least = min(beside.values())
    points = curves.of_routers(list(beside), [asked + least for asked in bits])
    sentences = []
    for all_in in (asked + least for asked in bits):
        said = _best_strategy(points, list(beside), all_in, f"{all_in:.2f} all-in bits")
        dearer = [strategy for strategy in beside if (strategy, "router", all_in) not in points]
        if said and dearer:
            said = f"{said[:-1]}; {_join(dearer)} take{'s' if len(dearer) == 1 else ''} more bits at the least."
        sentences += [said] if said else []
    return sentences


def _best_strategy(points: Points, strategies: Sequence[str], asked: float, where: str) -> str:
    """A sentence on which strategy is best at some bits; empty where fewer than two can be compared."""
    known = {s: points[s, "router", asked] for s in strategies if (s, "router", asked) in points}
    if len(known) < 2:
        return ""
    order = sorted(known, key=lambda s: sum(p.perplexity for p in known[s].values()) / len(known[s]))
    best, second = order[0], order[1]
    ahead, whole = lead(known[best], known[second]), lead(known[best], known[order[-1]])
    if ahead is None or whole is None:
        return ""
    if _is_nothing(whole):
        return f"At {where} all strategies give the same perplexity."
    clear = "clearly" if ahead.says == "ahead" and ahead.spread is not None else "not clearly"
    return f"At {where} {best} has the lowest perplexity, {clear} ahead of {second} ({ahead}); {order[-1]} is last."


def storage_verdict(curves: AllInCurves, strategies: Sequence[str]) -> list[str]:
    """Says how many bits per weight strategies store beside the codes, if that differs; else there is no sentence.

    Where it differs, strategies at equal used bits do not take equal memory.
    """
    stored = _stored(curves, strategies)
    if not stored or max(stored.values()) - min(stored.values()) < APART:
        return []
    figures = ", ".join(f"{strategy} {bits:.2f}" for strategy, bits in stored.items())
    return [
        f"Bits per weight beside the code bits (scales, tables, routers), which equal used bits leave out: {figures}."
    ]


def _stored(curves: AllInCurves, strategies: Sequence[str]) -> dict[str, float]:
    """What each strategy with a router stores beside the codes, in bits per weight."""
    found = {strategy: curves.beside(strategy, "router") for strategy in strategies}
    return {strategy: bits for strategy, bits in found.items() if bits is not None}


def _is_nothing(one: Lead) -> bool:
    return abs(one.mean) < _SAME
