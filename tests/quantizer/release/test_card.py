"""The model card: every number in it is recomputed here from the files, without card.py, and a changed digit is noticed.

`expected` lists each line or phrase of the card that holds a number, computed from the manifest, the payload headers and the
evaluation files. `check` wants all of them in the card and takes them out; what is left may hold no digit at all.
"""

import argparse
import io
import json
import math
import re
import shlex
import shutil
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from conftest import ROOT, edit_manifest, every_setting, new_writer, random_stage, run_python
from PIL import Image

from conformance import report
from reference_quantizer import __main__ as command_line
from reference_quantizer.commands.settings import settings as find_settings
from reference_quantizer.commands.settings import tuning_steps
from reference_quantizer.evaluation import samples
from reference_quantizer.release import card, figures
from tqformat.embed import stamped_loader
from tqformat.load_quantized import MANIFEST, TQFormatError
from tqformat.writer import add_files

SIZES = {"BOOL": 1, "U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
CONSTANTS = re.compile(
    r"ar[Xx]iv(?::|\.org/abs/)\d{4}\.\d{5}|\bE8 lattice|SHA-256|top-1|\bL[0-3]\b|max_new_tokens=64|99(?:\.9)?th|in float32|T\^-1|output\[0, |shape\[1\] :\]"
)
ALLOCATION = {
    "allocator": "fisher",
    "target_bits": 3.5,
    "candidate_bits": [2, 3, 4],
    "extra": {
        "target_bytes": 5000,
        "stored_bytes": 4321,
        "objective": 0.123456,
        "uniform_bits": 3,
        "text": "self",
        "tokens": 8192,
    },
}


# ------------------------------------------------------------------------------------------------ repositories


LOOP = " ".join(["17 and 25 make 42."] * 3)


def evaluation(repo: Path, ratio: float, kl: bool = True, more: bool = False) -> None:
    """Puts evaluation files into `repo` whose figures follow from themselves; no model is run. `more` is all that is optional."""
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    payload = {name: file["sha256"] for name, file in manifest["files"].items() if file["role"] == "payload"}
    positions, scored = [511, 256, 134], [511, 255, 133]
    rng = np.random.default_rng(1)
    base_nll = (3 + rng.uniform(-0.2, 0.2, 3)).tolist()
    nll = {"base": base_nll, "quantized": [value + math.log(ratio) for value in base_nll]}
    mean = {key: math.fsum(v * n for v, n in zip(nll[key], scored, strict=True)) / sum(scored) for key in nll}
    models = {key: {"average_nll": value, "perplexity": math.exp(value)} for key, value in mean.items()}
    divergence = [0.31, 0.42, 0.53] if kl else None
    agreeing, cosines = [345, 167, 89], [0.987, 0.876, 0.765, 0.654]
    machine = {
        "hardware": {"device": "cpu", "description": "test machine, 2 threads"},
        "libraries": {"torch": "2.13.0"},
    }
    subject = {"schema_version": "1.0", "base_model": manifest["base_model"]["id"], "payload": payload}
    figures_kl = None

    def weighted(values: list[float]) -> float:
        return math.fsum(v * n for v, n in zip(values, positions, strict=True)) / sum(positions)

    if divergence:
        tokens = np.repeat([0.22, 0.25, 1.0, 2.125, 5.0, 7.5], [450, 341, 100, 8, 1, 1])
        edges = [0.0, *((4 + i % 4) * 2.0 ** (i // 4 - 26) for i in range(128)), math.inf]
        histogram = np.trim_zeros(np.histogram(tokens, edges)[0], "b").tolist()
        figures_kl = {"mean": weighted(divergence), "median": 0.25, "p99": 2.125, "p999": 5.25, "max": 7.5}
        figures_kl |= {"histogram": histogram}
    p_delta, p_squared = [-0.0111, -0.0222, 0.0033], [0.0101, 0.0202, 0.0303]
    nll_squared = [0.44 + math.log(ratio) ** 2] * 3
    deltas = [q - b for b, q in zip(nll["base"], nll["quantized"], strict=True)]
    error = math.sqrt((weighted(nll_squared) - weighted(deltas) ** 2) / (sum(positions) - 1))
    change = {
        "kl_divergence": figures_kl,
        "p_delta": {"mean": weighted(p_delta), "rms": math.sqrt(weighted(p_squared))},
        "top1_agreement": {"agreeing": sum(agreeing), "rate": sum(agreeing) / sum(positions)},
    }
    changes = {"agreeing": agreeing, "kl": divergence, "p_delta": p_delta, "p_delta_squared": p_squared}
    dataset = {"source": "file", "id": "text.txt", "config": None, "split": None, "revision": None, "rows": 37}
    dataset |= {"sha256": "1a" * 32, "tokens": 902, "tokens_sha256": "2b" * 32}
    settings = {"max_length": 512, "stride": 256, "max_windows": None, "bos": "auto", "bos_token_id": 1, "batch": 2}
    ratio = models["quantized"]["perplexity"] / models["base"]["perplexity"]
    summary = {
        **subject,
        **models,
        **machine,
        "role": "sanity-test",
        "base_weights_sha256": "3c" * 32,
        "dataset": dataset,
        "settings": settings | {"device": "cpu", "dtype": "float32"},
        "windows": 3,
        "scored_tokens": sum(scored),
        "positions": sum(positions),
        "perplexity_delta": models["quantized"]["perplexity"] - models["base"]["perplexity"],
        "perplexity_ratio": ratio,
        "perplexity_ratio_standard_error": ratio * error,
        **change,
        "window_results": {
            "base_nll": nll["base"],
            "quantized_nll": nll["quantized"],
            "nll_delta_squared": nll_squared,
            **changes,
        },
        "logit_cosine": {"prompts": list(samples.LOGIT_PROMPTS), "values": cosines, "mean": math.fsum(cosines) / 4},
        "seconds": 12.3,
    }
    if more:
        of_text = ("windows", "scored_tokens", "positions", "base", "quantized", "perplexity_delta", "perplexity_ratio")
        of_text += ("perplexity_ratio_standard_error", *change, "window_results")
        further = {"dataset": dataset | {"id": "other.txt", "rows": 47, "sha256": "4d" * 32}}
        summary["floor"] = {"dtype": "bfloat16", **change, "window_results": changes | {"agreeing": [511, 256, 131]}}
        summary["floor"]["top1_agreement"] = {"agreeing": 898, "rate": 898 / 901}
        summary["further_texts"] = [further | {key: summary[key] for key in of_text}]
    texts = ["The sky is blue.", "1. A coat\n\n  2. ```boots```", LOOP]
    answers = [*texts[:1], "- *Nothing* at all", ""]  # of the base: the same, another, none
    repetitions = dict.fromkeys([*texts, *answers], 0.0) | {LOOP: 1 - 19 / 41}
    generations = {
        **subject,
        **machine,
        "decoding": {"method": "greedy", "max_new_tokens": 64, "chat_template": True},
        "cleaning": {"rule": samples.CLEANING, "special_tokens": ["</s>"]},
        "samples": [
            {"prompt": p, "input": f"user: {p}", "tokens": 5 + i, "stopped": "end", "raw": f"{t}</s>", "cleaned": t}
            | {"repetition": repetitions[t]}
            | (
                {"base": {"tokens": 15 + i, "stopped": "end", "raw": f"{a}</s>", "cleaned": a, "repetition": 0.0}}
                if kl
                else {}
            )
            for i, (p, t, a) in enumerate(zip(samples.SAMPLE_PROMPTS, texts, answers, strict=True))
        ],
        "settings": {"device": "cpu", "dtype": "float32"},
    }
    for name, value in (("eval_summary", summary), ("sample_generations", generations)):
        jsonschema.validate(value, json.loads((ROOT / "schemas" / f"{name}.schema.json").read_text("utf-8")))
    contents = {card.SUMMARY: summary, card.SAMPLES: generations}
    add_files(repo, {name: ("document", json.dumps(value).encode()) for name, value in contents.items()})


def layered(path: Path, widths: tuple[int, ...], layers: int = 3, **quantization: Any) -> Path:
    """A repository with some layers whose weights have `widths` in turn, an 8-bit embedding and norms."""
    rng = np.random.default_rng(7)
    knobs = {"method": "turboquant_mse", "bits": widths[0], "seed": 42, "rotation": "none", "vector_length": None}
    knobs |= {"grid_size": 8193, "iterations": 96, "scale_dtype": "auto", "include": [], "exclude": []}
    knobs |= {
        "extra": {"preset": "fast", "window": None},
        "protected_names": [],
        "protected_fragments": ["embed_tokens"],
        "protected_bits": 8,
    }
    base = {"id": "org/base-1", "revision": "0123abc", "license": "apache-2.0"}
    options = {"base_model": base, "quantization": knobs | quantization, "generator": "reference_quantizer 1.0.0"}
    with new_writer(path, pipeline_tag="text-generation", **options) as writer:
        writer.add_transform("i", "identity", 1)
        for bits in sorted({*widths, 8}):
            writer.add_codebook(f"c{bits}", np.linspace(-2, 2, 1 << bits).tolist())

        def add(name: str, shape: list[int], bits: int, **extra: Any) -> None:
            stage = random_stage(rng, shape, bits=bits, codebook=f"c{bits}", transform="i")
            extra |= {"relative_error": float(f"{4.0**-bits * rng.uniform(2.0, 3.0):.6g}")}
            writer.add_quantized(name, shape, "BF16", [stage], extra=extra)

        add("model.embed_tokens.weight", [40, 16], 8, protected=True)
        names = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
        for k, name in enumerate(f"model.layers.{i}.{name}.weight" for i in range(layers) for name in names):
            add(name, [24, 32], widths[k % len(widths)])
        for i in range(layers):
            writer.add_passthrough(f"model.layers.{i}.norm.weight", np_norm(rng))
        writer.tie("lm_head.weight", "model.embed_tokens.weight")
        writer.add_file(b"{}", "support", "config.json")
        writer.add_file(b'{"chat_template": "x"}', "support", "tokenizer_config.json")
        writer.add_file(stamped_loader(), "code", "load_quantized.py")
        return writer.finish()


def np_norm(rng: np.random.Generator) -> Any:
    import torch

    return torch.from_numpy(rng.normal(size=16)).bfloat16()


def make(case: str, path: Path) -> Path:
    """One of the kinds of repository that a card must fit."""
    if case == "uniform":
        evaluation(layered(path, (4,)), 1.5, more=True)
    elif case == "sound, no KL":
        evaluation(layered(path, (4,)), 1.01, kl=False)
    elif case == "mixed, collapsed":
        calibration = {"source": "self", "texts": 4, "tokens": 8192, "extra": {"names": ["self"], "length": 512}}
        extra = {"preset": "balanced", "window": None, "inputs": "quantized", "activation_order": False}
        extra |= {"output_feedback": True}
        knobs = {"method": "feedback", "extra": extra}
        evaluation(layered(path, (3, 2, 4), allocation=ALLOCATION, calibration=calibration, **knobs), 8.5)
    else:  # another writer, no evaluation, no licence, several shards, every feature
        options = {"base_model": {"id": "a local model"}, "max_shard_bytes": 3000}
        with new_writer(path, "image-text-to-text", **options) as writer:
            every_setting(writer)
            writer.finish()
    return path


CASES = ("uniform", "sound, no KL", "mixed, collapsed", "foreign")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The kind, and a repository of that kind with its card."""
    repo = make(request.param, tmp_path_factory.mktemp("card") / "repo")
    card.write_card(repo)
    return request.param, repo


# ------------------------------------------------------------------------------------------------ recomputation


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,} B"


def stored_sizes(repo: Path, manifest: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Storage name -> dtype and bytes, from the headers of the payload files."""
    found = {}
    for name, file in manifest["files"].items():
        if file["role"] == "payload":
            data = (repo / name).read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            for key, entry in json.loads(data[8 : 8 + length]).items():
                if key != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[key] = entry["dtype"], end - begin
    return found


def rows_of(repo: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each weight."""
    sizes, rows = stored_sizes(repo, manifest), []
    for name, entry in manifest["tensors"].items():
        stages = entry.get("stages", [])
        numbers = ("scales", "outer_scales", "offsets", "outer_offsets")
        codes = sum(sizes[s["codes"]][1] for s in stages)
        scales = sum(sizes[s[key]][1] for s in stages for key in numbers if s.get(key))
        scales += sizes[entry["column_scale"]][1] if entry.get("column_scale") else 0
        data = sizes[entry["data"]][1] if "data" in entry else 0
        n = math.prod(entry["shape"])
        row = {"name": name, "n": n, "original": n * SIZES[entry["dtype"]], "codes": codes, "scales": scales}
        row |= {"stored": codes + scales + data, "bits": entry.get("effective_bits"), "kind": entry["kind"]}
        row |= {"shape": " x ".join(map(str, entry["shape"])), "label": name.removesuffix(".weight").split(".")[-1]}
        row |= {"error": entry.get("extra", {}).get("relative_error"), "stages": stages}
        rows.append(row | {"protected": entry.get("extra", {}).get("protected", False)})
    return rows


def rate(rows: list[dict[str, Any]]) -> str:
    n = sum(r["n"] for r in rows)
    return f"{8 * sum(r['stored'] for r in rows) / n if n else 0:.3f}"


def error(rows: list[dict[str, Any]]) -> str:
    n = sum(r["n"] for r in rows)
    if not n or any(r["error"] is None for r in rows):
        return "unknown"
    return f"{sum(r['error'] * r['n'] for r in rows) / n:.3g}"


def line(*cells: Any) -> str:
    """A row of a table; integers with separators."""
    return "| " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |\n"


def widths_text(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{b:g} bit: {n:,}" for b, n in sorted(Counter(r["bits"] for r in rows).items()))


def expected(repo: Path) -> list[str]:
    """Every line and phrase of the card that holds a number."""
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    return [
        *expected_of_weights(repo, manifest),
        *expected_of_settings(manifest),
        *expected_of_files(repo, manifest),
        *expected_of_verdict(repo),
        *expected_of_evaluation(repo, manifest),
    ]


def expected_of_weights(repo: Path, manifest: dict[str, Any]) -> list[str]:
    rows, a = rows_of(repo, manifest), manifest["accounting"]
    quantized = [r for r in rows if r["kind"] == "quantized"]
    scalars = sum(r["n"] for r in rows)
    original, payload = sum(r["original"] for r in rows), sum(n for _, n in stored_sizes(repo, manifest).values())
    files = [f["size"] for f in manifest["files"].values() if f["role"] == "payload"]
    per_quantized, per_weight = rate(quantized), f"{8 * sum(files) / scalars:.3f}"
    kept = [r for r in rows if r["kind"] == "passthrough"]
    both = f"{per_quantized} bits per weight in the quantized tensors, {per_weight} over the whole payload"
    primary = f"{manifest['quantization']['bits']:g} bit"
    body = sorted({r["bits"] for r in quantized if not r["protected"]})
    width = f"{body[0]:g} bit" if len(body) == 1 else f"mixed {body[0]:g} to {body[-1]:g} bit"
    name = manifest["base_model"]["id"]
    embedding = [r for r in rows if r["label"] in ("embed_tokens", "lm_head")]
    other = [r for r in quantized if r not in embedding]
    rest = [r for r in kept if r not in embedding]
    tables = payload - sum(r["stored"] for r in rows)

    def share(n: int) -> str:
        return f"{100 * n / payload:.2f} %"

    def part(label: str, before: int, n: int) -> str:
        return line(label, before, n, share(n))

    books = Counter(key for r in quantized for key in {s["codebook"] for s in r["stages"]})
    turns = Counter(key for r in quantized for key in {s["transform"] for s in r["stages"]})
    shown = sorted(
        rows, key=lambda r: (-r["n"], [s.zfill(9) if s.isdigit() else s for s in re.split(r"(\d+)", r["name"])])
    )[:12]
    lengths = sorted(
        {s.get("vector_length") or manifest["tensors"][r["name"]]["shape"][-1] for r in quantized for s in r["stages"]}
    )
    scale_dtypes = Counter(stored_sizes(repo, manifest)[s["scales"]][0] for r in quantized for s in r["stages"])
    trellis = sum(any((s.get("window") or s["bits"]) > s["bits"] for s in r["stages"]) for r in quantized)
    q = manifest["quantization"]
    found = [
        f"# {name.split('/')[-1]}, {width}, tqformat\n",
        f"`{name}` with its weights quantized to {width} by `{q['method']}`: {size(original)} became {size(payload)}. That is {both},",
        line("Method", f"`{q['method']}`, primary width {primary}"),
        line("Widths present", f"{widths_text(quantized)} (tensors)"),
        line("Bits per weight, quantized tensors", per_quantized),
        line("Bits per weight, whole payload", f"{per_weight} (base: {8 * original / scalars:.3f})"),
        line("Tensors", f"{len(quantized)} quantized, {len(kept)} kept unchanged"),
        line(
            "Size", f"{size(payload)} from {size(original)}, ratio {a['ratio']:.3f}, {size(original - payload)} saved"
        ),
        line("Mean relative squared error", error(quantized)),
        line("Primary width", f"{primary}; {both}"),
        line(
            "Vector length",
            f"{'the whole row' if 'vector_length' in q else 'not stated'}; present: {', '.join(map(str, lengths))}",
        ),
        line(
            "Scale dtype",
            f"{q.get('scale_dtype') or 'not stated'} requested; "
            + ", ".join(f"{d}: {n}" for d, n in sorted(scale_dtypes.items())),
        ),
        line("Trellis", f"{trellis} tensors") if trellis else "",
        line(
            "Weights covered", f"{sum(r['n'] for r in quantized):,} quantized, {sum(r['n'] for r in kept):,} unchanged"
        ),
        line("Original bytes", original),
        line("Stored bytes", payload),
        line("Bytes saved", original - payload),
        line("Compression ratio", f"{original / payload:.3f}"),
        line("Payload files, headers included", f"{sum(files):,} bytes in {len(files)}"),
        line("Quantized tensors", len(quantized)),
        line("Unchanged tensors", len(kept)),
        line("Quantized weights", sum(r["n"] for r in quantized)),
        line("Unchanged weights", sum(r["n"] for r in kept)),
        line("Tied names, stored once", len(manifest.get("tied_weights", {}))),
        line("Bits per weight, whole payload", per_weight),
        f"Decoded weights are {', '.join(sorted({t['dtype'] for t in manifest['tensors'].values()}))}:",
        line("decoded", original),
        line("packed, where the model takes each weight as it is stored", payload),
        f"The whole payload has {per_weight} bits per weight.",
        part("embeddings and output head", sum(r["original"] for r in embedding), sum(r["stored"] for r in embedding)),
        part("other quantized weights: codes", sum(r["original"] for r in other), sum(r["codes"] for r in other)),
        part("other quantized weights: scales", 0, sum(r["scales"] for r in other)),
        part("other tensors, kept unchanged", sum(r["original"] for r in rest), sum(r["stored"] for r in rest)),
        part("shared tables: codebooks, rotations", 0, tables),
    ]
    for label in dict.fromkeys(r["label"] for r in quantized):
        of = [r for r in quantized if r["label"] == label]
        found.append(line(f"`{label}`", widths_text(of), sum(r["n"] for r in of), rate(of), error(of)))
    for bits in sorted({r["bits"] for r in quantized}):
        of = [r for r in quantized if r["bits"] == bits]
        found.append(
            line(f"{bits:g} bit", len(of), sum(r["n"] for r in of), sum(r["stored"] for r in of), rate(of), error(of))
        )
    for r in shown:
        bits = f"{r['bits']:g}" if r["bits"] is not None else ""
        found.append(line(f"`{r['name']}`", r["kind"], bits, r["shape"], r["n"], r["stored"], rate([r])))
    for key, book in manifest["codebooks"].items():
        found.append(line(f"`{key}`", book["entries"], book["dimension"], "not stated", books[key]))
    for key, turn in manifest["transforms"].items():
        found.append(line(f"`{key}`", turn["kind"], turn["size"], turns[key]))
    protected = [r for r in quantized if r["protected"]]
    matching = [r for r in kept if any(f in r["name"] for f in q.get("protected_fragments", []))]
    found += [
        line("Quantized under the rule", len(protected)),
        line("Matching and kept unchanged", len(matching)),
        line("Wider than the primary width by the rule", sum(r["bits"] > q["bits"] for r in protected)),
    ]
    if q.get("protected_fragments"):
        found.append(line("Protected weights are", f"quantized at {q['protected_bits']} bit"))
    found += [line(f"`{r['name']}`", f"{r['bits']:g}", rate([r]), error([r])) for r in protected]
    free = [r for r in quantized if not r["protected"]]
    if q.get("allocation"):
        entry, above, below = q["allocation"], [], []
        for r in free:
            (above if r["bits"] > q["bits"] else below if r["bits"] < q["bits"] else []).append(f"- `{r['name']}`\n")
        extra = entry["extra"]
        found += [
            line("Target, bits per weight", f"{entry['target_bits']:g}"),
            line("Candidate widths", ", ".join(f"{b:g}" for b in entry["candidate_bits"])),
            line("Target, bytes", extra["target_bytes"]),
            line("Bytes of the chosen widths", extra["stored_bytes"]),
            line("Predicted loss of the chosen widths (KL, nats)", f"{extra['objective']:.3g}"),
            line("Uniform width compared with", extra["uniform_bits"]),
            line("Tokens of that text", extra["tokens"]),
            line("Tensors above the primary width", len(above)),
            line("Tensors below the primary width", len(below)),
            *above,
            *below,
        ]
    elif {r["bits"] for r in free} == {q["bits"]}:
        found.append(f"has the primary width of {primary}, protected ones apart ({both})")
    return found


def expected_of_settings(manifest: dict[str, Any]) -> list[str]:
    q, base = manifest["quantization"], manifest["base_model"]
    found = [line("Written by", f"`{manifest['generator']}`"), f"It was written by `{manifest['generator']}`, whose"]
    found.append(f"| Format | tqformat {manifest['format_version']}; features: ")
    if "seed" in q:
        found += [line("Seed", str(q["seed"])), line("Codebook grid", f"{q['grid_size']:,} points")]
        found += [line("Codebook iterations", q["iterations"])]
        link = f"[{base['id']}](https://huggingface.co/{base['id']})"
        found += [line("Base model", f"{link}, revision `{base['revision']}`"), line("Base model", f"`{base['id']}`")]
        found += [line("Base revision", f"`{base['revision']}`")]
        found += [line("Licence of the base", f"`{base['license']}`"), line("Base licence", f"`{base['license']}`")]
    if q.get("calibration"):
        c = q["calibration"]
        found.append(line("Calibration", f"{c['source']}, {c['texts']} texts, {c['tokens']:,} tokens"))
    return [text for text in found if "written by" not in text or "seed" not in q]


def expected_of_files(repo: Path, manifest: dict[str, Any]) -> list[str]:
    found = []
    for name, file in manifest["files"].items():
        data = (repo / name).read_bytes()
        found.append(f"| `{name}` | {len(data):,} | `{file['sha256'][:12]}` | ")
        if file["role"] == "payload":
            found.append(line(f"`{name}`", len(data), f"`{file['sha256']}`"))
    digests = {
        name: manifest["files"][name]["sha256"] for name in (card.SUMMARY, card.SAMPLES) if name in manifest["files"]
    }
    found.append(f"<!-- tqformat-card: {json.dumps(digests)} -->\n")
    return [*found, f"| `{MANIFEST}` | {(repo / MANIFEST).stat().st_size:,} |"]


def verdict(repo: Path) -> dict[str, Any]:
    """The suite's report."""
    run_python("-m", "conformance", "check", str(repo), "--json", str(repo.parent / "report.json"), check=True)
    return dict(json.loads((repo.parent / "report.json").read_text("utf-8")))


def expected_of_verdict(repo: Path) -> list[str]:
    found = verdict(repo)
    totals = found["totals"]
    return [
        f"{report.MARKS[0]}\nConformance, by `python -m conformance check`: **{found['verdict']}**\n{report.MARKS[1]}",
        *(
            f"| {level} | {name} | {state['state']}"
            for (level, state), name in zip(found["levels"].items(), card.LEVELS.values(), strict=True)
        ),
        f"Violations: {sum(found['counts'].values())}.",
        f"Judged: {totals['files']:,} files, {totals['weights']:,} weights, {totals['payload_tensors']:,} payload tensors, {totals['payload_bytes']:,} bytes",
    ]


def expected_of_evaluation(repo: Path, manifest: dict[str, Any]) -> list[str]:
    if card.SUMMARY not in manifest["files"]:
        return []
    e, s = (json.loads((repo / name).read_text("utf-8")) for name in (card.SUMMARY, card.SAMPLES))
    base, quantized, kl, top = e["base"], e["quantized"], e["kl_divergence"], e["top1_agreement"]
    error, further = e["perplexity_ratio_standard_error"], e.get("further_texts", [])
    b, p = base["perplexity"], quantized["perplexity"]
    rows = rows_of(repo, manifest)
    files = sum(f["size"] for f in manifest["files"].values() if f["role"] == "payload")
    scalars, original = sum(r["n"] for r in rows), sum(r["original"] for r in rows)
    agreement, cosine = f"{100 * top['rate']:.2f} %", f"{e['logit_cosine']['mean']:.6f}"
    data, settings = e["dataset"], e["settings"]
    found = [
        line("Perplexity", f"{b:,.4f} → {p:,.4f}, {p / b:.3f} ± {error:.3f} times the base's ({p - b:+,.4f})"),
        line("Same best next token as the base", agreement),
        line("Mean last-token logit cosine", cosine),
        line(
            "Measured on",
            f"`{data['id']}`, full pass ({e['windows']} windows, {e['scored_tokens']:,} tokens), as a sanity-test; so few windows give rough figures",
        ),
        line(
            "Average negative log-likelihood (nats)",
            f"{base['average_nll']:.6f}",
            f"{quantized['average_nll']:.6f}",
            "lower is better",
        ),
        line("Perplexity", f"{b:,.4f}", f"{p:,.4f}", "lower is better"),
        f"| Perplexity, quantized minus base | | {p - b:+,.4f} |",
        f"| Perplexity, quantized over base | | {p / b:,.4f} ± {error:,.4f} |",
        f"| Probability of the right token, mean change | | {100 * e['p_delta']['mean']:.2f} % |",
        f"of the change (RMS Δp) | | {100 * e['p_delta']['rms']:.2f} % |",
        f"| Same best next token | | {agreement} ({top['agreeing']:,} of {e['positions']:,} positions) |",
        f"| Mean last-token logit cosine | | {cosine} |",
        f"| Tokens scored | {e['scored_tokens']:,} | {e['scored_tokens']:,} |",
        f"| Windows scored | {e['windows']} | {e['windows']} |",
        f"| Bits per weight, whole payload | {8 * original / scalars:.3f} | {8 * files / scalars:.3f} |",
        line("Rows, tokens", f"{data['rows']} non-empty rows joined by two line feeds, {data['tokens']:,} tokens"),
        line("SHA-256 of the text", f"`{data['sha256']}`"),
        line("SHA-256 of the tokens", f"`{data['tokens_sha256']}`"),
        line("SHA-256 of the base's weights", f"`{e['base_weights_sha256']}`"),
        line("Window length, stride", f"{settings['max_length']}, {settings['stride']} tokens"),
        line("Windows", f"{e['windows']} (full pass)"),
        f"| Scored tokens | {e['scored_tokens']:,}: ",
        line("Positions compared", e["positions"]),
        f"| BOS token | token {settings['bos_token_id']} in front of each window",
        line("Arithmetic", f"{settings['dtype']} on cpu, {settings['batch']} windows at once"),
        line("Hardware", e["hardware"]["description"]),
        line("Libraries", ", ".join(f"{k} {v}" for k, v in e["libraries"].items())),
        line("Seconds", f"{e['seconds']:,.1f}"),
        line("Samples", f"{len(s['samples'])} prompts, greedy, at most {s['decoding']['max_new_tokens']} tokens"),
        *(
            line(f"`{prompt}`".replace("\n", "\\n"), f"{value:.6f}")
            for prompt, value in zip(e["logit_cosine"]["prompts"], e["logit_cosine"]["values"], strict=True)
        ),
    ]
    if kl:
        cells = f"{kl['mean']:.4f} nats (mean), {kl['p999']:.4f} (99.9th percentile)"
        found += [line("KL divergence from the base", cells)]
        found += [f"| KL divergence from the base, mean (nats) | | {kl['mean']:.6f} |"]
        labels = {"median": "median", "p99": "99th percentile", "p999": "99.9th percentile", "max": "largest"}
        found += [f"| KL divergence, {label} | | {kl[key]:.6f} |" for key, label in labels.items()]
    for text in further:
        data = text["dataset"]
        place = f"`{data['id']}` (a local file), {data['rows']} rows, {data['tokens']:,} tokens"
        found.append(line("Further text", f"{place}, SHA-256 `{data['sha256']}`, {text['windows']} windows"))
    for text in [e, *further] if further else []:
        of = [f"{text[model]['perplexity']:,.4f}" for model in ("base", "quantized")]
        ratio = f"{text['perplexity_ratio']:,.4f} ± {text['perplexity_ratio_standard_error']:,.4f}"
        found.append(line(f"`{text['dataset']['id']}`", text["windows"], *of, ratio))
    if further or "floor" in e:
        compared = [("quantized", text, text) for text in [e, *further]]
        compared += [("floor", text, text["floor"]) for text in [e, *further] if "floor" in text]
        for label, text, change in compared:
            divergence = [f"{change['kl_divergence'][key]:.6f}" for key in ("mean", "p99", "p999")]
            shares = [f"{100 * x:.2f} %" for x in (change["p_delta"]["rms"], change["top1_agreement"]["rate"])]
            found.append(line(f"{label}, on `{text['dataset']['id']}`", *divergence, *shares))
    if "floor" in e:
        found.append("computed in bfloat16 and compared with itself in float32")
    if p / b > 1.25:
        found.append(f"Its perplexity is {p / b:.2f} times the base's ({p:,.2f} against {b:,.2f}).")
    if p / b > 2:
        return [*found, f"with a perplexity {p / b:.2f} times the base's"]
    found.append(f"Greedy decoding, at most {s['decoding']['max_new_tokens']} tokens,")
    shown = {  # as Markdown that shows it as it is
        "The sky is blue.": "> The sky is blue.",
        "1. A coat\n\n  2. ```boots```": "> 1\\. A coat\n>\n> &nbsp;&nbsp;2\\. \\`\\`\\`boots\\`\\`\\`",
        LOOP: f"> {LOOP}",
        "- *Nothing* at all": "> \\- \\*Nothing\\* at all",
        "": "> *(nothing)*",
    }
    for sample in s["samples"]:
        block = f"### {sample['prompt']}\n\nQuantized, {sample['tokens']} tokens, ended by the model"
        block += f"{', **repeats itself**' if sample['cleaned'] == LOOP else ''}:\n\n"
        found.append(f"{block}{shown[sample['cleaned']]}\n\n")
        answer = sample.get("base")
        if answer and answer["cleaned"] != sample["cleaned"]:
            found.append(
                f"Base model, {answer['tokens']} tokens, ended by the model:\n\n{shown[answer['cleaned']]}\n\n"
            )
    return found


def configuration(repo: Path) -> dict[str, Any]:
    """The JSON block, from the files."""
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    found = {key: manifest[key] for key in ("format_version", "generator", "base_model", "loader_kind", "quantization")}
    bits = Counter(t["effective_bits"] for t in manifest["tensors"].values() if t["kind"] == "quantized")
    found["tensors_by_bits"] = {f"{b:g}": n for b, n in bits.items()}
    if card.SUMMARY in manifest["files"]:
        e, s = (json.loads((repo / name).read_text("utf-8")) for name in (card.SUMMARY, card.SAMPLES))
        found["evaluation"] = {key: e[key] for key in ("role", "dataset", "settings")}
        if "further_texts" in e:
            found["evaluation"]["further_datasets"] = [text["dataset"] for text in e["further_texts"]]
        found["samples"] = {key: s[key] for key in ("decoding", "settings")}
    return found


def metadata(repo: Path) -> dict[str, Any]:
    """The front matter, from the manifest."""
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    base, method = manifest["base_model"], manifest["quantization"]["method"]
    found: dict[str, Any] = {"library_name": "tqformat"}
    if base.get("license"):
        found["license"] = base["license"]
    if "/" in base["id"]:
        found |= {"base_model": base["id"], "base_model_relation": "quantized"}
    if manifest.get("pipeline_tag"):
        found["pipeline_tag"] = manifest["pipeline_tag"]
    quantized = [t for t in manifest["tensors"].values() if t["kind"] == "quantized"]
    tags = [f"{b:g}-bit" for b in sorted({t["effective_bits"] for t in quantized})]
    free = {t["effective_bits"] for t in quantized if not t.get("extra", {}).get("protected")}
    turbo = ["turboquant"] if manifest["generator"].startswith("reference_quantizer") else []
    mixed = ["mixed-precision"] if free != {manifest["quantization"]["bits"]} else []
    return found | {"tags": ["tqformat", "quantized", *tags, method, *turbo, *mixed]}


def parse_command(text: str) -> argparse.Namespace:
    """A command of the card as the command line reads it."""
    return command_line._parser().parse_args(shlex.split(text)[3:])


def expected_commands(repo: Path) -> list[str]:
    """The commands' lines, once each is found to mean what the manifest says."""
    text, manifest = (repo / "README.md").read_text("utf-8"), json.loads((repo / MANIFEST).read_text("utf-8"))
    found = re.findall(r"^\$ (python -m reference_quantizer (?:quantize|evaluate) .*)$", text, re.MULTILINE)
    return found if manifest["generator"].startswith("reference_quantizer") else []


def check(text: str, phrases: list[str], config: dict[str, Any], fields: dict[str, Any], commands: list[str]) -> None:
    """AssertionError unless every number of the card `text` is one that was recomputed, at its place."""
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front) == fields
    block = re.search(r"```json\n(.*?)\n```\n", rest, re.DOTALL)
    assert block and json.loads(block[1]) == config
    rest = rest.replace(block[0], "")
    for phrase in sorted([*phrases, *commands], key=len, reverse=True):
        assert phrase in rest or not phrase, phrase
        rest = rest.replace(phrase, "\n") if phrase else rest
    rest = CONSTANTS.sub("", rest)
    left = [found for found in rest.splitlines() if re.search(r"\d", found)]
    assert not left, left


def everything(repo: Path) -> tuple[list[str], dict[str, Any], dict[str, Any], list[str]]:
    return expected(repo), configuration(repo), metadata(repo), expected_commands(repo)


# ------------------------------------------------------------------------------------------------ tests


def test_every_number_is_recomputed(case: tuple[str, Path]) -> None:
    _, repo = case
    check((repo / "README.md").read_text("utf-8"), *everything(repo))


def test_decoding_is_told_as_in_the_specification(case: tuple[str, Path]) -> None:
    (formula,) = re.findall(r"^    (W = cast\(.*)$", (ROOT / "SPEC.md").read_text("utf-8"), re.MULTILINE)
    assert f"\n{formula}\n" in (case[1] / "README.md").read_text("utf-8")


def test_a_changed_digit_is_noticed(case: tuple[str, Path]) -> None:
    _, repo = case
    text, wanted = (repo / "README.md").read_text("utf-8"), everything(repo)
    digits = [m.start() for m in re.finditer(r"\d", CONSTANTS.sub(lambda m: "_" * len(m[0]), text))]
    assert len(digits) > 300
    for at in digits[::3]:
        changed = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        with pytest.raises((AssertionError, ValueError)):
            check(changed, *wanted)
    with pytest.raises(AssertionError):
        check(text + "\nIt is 7 times faster.\n", *wanted)


def test_the_verdict_holds_and_is_refreshed_in_place(case: tuple[str, Path]) -> None:
    _, repo = case
    before = (repo / "README.md").read_bytes()
    done = run_python("-m", "conformance", "check", str(repo), "--card")
    assert done.returncode == 0, done.stdout
    assert (repo / "README.md").read_bytes() == before


def without_related(text: str) -> str:
    """The card without its list of other methods."""
    before, heading, rest = text.partition("## Related work")
    assert heading and rest.count("](https://arxiv.org/abs/") >= 10
    return before + rest.partition("\n## ")[2]


def test_the_text_fits_the_case(case: tuple[str, Path]) -> None:
    kind, repo = case
    text = without_related((repo / "README.md").read_text("utf-8"))
    has = {
        "badly damaged": kind == "mixed, collapsed",
        "clearly worse": kind == "uniform",
        "was not measured": kind == "foreign",
        "Samples are left out": kind == "mixed, collapsed",
        "17 and 25 make 42.": kind in ("uniform", "sound, no KL"),
        "No calibration data was used": kind in ("uniform", "sound, no KL"),
        "does not record what text was used for calibration, if any": kind == "foreign",
        "| Calibration | not recorded |": kind == "foreign",
        "| Only these names | not stated |": kind == "foreign",
        "The base model answers the same.": kind == "uniform",
        "What the base model answers was not recorded.": kind == "sound, no KL",
        "rotated at random": False,
        "Uniform: no allocator is recorded": kind in ("uniform", "sound, no KL"),
        "| Allocator | fisher |": kind == "mixed, collapsed",
        "[arXiv:2210.17323]": kind == "mixed, collapsed",
        "[arXiv:2504.19874]": kind != "foreign",
        "AutoProcessor": kind == "foreign",
        "so this page names none": kind == "foreign",
        "apply_chat_template": kind != "foreign",
        f"]({figures.METRICS})": kind != "foreign",
        "python -m reference_quantizer quantize": kind != "foreign",
        "not an official release": True,
        "\n\nThe digests protect": True,  # a paragraph of its own
    }
    assert {phrase: phrase in text for phrase in has} == has


def test_the_commands_mean_what_the_manifest_says(case: tuple[str, Path]) -> None:
    kind, repo = case
    manifest, found = json.loads((repo / MANIFEST).read_text("utf-8")), expected_commands(repo)
    assert len(found) == (0 if kind == "foreign" else 2)
    if not found:
        return
    args = parse_command(found[0])
    recorded = manifest["quantization"]
    settings = find_settings(args).to_quantization()
    skipped = {"bits", "allocation", "calibration"} if "allocation" in recorded else set()
    assert {k: v for k, v in settings.items() if k in recorded.keys() - skipped} == {
        k: v for k, v in recorded.items() if k not in skipped
    }
    assert (args.source, args.revision) == (manifest["base_model"]["id"], manifest["base_model"]["revision"])
    if "allocation" in recorded:
        assert (args.target_bpw, list(args.candidate_bits), args.allocator) == (3.5, [2, 3, 4], "fisher")
        assert (args.calibration, args.calibration_tokens) == (["self"], 8192)
    args, e = parse_command(found[1]), json.loads((repo / card.SUMMARY).read_text("utf-8"))
    assert {k: getattr(args, k) for k in e["settings"].keys() - {"bos_token_id"}} == {
        k: v for k, v in e["settings"].items() if k != "bos_token_id"
    }
    texts = [e, *e.get("further_texts", [])]
    assert args.dataset == [text["dataset"]["id"] for text in texts]
    assert (args.kl, args.floor) == (e["kl_divergence"] is not None, "floor" in e)


def test_the_hub_reads_the_front_matter(case: tuple[str, Path]) -> None:
    from huggingface_hub import ModelCard

    kind, repo = case
    data = ModelCard.load(repo / "README.md").data
    assert data.library_name == "tqformat"
    assert data.base_model == (None if kind == "foreign" else "org/base-1")
    assert data.license == (None if kind == "foreign" else "apache-2.0")


def test_figures(case: tuple[str, Path]) -> None:
    kind, repo = case
    facts = card.card_facts(repo)
    drawn = figures.draw(facts)
    assert drawn == {name: (repo / name).read_bytes() for name in drawn}  # the same bytes again
    pages = {figures.LAYERS, figures.STORAGE} | (set() if kind == "foreign" else {figures.METRICS})
    assert set(drawn) == pages | {figures.vector_name(name) for name in pages}
    for name in pages:
        assert drawn[name].startswith(b"\x89PNG") and len(drawn[name]) < 100_000
        assert not re.search(rb"tEXt|tIME|iTXt", drawn[name])  # no date, no version
        with Image.open(io.BytesIO(drawn[name])) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(10**6)}
        wanted = {
            figures.LAYERS: figures.COLORS[0],
            figures.STORAGE: figures.PARTS[1],
            figures.METRICS: figures.QUANTIZED,
        }
        color = [int(wanted[name][i : i + 2], 16) for i in (1, 3, 5)]
        if (kind, name) != ("foreign", figures.LAYERS):  # which has no errors to draw
            assert min(max(abs(a - b) for a, b in zip(color, c, strict=True)) for c in colors) < 10, name
        svg = drawn[figures.vector_name(name)]
        assert ElementTree.fromstring(svg).tag.endswith("svg") and len(svg) < 100_000 and b"dc:date" not in svg
        text = (repo / "README.md").read_text("utf-8")
        assert f"]({name})\n" in text and f"([SVG]({figures.vector_name(name)}))" in text
    texts = "".join(ElementTree.fromstring(drawn[figures.vector_name(figures.STORAGE)]).itertext())
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    for key in ("original_bytes", "stored_bytes"):
        assert size(manifest["accounting"][key]) in texts
    if kind != "foreign":
        e = json.loads((repo / card.SUMMARY).read_text("utf-8"))
        texts = "".join(ElementTree.fromstring(drawn[figures.vector_name(figures.METRICS)]).itertext())
        for value in (f"{e['base']['perplexity']:,.2f}", f"{100 * e['top1_agreement']['rate']:.1f} %"):
            assert value in texts


def test_figures_of_many_weights_stay_small() -> None:
    weight = {"kind": "quantized", "scalars": 4096, "stack": "model.layers", "protected": False}
    kinds = [f"kind_{k}" for k in range(12)]
    weights = [
        weight | {"layer": i, "label": kind, "bits": 2 + (i + k) % 7, "error": 4.0 ** -(2 + (i + k) % 7)}
        for i in range(96)
        for k, kind in enumerate(kinds)
    ]
    found = figures.save(figures.LAYERS, figures.draw_layers(weights))
    assert len(found) == 2 and all(len(content) < 100_000 for content in found.values())


def test_layers_are_in_natural_order(tmp_path: Path) -> None:
    text = card.write_card(layered(tmp_path / "repo", (4,), layers=12)).read_text("utf-8")
    part = text.partition("### Largest tensors")[2].partition("## Artifact")[0]
    assert re.findall(r"layers\.(\d+)\.mlp\.up_proj", part) == [str(n) for n in range(4)]


def test_an_import_is_told(tmp_path: Path) -> None:
    """A model that was made from a quantized GGUF file is not made from the model that its card links to."""
    repo = layered(tmp_path / "repo", (4,), layers=1)
    facts = {"file": "a model.Q4_1.gguf", "tensor_types": {"F32": 3, "Q4_1": 9}, "quantized": True}
    edit_manifest(repo, lambda m: m["base_model"].update(extra={"imported_from": facts}))
    text = card.write_card(repo).read_text("utf-8")
    assert (
        "| Made from | `a model.Q4_1.gguf`, a GGUF file (F32: 3, Q4\\_1: 9), read as BF16; it was quantized before"
        in text
    )
    assert "$ python -m reference_quantizer quantize 'a model.Q4_1.gguf' OUT --base-model org/base-1 " in text


def test_the_statements_follow_from_the_manifest(tmp_path: Path) -> None:
    """Rotations, programs and calibration are claimed where they are recorded."""

    def text(name: str, **extra: Any) -> str:
        return card.write_card(layered(tmp_path / name, (4,), layers=1, **extra)).read_text("utf-8")

    assert "no program but the loader" in text("plain")
    unknown = text("balanced", method="feedback", extra={"preset": "balanced"})  # and no record of its text
    assert "No calibration data" not in unknown and "does not record what text was used for calibration" in unknown
    allocated = text("allocated", allocation=ALLOCATION)
    assert (
        "No calibration data" not in allocated and "| Calibration | for the allocator alone, see below |" in allocated
    )
    repo = layered(tmp_path / "code", (4,), layers=1)
    add_files(repo, {"modeling_x.py": ("code", b"")})
    assert "holds programs (`modeling_x.py`)" in card.write_card(repo).read_text("utf-8")


def test_a_card_names_the_evaluation_that_it_states(tmp_path: Path) -> None:
    repo = layered(tmp_path / "repo", (4,), layers=1)
    card.write_card(repo)
    assert not card.is_stale(repo)
    evaluation(repo, 1.1)  # a first one
    assert card.is_stale(repo)
    card.write_card(repo)
    assert not card.is_stale(repo)
    evaluation(repo, 1.2)  # another one
    assert card.is_stale(repo)
    (repo / "README.md").write_text("# Mine\n")
    assert not card.is_stale(repo)
    (repo / "README.md").unlink()
    assert not card.is_stale(repo)


def test_a_card_of_another_hand_is_kept(tmp_path: Path) -> None:
    repo = layered(tmp_path / "repo", (4,), layers=1)
    manifest = (repo / MANIFEST).read_bytes()
    (repo / "README.md").write_text("# Mine\n")
    with pytest.raises(TQFormatError, match=r"PATH\.COLLISION.*--overwrite"):
        card.write_card(repo)
    assert ((repo / "README.md").read_text(), (repo / MANIFEST).read_bytes()) == ("# Mine\n", manifest)
    first = card.write_card(repo, overwrite=True).read_bytes()
    assert card.write_card(repo).read_bytes() == first  # its own card is replaced, by the same
    text = card.write_card(repo, repo_id="me/mine").read_text("utf-8")
    assert 'tqformat.load("me/mine"' in text and "| Published by | `me` |" in text


def test_a_new_verdict_is_no_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in place of another one nor where there was none, below the text."""
    repo = layered(tmp_path / "repo", (4,), layers=1)
    for missing in (False, True):
        with monkeypatch.context() as patch:
            if missing:
                patch.setitem(sys.modules, "jsonschema", None)
            page = card.write_card(repo)
        page.write_text(report.with_verdict(page.read_text("utf-8"), "another line"), "utf-8")
        assert card.is_unedited(repo) and "another line" in page.read_text("utf-8")
        card.write_card(repo)
        page.write_text(page.read_text("utf-8").replace("Snapshot", "Facts"), "utf-8")
        assert not card.is_unedited(repo)
        with pytest.raises(TQFormatError, match="edited since"):
            card.write_card(repo)
        card.write_card(repo, overwrite=True)


def test_an_evaluation_of_other_weights_is_refused(tmp_path: Path) -> None:
    repo, other = (layered(tmp_path / name, (4,), layers=n) for name, n in (("repo", 1), ("other", 2)))
    evaluation(other, 1.1)
    add_files(repo, {card.SUMMARY: ("document", (other / card.SUMMARY).read_bytes())})
    with pytest.raises(TQFormatError, match=r"BIND\.DIGEST.*run the evaluation again"):
        card.write_card(repo)
    assert not (repo / "README.md").exists()


def test_without_the_suite_the_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = layered(tmp_path / "repo", (4,), layers=1)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    text = card.write_card(repo).read_text("utf-8")
    assert "Conformance was not judged: `jsonschema` was not installed" in text and report.MARKS[0] not in text


def test_a_broken_repository_is_called_broken(tmp_path: Path) -> None:
    repo = layered(tmp_path / "repo", (4,), layers=1)
    loader = (repo / "load_quantized.py").read_bytes()
    (repo / "load_quantized.py").write_bytes(loader[:-2] + b" \n")
    text = card.write_card(repo).read_text("utf-8")
    assert "does not conform" in text and "**tqformat 1.0: FAIL L1 " in text


@pytest.mark.parametrize("text", ["a`b", "x|y", "<b>", "two\nlines", "[a](b)", "*a*"])
def test_names_cannot_break_the_page(text: str) -> None:
    assert "\n" not in card.code(text) + card.plain(text)
    assert not re.search(r"(?<!\\)[|]", card.code(text)) and not re.search(r"(?<!\\)[*|<\[`]", card.plain(text))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = layered(tmp_path / "repo", (4,), layers=1)
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    assert command_line.main(["card", str(tmp_path / "none")]) == 1
    assert command_line.main(["card", str(repo), "--repo-id", "no id"]) == 1
    assert command_line.main(["card", str(repo)]) == 0
    out = capsys.readouterr()
    assert (
        "BIND.MISSING_FILE" in out.err and "SCHEMA.VALUE" in out.err and out.out == f"written: {repo / 'README.md'}\n"
    )


def test_how_calibrated_and_tuned_weights_are_told(tmp_path: Path) -> None:
    tuning = {"steps": 7, "batch": 4, "learning_rate": 0.003, "seed": 0, "dtype": "float32", "tokens": 14336}
    tuning |= {"held_out_sequences": 8, "held_out_kl": [0.51234, 0.40987]}
    extra = {"preset": "best", "window": 12, "inputs": "paired", "activation_order": True, "tuning": tuning}
    text = without_related(
        card.write_card(layered(tmp_path / "a", (4,), method="feedback_trellis", extra=extra)).read_text("utf-8")
    )
    assert "trained for 7 steps" in text and "went from 0.512 to 0.41." in text
    assert "--preset best --window 12 --tune-steps 7 " in text and "arXiv:2504.02692" in text
    assert "Not repeated in these commands" not in text
    assert "gradients" not in text and "--no-output-feedback" not in text  # it is not known
    extra |= {
        "inputs": "original",
        "activation_order": False,
        "tuning": tuning | {"learning_rate": 0.1, "best_step": 5},
    }
    extra |= {"output_feedback": True}
    text = without_related(
        card.write_card(layered(tmp_path / "b", (4,), method="feedback_trellis", extra=extra)).read_text("utf-8")
    )
    assert "--calibration-inputs original --no-activation-order --tune-steps 7 " in text
    assert "trained for 5 steps" in text  # after which nothing got better
    assert "makes up for" not in text and "2504.02692" not in text
    assert "moments of the gradients" in text and "2505.22988" in text and "output-feedback" not in text
    extra |= {"output_feedback": False, "codebook": "computed"}
    text = without_related(
        card.write_card(layered(tmp_path / "c", (4,), method="feedback_trellis", extra=extra)).read_text("utf-8")
    )
    assert " --window 12 --codebook computed " in text
    assert " --no-output-feedback " in text and "2505.22988" not in text
    assert "Not repeated in these commands: the options behind `extra`" in text


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_no_command_asks_for_what_is_refused(preset: str, tmp_path: Path) -> None:
    """`quantize` does not tune what needs no text; `tune` may have done so afterwards."""
    tuning = {"steps": 7, "batch": 4, "learning_rate": 0.003, "seed": 0, "dtype": "float32", "tokens": 14336}
    extra = {"preset": preset, "window": None, "tuning": tuning | {"held_out_kl": [0.5, 0.4]}}
    texts = {"source": "texts", "texts": 1, "tokens": 512, "extra": {"names": ["a.txt"]}}
    text = card.write_card(layered(tmp_path / "a", (4,), extra=extra, calibration=texts)).read_text("utf-8")
    (command,) = re.findall(r"^\$ (python -m reference_quantizer quantize .*)$", text, re.MULTILINE)
    args = parse_command(command)
    assert find_settings(args).preset == preset
    assert tuning_steps(args, find_settings(args), "text-generation") == (7 if preset == "balanced" else 0)
    assert args.calibration == (["a.txt"] if preset == "balanced" else None)
    assert ("Not repeated in these commands: the options behind `extra`" in text) == (preset == "fast")


@pytest.mark.parametrize("target", [3.5, 4, 4.0, 3.14159265])
def test_the_command_repeats_a_target_in_full(target: float) -> None:
    quantization = {"bits": 4, "allocation": {"allocator": "fisher", "target_bits": target, "candidate_bits": [2, 4]}}
    assert float(card._width_arguments(quantization)[1]) == target


def test_the_command_of_several_texts_names_what_they_share() -> None:
    settings: dict[str, Any] = {"max_length": 8, "stride": 4, "max_windows": None, "bos": "auto", "batch": 1}
    settings |= {"device": "cpu", "dtype": "float32"}

    def text(id: str, split: str | None, revision: str | None) -> dict[str, Any]:
        return {"dataset": {"id": id, "config": None, "split": split, "revision": revision}}

    def command(*texts: dict[str, Any]) -> argparse.Namespace:
        summary = {**texts[0], "further_texts": [*texts[1:]], "settings": settings, "kl_divergence": None}
        return command_line._parser().parse_args(card._evaluate_arguments("BASE", summary))

    args = command(text("a/b", "train", "1" * 40), text("file.txt", None, None))
    assert (args.dataset, args.split, args.dataset_revision) == (["a/b", "file.txt"], "train", "1" * 40)
    args = command(text("a/b", "train", "1" * 40), text("c/d", "train", "2" * 40))
    assert (args.dataset, args.split, args.dataset_revision) == (["a/b", "c/d"], "train", None)


def test_values_that_were_taken_over_are_told(tmp_path: Path) -> None:
    """The command `import` quantizes nothing: the card names the checkpoint and its format, and no method of this program."""
    repo = layered(tmp_path / "repo", (4,), layers=1, method="import_gptq", extra={})
    facts = {"format": "gptq", "id": "org/model-GPTQ", "tensor_types": {"gptq": 7, "unchanged": 2}, "quantized": True}
    edit_manifest(repo, lambda m: m["base_model"].update(extra={"imported_from": facts}))
    text = card.write_card(repo).read_text("utf-8")
    assert (
        "`org/model-GPTQ`, a checkpoint of the format `gptq`, in tqformat, at 4 bit: codes and scales were put in"
        in text
    )
    assert (
        "| Made from | `org/model-GPTQ`, a checkpoint of gptq (gptq: 7, unchanged: 2), whose values these are |" in text
    )
    (command,) = re.findall(r"reference_quantizer import (.*)", text)
    assert command.startswith("org/model-GPTQ OUT --base-model org/base-1") and "--bits" not in command
    assert "Online Vector Quantization" not in text and "\n- turboquant\n" not in text
