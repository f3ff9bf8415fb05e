"""Turns the records of tokens into figures for outliers.json, and into sentences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mobiq_lightning.outliers.overlap import count_worst, overlaps, rank_correlations, worst_tokens
from mobiq_lightning.outliers.token_record import TokenRecord
from mobiq_lightning.runs import TIE

ALL, NONE = "all", "none"
"""Names of two models: `ALL` is calibrated for all depths at once, by the recipe as it is; `NONE` is not calibrated."""


def summarize_tokens(record: TokenRecord, share: float) -> dict[str, Any]:
    """Figures of how much the worst tokens of the precisions have in common, for the whole model and for each input.

    Args:
        record: Errors of every token of one text.
        share: Part of the tokens that counts as worst, in (0, 1).

    Raises:
        DataError: If there are too few tokens to choose the worst of.
    """
    kept = record.compared
    n_tokens = int(kept.sum())
    inputs = {name: _compare(errors[:, kept], record.bits, share) for name, errors in record.inputs.items()}
    return {
        "bits": list(record.bits),
        "share": share,
        "chance": count_worst(n_tokens, share) / n_tokens,
        "n_tokens": n_tokens,
        "model": _compare(record.kl[:, kept], record.bits, share),
        "inputs_mean": _mean_of(inputs),
        "inputs": inputs,
    }


def _compare(errors: Tensor, bits: tuple[int, ...], share: float) -> dict[str, Any]:
    """Figures of errors (P, N) of one kind, at P precisions of N tokens."""
    carried = (errors.double() * worst_tokens(errors, share)).sum(1) / errors.double().sum(1)
    return {
        "mean_error": _by_bits(errors.double().mean(1), bits),
        "share_of_error": _by_bits(carried, bits),
        "overlap": overlaps(errors, bits, share),
        "rank_correlation": rank_correlations(errors, bits),
    }


def _mean_of(inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over the inputs of what was found for each."""
    if not inputs:
        return {}
    found = list(inputs.values())
    return {
        kind: {key: round(statistics.fmean(one[kind][key] for one in found), 6) for key in values}
        for kind, values in found[0].items()
    }


def own_calibration(records: Mapping[str, TokenRecord], bits: tuple[int, ...]) -> TokenRecord:
    """Joins the record of a study in which each precision is read by the model that was calibrated for it alone.

    Args:
        records: Records by what the model was calibrated for; each precision of `bits` must be among them.
        bits: The precisions.
    """
    own = [(records[str(b)], records[str(b)].bits.index(b)) for b in bits]
    first = own[0][0]
    kl, nll = (torch.stack([getattr(record, name)[row] for record, row in own]) for name in ("kl", "nll"))
    return TokenRecord(bits, first.windows, first.positions, first.ids, first.full_nll, nll, kl)


def matrix_rows(records: Mapping[str, TokenRecord], bits: tuple[int, ...]) -> list[dict[str, Any]]:
    """Perplexity and KL of every calibration used at every precision.

    Args:
        records: Records by what the model was calibrated for: a precision, `ALL` or `NONE`.
        bits: The precisions.

    Returns:
        Dicts of calibrated_at, used_at, perplexity, kl (mean, nats), and change: the perplexity relative to that of the model
        calibrated for the precision it is used at, minus 1.
    """
    own = {b: _perplexity(records[str(b)].nll[i]) for i, b in enumerate(bits)}
    return [
        {
            "calibrated_at": int(name) if name.isdigit() else name,
            "used_at": b,
            "perplexity": _perplexity(record.nll[i]),
            "kl": float(record.kl[i].double().mean()),
            "change": _perplexity(record.nll[i]) / own[b] - 1,
        }
        for name, record in records.items()
        for i, b in enumerate(bits)
    ]


def full_perplexity(record: TokenRecord) -> float:
    """The perplexity of the full-precision model on the tokens of a record."""
    return _perplexity(record.full_nll)


def _perplexity(nll: Tensor) -> float:
    return float(nll.double().mean().exp())


def _by_bits(values: Tensor, bits: tuple[int, ...]) -> dict[str, float]:
    return {str(b): float(f"{float(value):.6g}") for b, value in zip(bits, values, strict=True)}


def same_bits(one: TokenRecord, other: TokenRecord, share: float) -> dict[str, float]:
    """Share of the worst tokens that two calibrations have in common at the same precision: a control of the overlaps.

    Different rounding errors alone make different tokens the worst ones, even at equal precision; overlaps between
    precisions only say something beside this figure.

    Args:
        one: Record of the first calibration.
        other: Record of the second, of the same tokens and precisions.
        share: Part of the tokens that counts as worst, in (0, 1).

    Returns:
        By precision, the share in [0, 1].
    """
    kept = one.compared
    pairs = zip(one.bits, one.kl[:, kept], other.kl[:, kept], strict=True)
    return {str(b): overlaps(torch.stack([mine, theirs]), (b, b), share)[f"{b}-{b}"] for b, mine, theirs in pairs}


def overlap_verdict(tokens: dict[str, Any]) -> str:
    """Says in words between which precisions the worst tokens change most and least, and what the control shows.

    Args:
        tokens: Figures of the tokens as outliers.json has them: ``elastic``, and where it was measured ``same_bits``.
    """
    elastic = tokens["elastic"]
    found = elastic["model"]["overlap"]
    order = sorted(found, key=found.__getitem__)
    text = f"Of the worst {elastic['share']:.0%} of tokens by KL, {found[order[0]]:.0%} are the same at {_and(order[0])} bits"
    text += f" and {found[order[-1]]:.0%} at {_and(order[-1])}" if len(order) > 1 else ""
    text += f"; by chance {elastic['chance']:.0%}."
    if not elastic["inputs"]:
        text += " Its weights were rotated before they were sliced, so inputs are not compared with the source's."
    if "same_bits" in tokens:
        shared = tokens["same_bits"].values()
        text += (
            f" At one and the same precision, a model calibrated for it and the uncalibrated one share {min(shared):.0%} to "
            f"{max(shared):.0%}: so much change comes with any other rounding, without another precision."
        )
    return text


def matrix_verdict(rows: list[dict[str, Any]]) -> str:
    """Says in words whether a model is worse at a precision than one that was calibrated for that precision.

    Args:
        rows: Rows of `matrix_rows`.
    """
    others = [r for r in rows if isinstance(r["calibrated_at"], int) and r["calibrated_at"] != r["used_at"]]
    raised = [r for r in others if r["used_at"] > r["calibrated_at"]]
    worse = sum(r["change"] > TIE for r in others)
    better = sum(r["change"] < -TIE for r in others)
    sentences = [
        f"Calibrated for other bits than it is used at, the model has a higher perplexity than one calibrated for them in "
        f"{worse} of {len(others)} cases, a lower one in {better}, and is within {TIE:.1%} in {len(others) - worse - better}.",
        f"Largest change: {_case(max(others, key=_size))}; of those used at more bits, {_case(max(raised, key=_size))}.",
    ]
    paper = next((r for r in raised if (r["calibrated_at"], r["used_at"]) == (3, 4)), None)
    if paper is not None:
        own = next(r for r in rows if r["calibrated_at"] == r["used_at"] == 4)
        sentences.append(
            f"The paper's case, calibrated at 3 and used at 4: {paper['perplexity']:.2f} against {own['perplexity']:.2f} "
            f"({paper['change']:+.1%}), KL {paper['kl']:.4f} against {own['kl']:.4f}."
        )
    return " ".join(sentences)


def _size(row: dict[str, Any]) -> float:
    return abs(float(row["change"]))


def _case(row: dict[str, Any]) -> str:
    return f"calibrated at {row['calibrated_at']} and used at {row['used_at']} bits ({row['change']:+.1%})"


def _and(pair: str) -> str:
    return pair.replace("-", " and ")
