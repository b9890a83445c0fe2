"""The storage table, of a plan and of a finished repository alike."""

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference_quantizer.planning.plan import Plan
from tqformat.__main__ import bits_text, summary
from tqformat.load_quantized import MANIFEST, open_repo, parse_json

LARGEST = 12  # tensors listed by name


@dataclass(frozen=True)
class Row:
    """One tensor's line."""

    name: str
    kind: str
    bits: float | None
    shape: tuple[int, ...]
    scalars: int
    original: int
    stored: int


def natural(name: str) -> list[str | int]:
    """A key by which names are sorted as people do: layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def plan_rows(plan: Plan) -> list[Row]:
    """The lines of a plan."""
    return [
        Row(t.info.name, t.kind, t.bits, t.info.shape, t.info.scalars, t.info.nbytes, t.stored_bytes)
        for t in plan.tensors
    ]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the finished repository in `path`."""
    return parse_json((path / MANIFEST).read_bytes(), MANIFEST)


def repo_rows(path: Path) -> list[Row]:
    """The lines of the finished repository in `path`; what a tensor takes is what the payload's headers say."""
    with open_repo(path, verify=False) as repo:
        weights = summary(repo)["weights"]
    keys = ("name", "kind", "bits", "shape", "scalars", "original_bytes", "stored_bytes")
    return [Row(*(tuple(w[key]) if key == "shape" else w[key] for key in keys)) for w in weights]


def size_line(path: Path) -> str:
    """Bits per weight of the finished repository in `path`, and the bytes of its payload files."""
    with open_repo(path, verify=False) as repo:
        found = summary(repo)
    per = found["quantized"]["bits_per_weight"], found["total"]["bits_per_weight"]
    return f"{bits_text(*per)} ({found['total']['payload_file_bytes']:,} bytes)"


def mean_relative_error(manifest: dict[str, Any]) -> float | None:
    """Squared error over squared norm of the quantized weights, averaged over their scalars; None where unknown."""
    quantized = [entry for entry in manifest["tensors"].values() if entry["kind"] == "quantized"]
    weights = [math.prod(entry["shape"]) for entry in quantized]
    errors = [entry.get("extra", {}).get("relative_error") for entry in quantized]
    if not sum(weights) or None in errors:
        return None
    return float(sum(e * w for e, w in zip(errors, weights, strict=True)) / sum(weights))


def figures(rows: Iterable[Row], accounting: dict[str, Any]) -> dict[str, Any]:
    """Bits per weight, beside the accounting."""
    quantized = [r for r in rows if r.kind == "quantized"]
    scalars = accounting["quantized_scalars"] + accounting["passthrough_scalars"]
    return {
        "bits_per_quantized_weight": 8 * sum(r.stored for r in quantized) / max(1, accounting["quantized_scalars"]),
        "bits_per_weight": 8 * accounting["stored_bytes"] / max(1, scalars),
    }


def print_table(rows: list[Row], accounting: dict[str, Any], title: str, error: float | None = None) -> None:
    """Largest tensors, totals by kind, bytes and ratio, on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)
    largest = sorted(rows, key=lambda r: (-r.scalars, natural(r.name)))[:LARGEST]
    console.print(title, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for head, justify in (("tensor", "left"), ("kind", "left"), ("bits", "right"), ("shape", "right")):
        table.add_column(head, justify=justify, overflow="fold", no_wrap=head != "tensor")  # type: ignore[arg-type]
    for head in ("scalars", "original", "stored"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in largest:
        shape = "x".join(map(str, r.shape))
        table.add_row(
            r.name,
            r.kind,
            "" if r.bits is None else f"{r.bits:g}",
            shape,
            f"{r.scalars:,}",
            f"{r.original:,}",
            f"{r.stored:,}",
        )
    if len(rows) > len(largest):
        table.add_row(f"... and {len(rows) - len(largest)} more")
    console.print(table)

    totals = Table(box=None, pad_edge=False)
    for head in ("total", "tensors", "scalars", "original bytes", "stored bytes"):
        totals.add_column(head, justify="left" if head == "total" else "right", no_wrap=True)
    for kind, bits in sorted({(r.kind, r.bits) for r in rows}, key=lambda k: (k[0] != "quantized", k[1] or 0)):
        chosen = [r for r in rows if (r.kind, r.bits) == (kind, bits)]
        _add_total(totals, kind if bits is None else f"{kind}, {bits:g} bit", chosen)
    tables = accounting["stored_bytes"] - sum(r.stored for r in rows)
    if tables:
        totals.add_row("rotations, codebooks", "", "", "", f"{tables:,}")
    scalars = accounting["quantized_scalars"] + accounting["passthrough_scalars"]
    everything = (len(rows), scalars, accounting["original_bytes"], accounting["stored_bytes"])
    totals.add_row("all", *(f"{n:,}" for n in everything))
    console.print()
    console.print(totals)

    per = figures(rows, accounting)
    console.print()
    console.print(
        f"{accounting['original_bytes']:,} -> {accounting['stored_bytes']:,} bytes, ratio {accounting['ratio']:.3f}; "
        f"{bits_text(*per.values())}, headers not counted"
    )
    if error is not None:
        console.print(f"mean relative squared error of the quantized weights: {error:.4g}")


def _add_total(table: Any, label: str, rows: list[Row]) -> None:
    sums = (f"{sum(getattr(r, key) for r in rows):,}" for key in ("scalars", "original", "stored"))
    table.add_row(label, f"{len(rows):,}", *sums)
