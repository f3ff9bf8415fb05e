"""What a comparison says, in words: routing against static and random, and strategies against each other."""

from __future__ import annotations

from collections.abc import Sequence

from mobiq_lightning.comparison.grid import RULES_SEEDS
from mobiq_lightning.comparison.table import CONTROLS, Lead, Points, lead
from mobiq_lightning.report import TIE

_SAME = 1e-6  # relative; at the ends of the range, and on whole slices, all allocations read the same weights


def verdicts(points: Points, strategies: Sequence[str], bits: Sequence[float], n_seeds: int) -> list[str]:
    """Sentences for the head of the report.

    Args:
        points: Of all finished runs.
        strategies: Names, in the order of the grid.
        bits: Used bits that were compared.
        n_seeds: Seeds of the grid.
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
    """Whether a strategy's router beats both controls, at which bits, and by how much against the spread over seeds."""
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "tied": []}
    for asked in bits:
        router = points.get((strategy, "router", asked))
        leads = {c: lead(router, points.get((strategy, c, asked), {})) for c in CONTROLS} if router else {}
        given = {name: one for name, one in leads.items() if one is not None}
        if len(given) < len(CONTROLS) or all(_is_nothing(one) for one in given.values()):
            continue  # nothing is left to choose there
        control, worst = min(given.items(), key=lambda item: item[1].mean)
        found[worst.says].append(f"{asked:g} bits ({worst} against {control})")
    parts = [f"ahead of both controls at {', '.join(found['ahead'])}"] if found["ahead"] else []
    parts += [f"behind the better control at {', '.join(found['behind'])}"] if found["behind"] else []
    parts += (
        [f"level with it, within the spread over seeds or {TIE:.1%}, at {', '.join(found['tied'])}"]
        if found["tied"]
        else []
    )
    if not parts:
        return f"{strategy}: at these bits all allocations read the same weights, so routing has nothing to win."
    head = "routing beats static and random nowhere" if not found["ahead"] else "routing is"
    return f"{strategy}: {head}{'; it is' if not found['ahead'] else ''} {'; '.join(parts)}."


def strategy_verdicts(points: Points, strategies: Sequence[str], bits: Sequence[float]) -> list[str]:
    """Which strategy's router has the lowest perplexity at each used bits, and its lead over the next."""
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


def _is_nothing(one: Lead) -> bool:
    return abs(one.mean) < _SAME
