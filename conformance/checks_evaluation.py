"""Level L1, evaluation: what `eval_summary.json` and `sample_generations.json` say follows from what they hold, and the
model card states their figures (SPEC.md section 20).

A file is judged where the manifest lists it. What no judge can recompute without the models (the values of single
windows, the samples) is bound to the payload by its digests, and a card to the files by theirs.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import accumulate
from typing import Any

import jsonschema

from conformance import jsonio
from conformance.check import check
from conformance.checks_structure import NAMED
from conformance.findings import Finding, brief, join
from conformance.shape import validator
from conformance.subject import Subject

SUMMARY, SAMPLES, CARD = "eval_summary.json", "sample_generations.json", "README.md"
SCHEMAS = {SUMMARY: "eval_summary.schema.json", SAMPLES: "sample_generations.schema.json"}
MAX_SIZE = 16 * 2**20
MIN_WINDOWS = 2
GRAM = 16  # characters
MARKER, MARKER_END = "<!-- tqformat-card:", "-->"
TOLERANCE = 1e-6  # relative, of recomputed figures
KINDS = {
    "duplicate_key": "JSON.DUPLICATE_KEY",
    "integer": "JSON.NUMBER",
    "number": "JSON.NUMBER",
    "depth": "JSON.DEPTH",
}
KINDS |= {"encoding": "JSON.ENCODING", "surrogate": "JSON.ENCODING", "values": "LIMIT.MEMORY"}
BREACHES = {"additionalProperties": "SCHEMA.UNKNOWN_FIELD", "required": "SCHEMA.MISSING_FIELD", "type": "SCHEMA.TYPE"}
READABLE = (*NAMED, "path.type", "evaluation.json")
SHAPED = (*READABLE, "evaluation.shape")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")


def _present(repo: Subject) -> list[str]:
    return [name for name in SCHEMAS if repo.file_kinds.get(name) == "file"]


def _read(repo: Subject, name: str) -> dict[str, Any]:
    """The object in a file that `evaluation.json` found without fault."""
    value = jsonio.read_object(repo.folder.read(name, 0, repo.folder.size(name))).value
    assert value is not None
    return value


def _close(found: float, wanted: float, scale: float = 0.0) -> bool:
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    return math.isfinite(wanted) and abs(found - wanted) <= TOLERANCE * max(abs(wanted), scale)


@check("evaluation.json", "L1", "JSON.SYNTAX", "TQ-EVAL-1", "Run the evaluation again.", needs=(*NAMED, "path.type"))
def evaluation_json(repo: Subject) -> Iterator[Finding]:
    for name in _present(repo):
        if (size := repo.folder.size(name)) > MAX_SIZE:
            yield Finding(f"expected at most {MAX_SIZE} bytes, found {size}", file=name, code="LIMIT.SIZE")
            continue
        for found in jsonio.read_object(repo.folder.read(name, 0, size)).findings:
            yield Finding(found.message, found.pointer, name, found.offset, code=KINDS.get(found.kind))


@check("evaluation.shape", "L1", "SCHEMA.VALUE", "TQ-EVAL-1", "Write what the schema of the file asks for.", READABLE)
def evaluation_shape(repo: Subject) -> Iterator[Finding]:
    for name in _present(repo):
        if (role := repo.manifest["files"][name]["role"]) != "document":
            yield Finding(f"expected document, found {brief(role)}", join("files", name, "role"))
        schema = json.loads(files("schemas").joinpath(SCHEMAS[name]).read_text(encoding="utf-8"))
        for error in validator(schema).iter_errors(_read(repo, name)):
            code = BREACHES.get(str(error.validator))
            yield Finding(_message(error), join(*error.absolute_path), name, code=code)


def _message(error: jsonschema.ValidationError) -> str:
    value, rule = error.instance, str(error.validator)
    if rule == "required":
        return f"missing: {', '.join(key for key in error.validator_value if key not in value)}"
    if rule == "additionalProperties":
        known = error.schema["properties"].keys() if isinstance(error.schema, dict) else set()
        return f"unknown: {brief(', '.join(sorted(value.keys() - known)))}"
    return f"expected {rule} {brief(error.validator_value)}, found {brief(value)}"


@check("evaluation.subject", "L1", "EVAL.SUBJECT", "TQ-EVAL-1", "Evaluate the repository as it is now.", needs=SHAPED)
def evaluation_subject(repo: Subject) -> Iterator[Finding]:
    """The files are about this base model and these payload files."""
    payload = {name: repo.manifest["files"][name]["sha256"] for name in repo.payload_files}
    for name in _present(repo):
        value = _read(repo, name)
        if value["base_model"] != (wanted := repo.manifest["base_model"]["id"]):
            yield Finding(f"expected {brief(wanted)}, found {brief(value['base_model'])}", "/base_model", name)
        if value["payload"] != payload:
            message = "the payload files that were evaluated are not those of the manifest"
            yield Finding(message, "/payload", name)


def _counts(summary: dict[str, Any]) -> tuple[int, int, int] | None:
    """Windows, scored tokens and positions of the sliding windows, in closed form; None where there are no windows."""
    n, settings = summary["dataset"]["tokens"], summary["settings"]
    length, stride = settings["max_length"], settings["stride"]
    if stride > length or n < 2:
        return None
    windows = 1 + max(0, -(-(n - length) // stride))
    windows = min(windows, settings["max_windows"] or windows)
    end = min(n, (windows - 1) * stride + length)
    # the tokens up to `end` are new in one window each; the first of a window is without predecessor only where no other
    # window overlaps it
    return windows, end - windows, end - (1 if stride < length else windows)


def _texts(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pointer and figures of each text, with the settings, which all of them share."""
    yield "", summary
    for index, text in enumerate(summary.get("further_texts", [])):
        yield join("further_texts", index), {**text, "settings": summary["settings"]}


def _comparisons(text: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pointer and figures of what was compared with the base on a text: the quantized model, and the floor."""
    yield "", text
    if "floor" in text:
        yield "/floor", text["floor"]


@check("evaluation.windows", "L1", "EVAL.WINDOWS", "TQ-EVAL-2", "Write the recomputed count.", needs=SHAPED)
def evaluation_windows(repo: Subject) -> Iterator[Finding]:
    """The counts are those of the sliding windows over that many tokens."""
    if SUMMARY not in _present(repo):
        return
    summary = _read(repo, SUMMARY)
    for place, text in _texts(summary):
        counts = _counts(text)
        if counts is None:
            yield Finding("expected two tokens or more, and a stride of at most max_length", "/settings", SUMMARY)
            continue
        if counts[0] < MIN_WINDOWS:
            message = f"expected an evaluation of {MIN_WINDOWS} windows or more, found {counts[0]}"
            yield Finding(message, f"{place}/windows", SUMMARY)
        for key, wanted in zip(("windows", "scored_tokens", "positions"), counts, strict=True):
            if text[key] != wanted:
                yield Finding(f"expected {wanted}, found {text[key]}", f"{place}/{key}", SUMMARY)
        for inner, comparison in _comparisons(text):
            for key, values in comparison["window_results"].items():
                if values is not None and len(values) != counts[0]:
                    message = f"expected {counts[0]} values, found {len(values)}"
                    yield Finding(message, f"{place}{inner}/window_results/{key}", SUMMARY)
    if summary["settings"]["bos"] == "never" and summary["settings"]["bos_token_id"] is not None:
        yield Finding("expected null, as bos is never", "/settings/bos_token_id", SUMMARY)


def _weights(summary: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The scored tokens and the positions of each window; the counts have been judged."""
    settings, windows = summary["settings"], summary["windows"]
    first = min(summary["dataset"]["tokens"], settings["max_length"])
    end = summary["scored_tokens"] + windows
    new = [first] + [settings["stride"]] * (windows - 1)
    new[-1] -= sum(new) - end
    alone = settings["stride"] == settings["max_length"]
    return [n - 1 for n in new], [n - (alone or i == 0) for i, n in enumerate(new)]


@check(
    "evaluation.metrics",
    "L1",
    "EVAL.METRIC",
    "TQ-EVAL-3",
    "Write the recomputed figure.",
    needs=(*SHAPED, "evaluation.windows"),
)
def evaluation_metrics(repo: Subject) -> Iterator[Finding]:
    """Every figure follows from those of the windows."""
    if SUMMARY not in _present(repo):
        return
    summary = _read(repo, SUMMARY)
    cosine = summary["logit_cosine"]
    figures = [("/logit_cosine/mean", cosine["mean"], math.fsum(cosine["values"]) / len(cosine["values"]), 1.0)]
    for place, text in _texts(summary):
        figures += _below(place, _losses(text))
        _, positions = _weights(text)
        for inner, comparison in _comparisons(text):
            figures += _below(place + inner, _changes(comparison, positions))
            for pointer, message in _impossible(comparison, positions):
                yield Finding(message, place + inner + pointer, SUMMARY)
    for pointer, found, wanted, scale in figures:
        if not _close(found, wanted, scale):
            yield Finding(f"expected {wanted:.9g}, found {found:.9g}", pointer, SUMMARY)


Figures = Iterator[tuple[str, float, float, float]]  # pointer, value, recomputed value, scale of the tolerance


def _below(place: str, figures: Figures) -> Figures:
    return ((place + pointer, found, wanted, scale) for pointer, found, wanted, scale in figures)


def _losses(text: dict[str, Any]) -> Figures:
    """What the negative log-likelihoods of a text's windows give."""
    scored, positions = _weights(text)
    single = text["window_results"]
    for model in ("base", "quantized"):
        found = text[model]
        yield f"/{model}/average_nll", found["average_nll"], _mean(single[f"{model}_nll"], scored), 0.0
        wanted = math.exp(found["average_nll"]) if found["average_nll"] < 700 else math.inf
        yield f"/{model}/perplexity", found["perplexity"], wanted, 0.0
    base, quantized = (text[model]["perplexity"] for model in ("base", "quantized"))
    yield "/perplexity_delta", text["perplexity_delta"], quantized - base, max(base, quantized)
    yield "/perplexity_ratio", text["perplexity_ratio"], quantized / base, 0.0
    mean = _mean((q - b for b, q in zip(single["base_nll"], single["quantized_nll"], strict=True)), positions)
    squared, degrees = _mean(single["nll_delta_squared"], positions), max(1, text["positions"] - 1)
    wanted, scale = (quantized / base * math.sqrt(max(0.0, x) / degrees) for x in (squared - mean**2, squared))
    yield "/perplexity_ratio_standard_error", text["perplexity_ratio_standard_error"], wanted, scale


def _changes(comparison: dict[str, Any], positions: list[int]) -> Figures:
    """What the other results of the windows give."""
    single, p, top = comparison["window_results"], comparison["p_delta"], comparison["top1_agreement"]
    if comparison["kl_divergence"] is not None and single["kl"] is not None:
        yield "/kl_divergence/mean", comparison["kl_divergence"]["mean"], _mean(single["kl"], positions), 0.0
    yield "/top1_agreement/agreeing", top["agreeing"], sum(single["agreeing"]), 0.0
    yield "/top1_agreement/rate", top["rate"], top["agreeing"] / sum(positions), 0.0
    rms = math.sqrt(_mean(single["p_delta_squared"], positions))
    yield "/p_delta/mean", p["mean"], _mean(single["p_delta"], positions), rms
    yield "/p_delta/rms", p["rms"], rms, 0.0


def _impossible(comparison: dict[str, Any], positions: list[int]) -> Iterator[tuple[str, str]]:
    """Pointer and message of what no values of tokens could give."""
    kl, single = comparison["kl_divergence"], comparison["window_results"]
    if (kl is None) != (single["kl"] is None):
        yield "/kl_divergence", "expected null here and in /window_results/kl, or in neither"
    elif kl is not None:
        if max(single["kl"]) > kl["max"] * (1 + TOLERANCE):
            yield "/kl_divergence/max", "expected no window's mean above max"
        yield from _histogram(kl, sum(positions))
    for index, (found, most) in enumerate(zip(single["agreeing"], positions, strict=True)):
        if found > most:
            pointer = join("window_results", "agreeing", index)
            yield pointer, f"expected at most {most}, the window's positions, found {found}"
    for index, (found, mean) in enumerate(zip(single["p_delta_squared"], single["p_delta"], strict=True)):
        if found < mean**2 * (1 - TOLERANCE):
            pointer = join("window_results", "p_delta_squared", index)
            yield pointer, f"expected at least {mean**2:.9g}, the square of the mean, found {found:.9g}"


def _edge(index: int) -> float:
    """The lower end of a bin, in nats."""
    octave, quarter = divmod(index - 1, 4)
    return (4 + quarter) * 2.0 ** (octave - 26) if index > 0 else 0.0


def _histogram(kl: dict[str, Any], n: int) -> Iterator[tuple[str, str]]:
    """The bins hold all positions, and mean, quantiles and max lie where the bins have them."""
    counts: list[int] = kl["histogram"]
    last = len(counts) - 1
    if sum(counts) != n or not counts[-1]:
        message = f"expected {n} positions up to the last bin with any, found {sum(counts)} and {counts[-1]} in it"
        yield "/kl_divergence/histogram", message
        return
    ends = [*(_edge(i + 1) for i in range(last)), kl["max"]]
    bounds = {"max": (_edge(last), _edge(last + 1) if last < 128 else math.inf)}
    sums = (
        math.fsum(c * x for c, x in zip(counts, edges, strict=True)) for edges in (map(_edge, range(last + 1)), ends)
    )
    low, high = sums
    bounds["mean"] = low / n, high / n
    cumulated = list(accumulate(counts))
    for key, thousandths in (("median", 500), ("p99", 990), ("p999", 999)):
        rank, rest = divmod(thousandths * (n - 1), 1000)  # between this value and the next one, from 0
        first, second = (bisect_right(cumulated, r) for r in (rank, rank + (rest > 0)))
        bounds[key] = _edge(first), ends[second]
    for key, (low, high) in bounds.items():
        if not low * (1 - TOLERANCE) <= kl[key] <= high * (1 + TOLERANCE):
            yield f"/kl_divergence/{key}", f"expected {low:.6g} to {high:.6g} by the histogram, found {kl[key]:.6g}"
    if not kl["median"] <= kl["p99"] <= kl["p999"] <= kl["max"]:
        yield "/kl_divergence", "expected median <= p99 <= p999 <= max"


def _mean(values: Iterable[float], weights: list[int]) -> float:
    total = sum(weights)
    return math.fsum(v * (w / total) for v, w in zip(values, weights, strict=True)) if total else math.inf


@check("evaluation.samples", "L1", "EVAL.SAMPLE", "TQ-EVAL-4", "Write the text that the rule gives.", needs=SHAPED)
def evaluation_samples(repo: Subject) -> Iterator[Finding]:
    """The cleaned texts follow from the raw ones, and the lengths are possible."""
    if SAMPLES not in _present(repo):
        return
    generations = _read(repo, SAMPLES)
    most, special = generations["decoding"]["max_new_tokens"], generations["cleaning"]["special_tokens"]
    for index, sample in enumerate(generations["samples"]):
        for place, answer in (((), sample), (("base",), sample.get("base"))):
            if answer is None:
                continue
            if answer["cleaned"] != (wanted := _clean(answer["raw"], special)):
                message = f"expected {brief(wanted)}, found {brief(answer['cleaned'])}"
                yield Finding(message, join("samples", index, *place, "cleaned"), SAMPLES)
            if not _close(answer["repetition"], wanted_share := _repetition(answer["cleaned"]), 1.0):
                message = f"expected {wanted_share:.9g}, found {answer['repetition']:.9g}"
                yield Finding(message, join("samples", index, *place, "repetition"), SAMPLES)
            if answer["stopped"] == "length" and answer["tokens"] != most:
                message = f"expected {most}, found {answer['tokens']}"
                yield Finding(message, join("samples", index, *place, "tokens"), SAMPLES)
        if not generations["decoding"]["chat_template"] and sample["input"] != sample["prompt"]:
            yield Finding("expected the prompt, as there is no chat template", join("samples", index, "input"), SAMPLES)


def _repetition(text: str) -> float:
    """The share of the substrings of GRAM characters that stand in the text before."""
    seen: set[str] = set()
    total = len(text) - GRAM + 1
    for begin in range(total):
        seen.add(text[begin : begin + GRAM])
    return (total - len(seen)) / total if total > 0 else 0.0


def _clean(raw: str, special_tokens: list[str]) -> str:
    """The cleaned text by the rule that the schema states."""
    for token in special_tokens:
        raw = "".join(raw.split(token))
    kept: list[str] = []
    for line in _CONTROLS.sub("", raw).split("\n"):
        line = line.rstrip(" \t")
        if line or kept[-1:] != [""]:  # at most one empty line in a row
            kept.append(line)
    return "\n".join(kept).strip(" \t\n")


@check(
    "evaluation.card",
    "L1",
    "EVAL.CARD",
    "TQ-EVAL-5",
    "Write the card again from the files as they are (python -m reference_quantizer card REPO), or remove the line.",
    needs=NAMED,
)
def evaluation_card(repo: Subject) -> Iterator[Finding]:
    """The files whose figures the card states are the listed ones. Nothing else in the card is judged."""
    if repo.folder.kind(CARD) != "file":
        return
    for offset, line in _card_lines(repo.folder.read(CARD, 0, min(repo.folder.size(CARD), MAX_SIZE + 1))):
        stated = _stated(line)
        if stated is None:
            message = (
                f"expected {MARKER} {{FILE: SHA-256, ...}} {MARKER_END} with a JSON object, found {brief(line, 100)}"
            )
            yield Finding(message, None, CARD, offset)
        for name, digest in (stated or {}).items():
            listed = repo.manifest["files"].get(name, {"sha256": "no such file"})["sha256"]
            if digest != listed:
                message = f"the card states figures of {brief(name, 140)} with the digest {brief(digest, 80)}; "
                yield Finding(f"{message}`files` lists {listed}", None, CARD, offset)


def _card_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """The marked lines of a card, each with the offset at which it begins; a line that MAX_SIZE cuts is left out."""
    if len(data) > MAX_SIZE:
        data = data[: data.rfind(b"\n", 0, MAX_SIZE) + 1]
    offset = data.find(MARKER.encode())
    while offset >= 0:
        begin, end = data.rfind(b"\n", 0, offset) + 1, data.find(b"\n", offset)
        end = end if end >= 0 else len(data)
        line = data[begin:end].decode("utf-8", "replace").strip()
        if line.startswith(MARKER):  # and not a line that speaks of it
            yield begin, line
        offset = data.find(MARKER.encode(), end)


def _stated(line: str) -> dict[str, Any] | None:
    """The object in a marked line, None where it has another form."""
    if not line.endswith(MARKER_END):
        return None
    parsed = jsonio.read_object(line[len(MARKER) : -len(MARKER_END)].encode("utf-8"))
    return None if parsed.findings else parsed.value
