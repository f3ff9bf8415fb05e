"""Says in words what a comparison found: routing against its controls, and strategies against each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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


def routing_verdict(points: Points, strategy: str, bits: Sequence[float]) -> str:
    """Says at which bits a strategy's router beats its controls, and by how much against the spread over seeds.

    It is ahead only if it is ahead of each control by more than the spread of that lead, and behind if it is behind
    one. A control that none of the strategy's runs has measured, as may be with older runs, is not mentioned.

    Args:
        points: Points of all finished runs.
        strategy: Name of the strategy.
        bits: Used bits at which strategies were compared.
    """
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
        mine = [
            point for key, by_seed in points.items() if key[:2] == (strategy, "router") for point in by_seed.values()
        ]
        if any(not math.isfinite(point.perplexity) for point in mine):
            return f"{strategy}: perplexities are not finite, so nothing can be said of its routing."
        return f"{strategy}: at these bits all allocations read the same weights, so routing has nothing to win."
    names = [SHORT[control] for control in controls]
    together = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    each = {1: "", 2: "both "}.get(len(names), "all of ")
    parts = [f"routing beats {each}{together} at {_join(found['ahead'])}"] if found["ahead"] else []
    parts = parts or [f"routing beats {together}{' together' if len(names) > 1 else ''} nowhere"]
    parts += [f"it is behind one of them at {_join(found['behind'])}"] if found["behind"] else []
    level = f"level with one, within the spread over seeds or {TIE:.1%}"
    parts += [f"{level}, at {_join(found['tied'])}"] if found["tied"] else []
    return f"{strategy}: {'; '.join(parts)}."


def _join(items: Sequence[str]) -> str:
    return ", ".join(items)


def strategy_verdicts(points: Points, strategies: Sequence[str], bits: Sequence[float]) -> list[str]:
    """Says for each of the used bits which strategy's router has the lowest perplexity, and its lead over the next."""
    sentences = []
    for asked in bits:
        known = {s: points[s, "router", asked] for s in strategies if (s, "router", asked) in points}
        if len(known) < 2:
            continue
        order = sorted(known, key=lambda s: sum(p.perplexity for p in known[s].values()) / len(known[s]))
        best, second = order[0], order[1]
        ahead, whole = lead(known[best], known[second]), lead(known[best], known[order[-1]])
        if ahead is None or whole is None:
            continue
        if _is_nothing(whole):
            sentences.append(f"At {asked:g} used bits all strategies give the same perplexity.")
            continue
        clear = "clearly" if ahead.says == "ahead" and ahead.spread is not None else "not clearly"
        sentences.append(
            f"At {asked:g} used bits {best} has the lowest perplexity, {clear} ahead of {second} ({ahead}); {order[-1]} is last."
        )
    return sentences


def storage_verdict(rows: Sequence[CellRow], strategies: Sequence[str]) -> list[str]:
    """Says how many bits per weight strategies store beside the codes, if that differs; else there is no sentence.

    Where it differs, strategies at equal used bits do not take equal memory.
    """
    stored = {
        strategy: statistics.fmean(
            one.row.all_in_bits - one.row.used_bits
            for one in rows
            if one.strategy == strategy and one.row.allocation == "router"
        )
        for strategy in strategies
        if any(one.strategy == strategy and one.row.allocation == "router" for one in rows)
    }
    if not stored or max(stored.values()) - min(stored.values()) < 0.01:
        return []
    figures = ", ".join(f"{strategy} {bits:.2f}" for strategy, bits in stored.items())
    return [
        f"Bits per weight beside the code bits (scales, tables, routers), which equal used bits leave out: {figures}."
    ]


def _is_nothing(one: Lead) -> bool:
    return abs(one.mean) < _SAME
