"""What the rows of a comparison say in words."""

from __future__ import annotations

from mobiq_lightning.runs import Allocation, Row, all_in_verdict, findings, harmed_depths, idle_budgets, verdict


def row(
    allocation: Allocation,
    bits: float,
    perplexity: float,
    seed: int | None = None,
    beside: float = 0.5,
    kl: float = 0.1,
) -> Row:
    return Row(allocation, bits, bits, bits + beside, perplexity, kl=kl, seed=seed)


ROWS = [
    row("full", 16, 10.0),
    row("rtn", 3, 14.0),
    row("router", 3, 12.0, 0),
    row("static", 3, 12.5),
    row("random", 3, 12.2, 0),
    row("random", 3, 12.6, 1),
    row("router", 4, 11.0, 0),
    row("static", 4, 10.9),
    row("random", 4, 11.2, 0),
]


def test_the_verdict_says_where_the_router_wins_and_where_not() -> None:
    text = verdict(ROWS)
    assert "beats both controls at 3 (-3.2% against random)" in text
    assert "behind at 4 (+0.9% against static)" in text
    assert "nowhere" in verdict([row("router", 3, 12.0), row("static", 3, 11.0), row("random", 3, 13.0)])
    assert "Within 0.1% at 3" in verdict([row("router", 3, 12.0), row("static", 3, 12.001), row("random", 3, 13.0)])
    assert verdict([row("router", 2, 12.0), row("static", 2, 12.0), row("random", 2, 12.0)]) == ""


def test_the_verdict_is_of_all_controls_that_were_measured() -> None:
    two = [row("router", 3, 12.0, 0), row("static", 3, 12.5), row("layers", 3, 11.9)]
    rest = [row("shuffled", 3, 12.1, 0), row("random", 3, 12.6, 0)]
    assert (
        verdict([*two, *rest])
        == "The router beats all controls nowhere. It is behind at 3 (+0.8% against best layers)."
    )
    assert verdict([two[0], two[1], *rest]).startswith("The router beats all controls at 3 (-0.8% against shuffled)")
    assert verdict(two[:2]) == "The router beats the one control at 3 (-4.0% against static)."
    assert verdict(two[:1]) == ""


def test_at_equal_all_in_bits_a_control_has_what_the_router_spends_on_itself() -> None:
    rows = [
        *(row("router", bits, perplexity, beside=1.0) for bits, perplexity in ((2, 20.0), (3, 14.9), (4, 11.0))),
        *(row("static", bits, perplexity) for bits, perplexity in ((2, 20.0), (3, 15.0), (4, 12.0))),
    ]
    # The control is taken at 2.5 bits (17.5), at 3.5 (13.5), and at 4, which is all that it has (12.0).
    assert all_in_verdict(rows) == (
        "At equal all-in bits it beats the one control at 4 (-8.3% against static). "
        "It is behind at 2 (+14.3% against static), 3 (+10.4% against static)."
    )
    assert "nowhere" not in verdict(rows)


def test_no_control_is_taken_below_its_lowest_all_in_bits() -> None:
    assert all_in_verdict([row("router", 2, 20.0, beside=0.1), row("static", 2, 19.0)]) == ""


def test_budgets_that_buy_nothing_are_named_with_the_lower_one_that_is_as_good() -> None:
    rows = [
        row("router", 2, 20.0, kl=0.2),
        row("router", 2.25, 20.0, kl=0.21),
        row("router", 2.5, 20.1, kl=0.19),  # the KL divergence is better
        row("router", 3, 15.0, kl=0.1),
        row("router", 8, 15.1, kl=0.1),
        row("random", 8, 99.0, kl=0.9),
    ]
    assert idle_budgets(rows) == [(2.25, 2), (8, 3)]
    assert findings(rows)[-1] == "More bits that buy nothing: 2.25 (no better than 2), 8 (no better than 3)."
    assert idle_budgets(rows[::-1]) == idle_budgets(rows)


def test_rows_that_are_not_finite_decide_nothing() -> None:
    lost = [
        row("router", 2, float("nan")),
        row("router", 3, 12.0),
        row("static", 3, float("inf")),
        row("static", 2, 9.0),
    ]
    assert idle_budgets(lost) == []
    assert verdict(lost) == ""
    assert "behind at 3" in all_in_verdict(lost)  # against the one point that is left


def test_depths_at_which_rounding_is_closer_to_full_precision_are_named() -> None:
    rows = [
        *(row("router", bits, 20.0, kl=kl) for bits, kl in ((2, 0.5), (4, 0.05), (6, 0.0212), (8, 0.02))),
        *(row("rtn", bits, 20.0, kl=kl) for bits, kl in ((2, 9.0), (3, 0.9), (6, 0.02), (8, 0.003))),
    ]
    assert harmed_depths(rows[::-1]) == [(8, 0.02, 0.003)]
    assert findings(rows)[-1].startswith(
        "Rounding to nearest is closer to full precision at 8 (KL 0.0200, rounding 0.0030): "
    )
    assert not any("Rounding" in sentence for sentence in findings(rows[:3] + rows[4:7]))
