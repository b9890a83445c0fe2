"""The card's figures, as PNG and as SVG: the same facts give the same bytes (with the same matplotlib)."""

import io
from typing import Any

from tqformat.__main__ import size_text

LAYERS, STORAGE, METRICS = "figure_layers.png", "figure_storage.png", "figure_metrics.png"
PURPOSES = {
    METRICS: "figure of this page: base and quantized model compared",
    LAYERS: "figure of this page: error and bits by layer",
    STORAGE: "figure of this page: where the bytes are",
}
CAPTIONS = {
    METRICS: "Perplexity of both models, how much worse each window became, and how far the predictions diverge.",
    LAYERS: "Relative squared error and bits of each weight, by depth and kind of weight. Weights outside the layers,"
    " such as embeddings, stand to the left of them.",
    STORAGE: "Where the bytes are: of the base model above, of this repository below, on one scale.",
}
INK, FAINT, BASE, QUANTIZED = "#1f2933", "#d5dbe1", "#8795a1", "#c2410c"
COLORS = ("#1d4ed8", "#0e9f6e", "#c2410c", "#7c3aed", "#b7791f", "#be185d", "#0891b2", "#4d7c0f", "#6b7280")
PARTS = ("#8795a1", "#1d4ed8", "#60a5fa", "#0e9f6e", "#b7791f")
STYLE = {
    "svg.hashsalt": "tqformat",  # otherwise ids are random
    "svg.fonttype": "none",  # text stays text: small, and a test can read it
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine lays out the same
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",  # readable on the Hub's dark pages too
}
DPI, PALETTE = 110, 128  # of the PNG: sharp at the width of a page, and below 100 kB
MARKED = 400  # points beyond which curves go without markers, which are long in SVG


def draw(facts: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content, of every figure for which there are facts (see card.card_facts); each as PNG and as SVG."""
    from matplotlib import style

    found: dict[str, Any] = {}
    with style.context(["default", STYLE]):  # whatever the user's own settings are
        if facts["summary"] is not None:
            found[METRICS] = draw_metrics(facts["summary"])
        if any(w["kind"] == "quantized" and w["scalars"] for w in facts["weights"]):
            found[LAYERS] = draw_layers(facts["weights"])
        found[STORAGE] = draw_storage(facts["storage"])
        return {name: content for png, figure in found.items() for name, content in save(png, figure).items()}


def vector_name(png: str) -> str:
    """The SVG's name beside the PNG's."""
    return png.removesuffix(".png") + ".svg"


def save(png: str, figure: Any) -> dict[str, bytes]:
    """File name -> content of a figure, without dates and versions."""
    from PIL import Image

    vector, pixels, small = io.BytesIO(), io.BytesIO(), io.BytesIO()
    figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(pixels, format="png", dpi=DPI, metadata={"Software": None})
    # an octree keeps the colours of thin lines, which a median cut mixes
    Image.open(pixels).convert("RGB").quantize(PALETTE, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        small, "png", optimize=True
    )
    lines = [line.rstrip() for line in vector.getvalue().splitlines()]
    return {png: small.getvalue(), vector_name(png): b"\n".join(lines) + b"\n"}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")


# ------------------------------------------------------------------------------------------------ layers


def draw_layers(weights: list[dict[str, Any]]) -> Any:
    """Above the relative error of the weights in layers, below the bits of all as a map: a column a layer, a row a kind."""
    import numpy as np
    from matplotlib.patches import Patch

    columns, rows, errors = _cells([w for w in weights if w["kind"] == "quantized" and w["scalars"]])
    outside = {kind: errors[kind, x] for kind, x in errors if columns[x][1] is None or len(columns) == 1}
    curves = {kind: [errors.get((kind, x)) for x in range(len(columns))] for kind in rows if kind not in outside}
    curves = {kind: curve for kind, curve in curves.items() if any(value is not None for value in curve)}
    height = 0.8 + 0.24 * len(rows)
    figure = _figure(9, 2.6 + height)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, height])
    values = [value for curve in curves.values() for value in curve if value is not None]
    wide = bool(values) and max(values) > 5 * min(values) > 0
    for k, (kind, curve) in enumerate(curves.items()):
        line = [np.nan if value is None else value for value in curve]
        marker = ("o", "s", "^")[k // len(COLORS) % 3] if len(values) <= MARKED else None
        dash = "none" if wide and marker else ("-", "--", ":")[k // len(COLORS) % 3]  # lines up and down hide all else
        style = {"color": COLORS[k % len(COLORS)], "linestyle": dash}
        top.plot(line, label=kind if k < 14 else None, marker=marker, markersize=3.5, linewidth=1.1, **style)
    if wide:
        top.set_yscale("log")
        _plain_log_ticks(top.yaxis)
    else:
        top.set_ylim(0, 1.15 * max(values, default=1.0) or 1.0)  # so that small differences look small
    apart = ", ".join(f"{kind} {value:.3g}" for kind, value in list(outside.items())[:3] if value is not None)
    top.set_title("relative squared error" + (f" (outside the layers: {apart})" if apart else ""))
    top.grid(axis="y", color=FAINT, linewidth=0.6)
    top.tick_params(axis="x", length=0)
    if curves:
        top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)

    bits = np.array([[np.nan if cell is None else cell for cell in row] for row in rows.values()], dtype=float)
    colors = _bit_colors(bits)
    low.imshow(bits, aspect="auto", interpolation="nearest", **colors)
    low.hlines(np.arange(1, len(rows)) - 0.5, -0.5, len(columns) - 0.5, color="white", linewidth=1.5)
    low.set_title("bits")
    low.set_yticks(range(len(rows)), list(rows), fontsize=8)
    low.tick_params(length=0)
    _label_columns(low, columns)
    for spine in low.spines.values():
        spine.set_visible(False)
    found = sorted(set(bits[~np.isnan(bits)].tolist()), reverse=True)[:10]
    low_end, span = colors["vmin"], colors["vmax"] - colors["vmin"]
    handles = [Patch(color=colors["cmap"]((width - low_end) / span), label=f"{width:.3g} bit") for width in found]
    low.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def _cells(weights: list[dict[str, Any]]) -> tuple[list[tuple[str, int | None]], dict[str, list[Any]], dict[Any, Any]]:
    """Columns (stack, layer), rows of bits by kind, and errors by (kind, column).

    Several weights in one cell, such as experts, are averaged over their scalars.
    """
    stacks = list(dict.fromkeys(w["stack"] for w in sorted(weights, key=lambda w: w["layer"] is not None)))
    columns = sorted({(w["stack"], w["layer"]) for w in weights}, key=lambda c: (stacks.index(c[0]), c[1] or 0))
    place = {column: x for x, column in enumerate(columns)}
    gathered: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for w in weights:
        gathered.setdefault((w["label"], place[w["stack"], w["layer"]]), []).append(w)
    kinds = sorted(
        dict.fromkeys(w["label"] for w in weights), key=lambda k: min(x for kind, x in gathered if kind == k)
    )
    mean = {key: _mean(chosen, "bits") for key, chosen in gathered.items()}
    rows = {kind: [mean.get((kind, x)) for x in range(len(columns))] for kind in kinds}
    return columns, rows, {key: _mean(chosen, "error") for key, chosen in gathered.items()}


def _mean(weights: list[dict[str, Any]], key: str) -> float | None:
    if any(w[key] is None for w in weights):
        return None
    return float(sum(w[key] * w["scalars"] for w in weights) / sum(w["scalars"] for w in weights))


def _bit_colors(bits: Any) -> dict[str, Any]:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("bits", ["#fde68a", "#34a0a4", "#1e3a8a"]).with_extremes(bad="#f4f6f8")
    low, high = (float(np.nanmin(bits)), float(np.nanmax(bits))) if not np.isnan(bits).all() else (1.0, 8.0)
    return {"cmap": ramp, "vmin": min(low, 2.0), "vmax": max(high, 8.0)}


def _label_columns(axes: Any, columns: list[tuple[str, int | None]]) -> None:
    """Layer indices below the columns, thinned out; a line between stacks, and their names where there are several."""
    stacks = list(dict.fromkeys(stack for stack, layer in columns if layer is not None))
    step = max(1, -(-len(columns) // 24))
    ticks = [x for x, (_, layer) in enumerate(columns) if layer is not None and layer % step == 0]
    axes.set_xticks(ticks, [str(columns[x][1]) for x in ticks], fontsize=8)
    axes.set_xlabel("layer" if len(stacks) <= 1 else "layer, of " + ", then ".join(stacks))
    for x in range(1, len(columns)):
        if columns[x][0] != columns[x - 1][0]:
            axes.axvline(x - 0.5, color="white", linewidth=3)


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axis.axes.get_ylim()
    if high / low < 30:
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


# ------------------------------------------------------------------------------------------------ storage


def draw_storage(parts: list[dict[str, Any]]) -> Any:
    """Two bars on one scale, the base and the repository, divided by part."""
    figure = _figure(9, 2.9)
    axes = figure.subplots()
    totals = {key: sum(part[key] for part in parts) for key in ("original", "stored")}
    for y, key in ((1, "original"), (0, "stored")):
        left = 0
        for part, color in zip(parts, PARTS, strict=True):
            axes.barh(y, part[key], left=left, color=color, height=0.62)
            if part[key] > 0.085 * totals["original"]:
                axes.text(left + part[key] / 2, y, size_text(part[key]), color="white", ha="center", va="center")
            left += part[key]
        axes.text(left + 0.01 * totals["original"], y, size_text(totals[key]), va="center", fontweight="bold")
    axes.set_yticks([1, 0], ["base model", "this repository"])
    axes.set_xlim(0, max(1, totals["original"], totals["stored"]) * 1.16)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _storage_legend(figure, parts, totals["stored"])
    return figure


def _storage_legend(figure: Any, parts: list[dict[str, Any]], stored: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, label=f"{part['part']}: {size_text(part['stored'])}, {100 * part['stored'] / stored:.1f} %")
        for part, color in zip(parts, PARTS, strict=True)
        if part["stored"]
    ]
    title = "of this repository" if handles else None
    figure.legend(
        handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=8.5, title=title, alignment="left"
    )


# ------------------------------------------------------------------------------------------------ metrics


def draw_metrics(summary: dict[str, Any]) -> Any:
    """Perplexity, what each window lost, and divergence."""
    figure = _figure(9, 2.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.3, 1.1])
    _draw_perplexity(left, [summary[model]["perplexity"] for model in ("base", "quantized")])
    _draw_losses(middle, summary["window_results"])
    _draw_divergence(right, summary)
    return figure


def _draw_perplexity(axes: Any, values: list[float]) -> None:
    """Two bars; on a log scale where one would vanish beside the other."""
    log = max(values) > 20 * min(values)
    bars = axes.bar(["base", "quantized"], values, color=[BASE, QUANTIZED], width=0.6)
    axes.set_yscale("log" if log else "linear")
    axes.bar_label(bars, [f"{v:,.2f}" if v < 1e6 else f"{v:.2e}" for v in values], padding=2)
    axes.margins(y=0.18)
    axes.set_yticks([], [])
    axes.set_yticks([], [], minor=True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title("perplexity, log scale" if log else "perplexity")


def _draw_losses(axes: Any, windows: dict[str, list[float]]) -> None:
    """How the increase of the mean negative log-likelihood is distributed over the windows."""
    import numpy as np

    increase = np.array(windows["quantized_nll"]) - np.array(windows["base_nll"])
    axes.hist(increase, bins=min(30, max(5, len(increase) // 4)), color=QUANTIZED, edgecolor="white", linewidth=0.4)
    axes.axvline(0, color=BASE, linewidth=1.2)
    axes.set_title("loss added, by window")
    axes.set_xlabel("quantized - base, nats per token")
    axes.set_ylabel("windows")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_divergence(axes: Any, summary: dict[str, Any]) -> None:
    """KL divergence where it was measured, and top-1 agreement as a share of a full bar."""
    kl = summary["kl_divergence"]
    labels = {"mean": "KL mean", "median": "KL median", "p99": "KL 99th pct."} if kl else {}
    top = max((kl[key] for key in labels), default=0.0) or 1.0
    for y, (key, label) in enumerate(labels.items(), 1):
        axes.barh(-y, kl[key] / top, color=COLORS[0], height=0.6)
        axes.text(kl[key] / top + 0.03, -y, f"{kl[key]:.3g}", va="center")
        axes.text(-0.03, -y, label, ha="right", va="center")
    rate = summary["top1_agreement"]["rate"]
    axes.barh(0, 1, color=FAINT, height=0.6)
    axes.barh(0, rate, color=COLORS[1], height=0.6)
    axes.text(1.03, 0, f"{100 * rate:.1f} %", va="center")
    axes.text(-0.03, 0, "same best token", ha="right", va="center")
    axes.set_xlim(-0.75, 1.35)
    axes.set_axis_off()
    axes.set_title("predictions" + (", divergence in nats" if kl else ""), x=0.0)
