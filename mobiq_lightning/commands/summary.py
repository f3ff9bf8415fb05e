"""What an elastic checkpoint holds, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobiq_lightning.checkpoint import Summary
from mobiq_lightning.console import table_console
from mobiq_lightning.evaluation import print_harness, print_table
from mobiq_lightning.runs import Results, generated_of


def size_of(n_bytes: float) -> str:
    """A size in MB, or in GB from one on."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.2f} MB"


def print_summary(summary: Summary) -> None:
    """Prints what a checkpoint holds."""
    from rich.table import Table

    from mobiq_lightning.checkpoint import SCALES, VALUE_TABLES
    from mobiq_lightning.packing import WHOLE_ROW, PackedSlices

    console = table_console()
    elastic, origin = summary.config, summary.provenance
    held = elastic.slice_bits
    table = Table(title=str(summary.folder), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    shapes = ", ".join(f"{count} x ({shape[0]} x {shape[1]})" for shape, count in summary.linears.items())
    table.add_row("model", f"{summary.architecture}, {summary.n_blocks} blocks")
    table.add_row(
        "sliced linears", f"{sum(summary.linears.values())}, {summary.n_weights / 1e6:,.2f} M weights: {shapes}"
    )
    table.add_row("slices", f"{held} bits; {summary.n_planes} planes held, readable at {summary.depths} bits")
    columns = elastic.group_size
    table.add_row("groups", "whole rows" if columns >= WHOLE_ROW else f"{columns} columns")
    if elastic.code != PackedSlices.code:
        table.add_row("code", f"{elastic.code}; the reference reads it, the kernels do not")
    bound = "" if summary.deployable else ", not deployable: an upper bound for routers that see one input"
    path = elastic.router["class_path"]
    kind = path.rpartition(".")[2] if summary.knows_router else f"{path} (not imported)"
    table.add_row("routers", f"{summary.n_routers} x {kind}{bound}")
    transform = elastic.transform
    if transform is not None:
        arguments = ", ".join(f"{name}={value}" for name, value in transform["init_args"].items())
        kept = " and ".join(transform["stored"]) or "nothing"
        name = transform["class_path"].rpartition(".")[2]
        table.add_row("transform", f"{name}({arguments}); kept per input: {kept}")
    table.add_row("dial", f"stands at {elastic.default_bits:g} bits, thresholds per {elastic.threshold_scope}")
    values = [kind for kind in (SCALES, VALUE_TABLES, "transforms") if summary.bytes_by_kind[kind]]
    stored = summary.bits_per_weight("planes", *values)
    routers = summary.bits_per_weight("routers", "threshold tables")
    table.add_row(
        "stored bits per weight", f"{stored:.3f} with {' and '.join(values)}, {stored + routers:.3f} with routers"
    )
    sizes = ", ".join(f"{kind} {size / 1e6:,.2f} MB" for kind, size in summary.bytes_by_kind.most_common())
    table.add_row("sizes", f"{size_of(summary.n_bytes)}: {sizes}")
    if origin:
        source, calibration, versions = origin["source"], origin["calibration"], origin["environment"]
        table.add_section()
        size = f" ({size_of(source['bytes'])})" if source.get("bytes") else ""
        about = f"{source['name']}, weights {source['weights']}{size}, tokenizer {source['tokenizer']}"
        table.add_row("source model", about)
        table.add_row(
            "calibration",
            f"{calibration['n_samples']} x {calibration['seq_len']} tokens of {calibration['data']}"
            f"{generated_of(calibration)}, data hash {calibration['data_hash']}, seed {origin['seed']}",
        )
        table.add_row(
            "code", f"mobiq-lightning {versions['mobiq_lightning']}, commit {origin['git_commit'] or 'unknown'}"
        )
        table.add_row("made", f"{versions['date']}, torch {versions['torch']}, transformers {versions['transformers']}")
    console.print(table)
    results = summary.results
    if results.measured is not None:
        print_table(results.measured)
    if results.latency:
        from mobiq_lightning.latency import print_budgets

        print_budgets(results.latency)
    if results.lm_eval:
        print_harness(results.lm_eval)
    if results == Results():
        console.print("No results are stored with it.")
