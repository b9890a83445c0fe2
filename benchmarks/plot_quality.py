"""The figures and tables of docs/quality.md, from benchmarks/quality.csv.

    python benchmarks/plot_quality.py

Draws docs/quality_MODEL.svg for each model and puts its table between the marks in docs/quality.md. The figures of quality.csv
come from `benchmarks/peers.py` and are written as measured; nothing is computed from them. Each SVG names the SHA-256 of the rows
that it shows, so that a test can tell that it is not older than they are.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, str]

DATA, DOCS = Path(__file__).with_name("quality.csv"), Path(__file__).parents[1] / "docs"
FIGURES = {"SmolLM2-135M-Instruct": "quality_smollm2.svg", "Gemma 3 270M": "quality_gemma3.svg"}
INK, FAINT = "#1f2933", "#d5dbe1"
STYLES = {  # family -> legend, color, marker, is it filled?, line
    "best": ("tqformat best", "#831843", "*", True, "-"),
    "balanced": ("tqformat balanced", "#1d4ed8", "s", True, "--"),
    "fast": ("tqformat fast", "#4b5563", "P", True, ":"),
    "gguf": ("GGUF file of llama-quantize", "#0e7490", "o", False, "none"),  # of many mixes: no series
    "ggml": ("block types of ggml in all layers", "#0e7490", "v", False, "-."),
    "iqk": ("block types of ik_llama.cpp in all layers", "#15803d", "^", False, "none"),
    "hqq": ("HQQ", "#6d28d9", "h", False, "-."),
    "nf4": ("bitsandbytes NF4", "#a16207", "p", False, "-."),
    "gptq": ("GPTQ of llm-compressor", "#b91c1c", "<", False, "none"),
    "autoround": ("AutoRound", "#4d7c0f", ">", False, "none"),
}
PLACES = {
    "best": ((-6, -11), "right"),
    "fast": ((-6, -9), "right"),
    "gguf": ((-4, -14), "left"),
    "iqk": ((7, 4), "left"),
}  # of labels
OURS = ("best", "balanced", "fast")
MEASURES = {  # column -> title, its value without loss, ticks
    "perplexity_ratio": ("perplexity, times the base's", 1, (1.02, 1.05, 1.1, 1.2, 1.5, 2, 5, 10, 100, 1000, 10000)),
    "kl_mean": ("mean KL divergence from the base, nats", 0, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)),
}
RC = {
    "svg.hashsalt": "tqformat",  # otherwise ids are random
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#8795a1",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # readable on dark pages too
}


def read_rows() -> dict[str, list[Row]]:
    """Model -> its rows of quality.csv, smallest file first."""
    found: dict[str, list[Row]] = {model: [] for model in FIGURES}
    with DATA.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["model"]].append(row)
    return {model: sorted(rows, key=lambda r: float(r["bits_per_weight"])) for model, rows in found.items()}


def digest(rows: list[Row]) -> str:
    """What an SVG of these rows names in its metadata."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ table


def to_markdown(rows: list[Row]) -> str:
    """The table of one model, tqformat's rows in bold type."""
    lines = [
        "| candidate | bits per weight, whole file | perplexity ratio | KL mean | top-1 |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        ours = r["family"] in OURS
        name = f"**{STYLES[r['family']][0]}, {r['candidate']} bit**" if ours else f"{r['family']} {r['candidate']}"
        ratio = f"{int(r['perplexity_ratio']):,}" if r["perplexity_ratio"].isdigit() else r["perplexity_ratio"]
        lines.append(f"| {name} | {r['bits_per_weight']} | {ratio} | {r['kl_mean']} | {r['top1']} % |")
    return "\n".join(lines) + "\n"


def put_tables(text: str, models: dict[str, list[Row]]) -> str:
    """`text` of quality.md with the table of each model between its two marks."""
    for model, rows in models.items():
        begin, end = f"<!-- table: {model} -->\n\n", "\n<!-- end -->\n"
        head, rest = text.split(begin)
        text = head + begin + to_markdown(rows) + end + rest.partition(end)[2]
    return text


# ------------------------------------------------------------------------------------------------ figure


def draw_measure(axes: Any, rows: list[Row], column: str) -> None:
    """One measure against bits per weight; its scale is logarithmic in the distance from its value without loss."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    title, least, ticks = MEASURES[column]
    for family, (legend, color, marker, filled, line) in STYLES.items():
        chosen = [r for r in rows if r["family"] == family]
        if not chosen:
            continue
        x, y = ([float(r[key]) for r in chosen] for key in ("bits_per_weight", column))
        fill, size = color if filled else "white", 9 if marker == "*" else 6.5
        look = {"color": color, "linestyle": line, "marker": marker, "markersize": size, "markerfacecolor": fill}
        axes.plot(x, y, **look, label=legend, zorder=3)
        offset, align = PLACES.get(family, ((7, 2), "left"))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # lines pass behind labels
        text = {"textcoords": "offset points", "ha": align, "fontsize": 8, "color": color, "bbox": box}
        for r, *place in zip(chosen, x, y, strict=True):
            name = r["candidate"].partition("+")[0]  # the table has the embedding's type, too
            axes.annotate(name, place, offset, **text)
    to_scale, back = lambda v: np.log(np.maximum(v - least, 1e-9)), lambda v: np.exp(v) + least
    axes.set_yscale("function", functions=(to_scale, back))
    values, bits = ([float(r[key]) for r in rows] for key in (column, "bits_per_weight"))
    axes.set_ylim(least + (min(values) - least) / 2.5, least + (max(values) - least) * 1.5)
    room = (max(bits) - min(bits)) / 8  # for the first label and the last
    axes.set_xlim(min(bits) - 0.8 * room, max(bits) + room)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set(title=title, xlabel="bits per weight, whole file")


def draw(rows: list[Row]) -> str:
    """The figure of one model as SVG: perplexity ratio on the left, KL on the right, one legend below both."""
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with style.context(["default", RC]):
        figure = Figure(figsize=(10, 5), layout="constrained")
        for axes, column in zip(figure.subplots(1, 2), MEASURES, strict=True):
            draw_measure(axes, rows, column)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        metadata = {"Date": None, "Creator": None, "Description": f"rows of quality.csv: {digest(rows)}"}
        figure.savefig(buffer, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def main() -> None:
    models = read_rows()
    for model, rows in models.items():
        (DOCS / FIGURES[model]).write_text(draw(rows), "utf-8")
    page = DOCS / "quality.md"
    page.write_text(put_tables(page.read_text("utf-8"), models), "utf-8")


if __name__ == "__main__":
    main()
