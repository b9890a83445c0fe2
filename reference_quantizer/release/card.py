"""The model card: README.md of a finished repository, with figures and the verdict of the conformance suite.

`card_facts` takes every number from the manifest, the payload headers and the evaluation files; `render` only formats them.
"""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import HUB_ID, file_sha256
from reference_quantizer.disk import CLOSED, FULL, add_documents, replace_text
from reference_quantizer.evaluation.windows import LOOP, ROUGH_WINDOWS
from reference_quantizer.libraries import is_installed, need
from reference_quantizer.planning.plan import EMBEDDINGS, HEADS
from reference_quantizer.release import figures
from reference_quantizer.release.report import LARGEST, natural, read_manifest
from tqformat.__main__ import size_text
from tqformat.load_quantized import DTYPES, LOADER_KINDS, MANIFEST, Repo, TQFormatError, Weight, open_repo, parse_json

CARD, SUMMARY, SAMPLES = "README.md", "eval_summary.json", "sample_generations.json"
STATE = ".release.json"  # hidden, so that it is no part of the release [TQ-REPO-5]
MARKER = (
    "<!-- tqformat card: written by `python -m reference_quantizer card`, which replaces it when it is run again -->"
)
EVALUATION = re.compile(r"^<!-- tqformat-card: (\{.*\}) -->$", re.MULTILINE)  # the evaluation that a card speaks of
DAMAGED, COLLAPSED = 1.25, 2.0  # perplexity ratios from which the card warns, and omits the samples
GENERATING = ("text-generation", "image-text-to-text", "text2text-generation")
VERDICT = re.compile(r"\s*<!-- tqformat verdict -->.*?<!-- end of tqformat verdict -->\s*", re.DOTALL)
LAYER = re.compile(r"(.*?)\.?\b(\d+)\.(.+)")  # stack of layers, index, what follows
LEVELS = {"L0": "structure", "L1": "binding", "L2": "data", "L3": "decode"}
PURPOSES = {
    SUMMARY: "what was measured, window by window",
    SAMPLES: "greedy samples, raw and cleaned",
    "load_quantized.py": "loader that needs nothing but this directory",
    "requirements.txt": "what the loader needs",
    "config.json": "architecture of the model",
    "generation_config.json": "defaults of generation",
    **figures.PURPOSES,
    **{figures.vector_name(name): "the same as a vector graphic" for name in figures.PURPOSES},
}
GENERATOR = "reference_quantizer "  # how the manifest names this program; a version follows
IMPORT = "import_"  # how the method of an import begins
KNOBS = ("rotation", "vector_length", "seed", "grid_size", "iterations", "scale_dtype", "protected_bits")
OPTIONAL: dict[str, Any] = dict.fromkeys(
    ("seed", "rotation", "vector_length", "grid_size", "iterations", "scale_dtype")
)
# Of what the reference quantizer puts into `extra`.
TOLD = ("dimension", "stages", "inputs", "output_feedback", "tuning")
OPTIONAL |= {"include": [], "exclude": [], "calibration": None, "allocation": None, "extra": {}}
ALLOCATION = {  # keys of allocation.extra in words
    "target_bytes": "Target, bytes",
    "stored_bytes": "Bytes of the chosen widths",
    "objective": "Predicted loss of the chosen widths (KL, nats)",
    "uniform_bits": "Uniform width compared with",
    "uniform_bytes": "Bytes at that uniform width",
    "uniform_objective": "Predicted loss at that uniform width (KL, nats)",
    "text": "Text that the sensitivities were measured on",
    "tokens": "Tokens of that text",
}
RELATED = (  # name, arXiv id, what it does
    ("TurboQuant", "2504.19874", "random rotations and optimal scalar quantizers, for vectors that arrive one by one"),
    ("GPTQ", "2210.17323", "column by column, each error made up for in the columns that follow"),
    ("AWQ", "2306.00978", "channels scaled by the activations, so that those that count lose less"),
    ("QuIP", "2307.13304", "incoherent weights and adaptive rounding (LDLQ)"),
    ("QuIP#", "2402.04396", "Hadamard rotations on both sides, codebooks on the E8 lattice"),
    ("QTIP", "2406.11235", "trellis-coded quantization after a random rotation"),
    ("AQLM", "2401.06118", "sums of entries of several learned codebooks"),
    ("HIGGS", "2411.17525", "Hadamard rotations and grids that are optimal for Gaussian weights"),
    ("QuaRot", "2404.00456", "rotations without outliers, for weights and activations alike"),
    ("SpinQuant", "2405.16406", "rotations that are learned"),
    ("GPTAQ", "2504.02692", "error feedback towards the outputs of the original model"),
    ("YAQA", "2505.22988", "rounding by the curvature of the whole model's prediction"),
)
ROLES = {"payload": "weights", "support": "copied from the base model", "code": "program", "document": "document"}
# What the Hub accepts as `license`; it refuses a card with another identifier, which goes into `license_name`.
HUB_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
""".split()  # noqa: SIM905 (a list literal takes a line for each)


def write_card(repo: Path, overwrite: bool = False, repo_id: str | None = None) -> Path:
    """Writes the figures and README.md into the finished repository `repo`; returns the card's path.

    A README.md that this function did not write, or that was edited since, is replaced only with `overwrite`
    (PATH.COLLISION). `repo_id` is the Hub id under which the repository will be published, if that is known; without, it is
    what the card before has.
    """
    need(CARD, "jinja2", "yaml", "matplotlib")
    card, before = repo / CARD, read_state(repo)
    if os.path.lexists(card) and not overwrite:
        if not (card.is_file() and MARKER in card.read_text("utf-8", "replace")):
            message = "this program did not write it; pass --overwrite to replace it"
            raise TQFormatError("PATH.COLLISION", str(card), message)
        if before.get("card", digest := text_sha256(card)) != digest:
            message = "it was edited since this program wrote it, and is out of date; move it away, or pass --overwrite"
            raise TQFormatError("PATH.COLLISION", str(card), message)
    repo_id = repo_id or before.get("repo_id")
    add_documents(repo, figures.draw(card_facts(repo)))
    text = render(card_facts(repo, repo_id), conformance(repo))  # the facts again: the figures are files now
    (repo / STATE).unlink(missing_ok=True)  # so that a card that is half done is never taken for one edited by hand
    replace_text(card, text)
    state = {"manifest": file_sha256(repo / MANIFEST), "repo_id": repo_id, "card": text_sha256(card)}
    replace_text(repo / STATE, json.dumps(state) + "\n")
    return card


def read_state(repo: Path) -> dict[str, Any]:
    """What was recorded when the card was written: digests of the manifest and of the card, and `repo_id`."""
    try:
        found = json.loads((repo / STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_unedited(repo: Path) -> bool:
    """Whether README.md is known to be as this program wrote it."""
    return (repo / CARD).is_file() and read_state(repo).get("card") == text_sha256(repo / CARD)


def text_sha256(card: Path) -> str:
    """The SHA-256 of a card without its verdict, which `python -m conformance check --card` may put there anew."""
    return hashlib.sha256(VERDICT.sub("\n", card.read_text("utf-8", "replace")).encode()).hexdigest()


def evaluation_mark(files: dict[str, Any]) -> str:
    """The line by which a card names the evaluation files whose figures it states; `files` is the manifest's table."""
    digests = {name: files[name]["sha256"] for name in (SUMMARY, SAMPLES) if name in files}
    return f"<!-- tqformat-card: {json.dumps(digests)} -->"


def is_stale(repo: Path) -> bool:
    """Whether the card in `repo` speaks of other evaluation files than the manifest lists; one without the line never is."""
    card = repo / CARD
    found = EVALUATION.search(card.read_text("utf-8", "replace")) if card.is_file() else None
    return found is not None and found[0] != evaluation_mark(read_manifest(repo)["files"])


# ------------------------------------------------------------------------------------------------ facts


def card_facts(path: Path, repo_id: str | None = None) -> dict[str, Any]:
    """Everything that the card states about the repository in `path`, as numbers and names."""
    raw = parse_json((path / MANIFEST).read_bytes(), MANIFEST)
    with open_repo(path, verify=False) as repo:
        named = sorted(repo.manifest.tensors.items(), key=lambda item: natural(item[0]))
        weights = [_weight(repo, name, weight) for name, weight in named]
        scale_dtypes = Counter(
            repo.spans[s.scales].dtype for w in repo.manifest.tensors.values() for s in w.stages or ()
        )
        manifest = repo.manifest
    quantization = OPTIONAL | raw["quantization"]
    quantization["extra"] = dict.fromkeys(TOLD) | quantization["extra"]
    if quantization["calibration"]:
        quantization["calibration"] = {"texts": 0, "tokens": 0} | quantization["calibration"]
    quantized = [w for w in weights if w["kind"] == "quantized"]
    summary, samples = (_evaluation(path, raw, name) for name in (SUMMARY, SAMPLES))
    payload = {name: file.size for name, file in manifest.files.items() if file.role == "payload"}
    totals = {key: sum(w[key] for w in weights) for key in ("scalars", "original", "stored")}
    accounting = raw["accounting"]
    bits = {
        "base": rate(totals["original"], totals["scalars"]),
        "quantized": rate(sum(w["stored"] for w in quantized), sum(w["scalars"] for w in quantized)),
        "payload": rate(sum(payload.values()), totals["scalars"]),
    }
    return {
        "manifest": {"pipeline_tag": None, "tied_weights": {}} | raw,
        "repo_id": repo_id,
        "base": {"revision": None, "license": None} | raw["base_model"],
        "imported": _imported(raw),
        "kept": _keeps_values(raw),
        "on_hub": bool(HUB_ID.fullmatch(raw["base_model"]["id"])),
        "model_class": LOADER_KINDS[raw["loader_kind"]],
        "generates": raw["loader_kind"] in GENERATING,
        "chat": _has_chat_template(path, raw["files"]),
        "quantization": quantization,
        "ours": raw["generator"].startswith(GENERATOR),
        "uncalibrated": _uses_no_text(raw),
        "rotated": any(raw["transforms"][id]["kind"] != "identity" for w in quantized for id in w["transforms"]),
        "programs": sorted(
            n for n, file in raw["files"].items() if file["role"] == "code" and n != "load_quantized.py"
        ),
        "turboquant": (raw["generator"].startswith(GENERATOR) and not _keeps_values(raw))
        or "turboquant" in quantization["method"],
        "accounting": accounting,
        "saved": accounting["original_bytes"] - accounting["stored_bytes"],
        "bits": bits,
        "dtypes": sorted({weight["dtype"] for weight in raw["tensors"].values()}),
        "trellis": sum(w["trellis"] for w in weights),
        "vector_lengths": sorted({g for w in weights for g in w["vector_lengths"]}),
        "width": _width(quantized, quantization["bits"]),
        "widths_present": dict(sorted(Counter(w["bits"] for w in quantized).items())),
        "error": mean_error(quantized),
        "payload": {"files": payload, "bytes": sum(payload.values())},
        "files": {name: file | {"purpose": _purpose(name, file["role"])} for name, file in raw["files"].items()},
        "manifest_bytes": (path / MANIFEST).stat().st_size,
        "weights": weights,
        "scale_dtypes": dict(sorted(scale_dtypes.items())),
        "widths": _groups(quantized, lambda w: w["bits"]),
        "projections": _groups(quantized, lambda w: w["label"]),
        "storage": _storage(weights, accounting),
        "largest": sorted(weights, key=lambda w: (-w["scalars"], natural(w["name"])))[:LARGEST],
        "tables": _tables(raw, weights),
        "allocation": _allocation(quantization, quantized),
        "protection": _protection(quantization, weights),
        "summary": summary,
        "samples": samples,
        "base_answers": samples is not None and all("base" in sample for sample in samples["samples"]),
        "texts": [] if summary is None else [summary, *summary.get("further_texts", [])],
        "loop": LOOP,
        "rough": summary is not None and summary["windows"] < ROUGH_WINDOWS,
        "quality": _quality(summary),
        "thresholds": {"damaged": DAMAGED, "collapsed": COLLAPSED},
        "figures": [name for name in figures.PURPOSES if name in raw["files"]],
        "commands": _commands(raw, summary),
        "more_options": _more_options(quantization),
        "configuration": _configuration(raw, quantized, summary, samples),
    }


def _imported(raw: dict[str, Any]) -> dict[str, Any] | None:
    """What the manifest says of the checkpoint that this program imported, with a `title`, if the weights are from one."""
    found = (raw["base_model"].get("extra") or {}).get("imported_from")
    if not (raw["generator"].startswith(GENERATOR) and isinstance(found, dict)):
        return None
    return (
        {"format": "gguf", "tensor_types": {}}
        | found
        | {"title": found.get("file") or found.get("id") or found.get("directory") or "?"}
    )


def _keeps_values(raw: dict[str, Any]) -> bool:
    """Whether this program took the values over from another format, and quantized nothing: the command `import`."""
    return raw["generator"].startswith(GENERATOR) and raw["quantization"]["method"].startswith(IMPORT)


def _uses_no_text(raw: dict[str, Any]) -> bool:
    """Whether the weights were quantized without any text: known of this program's preset `fast` without a target."""
    method = raw["quantization"]
    fast = raw["generator"].startswith(GENERATOR) and method.get("extra", {}).get("preset") == "fast"
    return fast and not method.get("calibration") and not method.get("allocation")


def rate(nbytes: int, scalars: int) -> float:
    """Bits per weight."""
    return 8 * nbytes / scalars if scalars else 0.0


def mean_error(weights: list[dict[str, Any]]) -> float | None:
    """Relative squared error averaged over the scalars of `weights`; None where one is unknown."""
    scalars = sum(w["scalars"] for w in weights)
    if not scalars or any(w["error"] is None for w in weights):
        return None
    return float(sum(w["error"] * w["scalars"] for w in weights) / scalars)


def _weight(repo: Repo, name: str, weight: Weight) -> dict[str, Any]:
    """A weight's place, size, bits and error."""

    def size(key: str) -> int:
        return repo.spans[key].end - repo.spans[key].begin

    stages, scalars = weight.stages or (), math.prod(weight.shape)
    numbers = [key for s in stages for key in (s.scales, s.outer_scales, s.offsets, s.outer_offsets) if key is not None]
    codes, scales = sum(size(s.codes) for s in stages), sum(map(size, numbers))
    column = size(weight.column_scale) if weight.column_scale is not None else 0
    found = LAYER.fullmatch(name)
    stack, layer, rest = (found[1], int(found[2]), found[3]) if found else ("", None, name)
    words = [word for word in rest.removesuffix(".weight").split(".") if not word.isdigit()]
    stored = codes + scales + column + (size(weight.data) if weight.data is not None else 0)
    return {
        "name": name,
        "kind": weight.kind,
        "embedding": name.endswith(EMBEDDINGS + HEADS),
        "stack": stack,
        "layer": layer,
        "label": words[-1] if words else name,
        "shape": list(weight.shape),
        "scalars": scalars,
        "original": scalars * DTYPES[weight.dtype],
        "codes": codes,
        "scales": scales + column,
        "stored": stored,
        "rate": rate(stored, scalars),
        "bits": weight.effective_bits,
        "trellis": any((s.window or s.bits) > s.bits for s in stages),
        "vector_lengths": sorted({s.vector_length or weight.shape[-1] for s in stages}),
        "codebooks": [s.codebook for s in stages],
        "transforms": [s.transform for s in stages],
        "error": weight.extra.get("relative_error"),
        "protected": bool(weight.extra.get("protected")),
    }


def _width(quantized: list[dict[str, Any]], primary: float) -> str:
    """The bit width in words; protected weights count only where there are no others."""
    body = [w for w in quantized if not w["protected"]] or quantized
    found = sorted({w["bits"] for w in body}) or [primary]
    return f"{found[0]:g} bit" if len(found) == 1 else f"mixed {found[0]:g} to {found[-1]:g} bit"


def _groups(weights: list[dict[str, Any]], key: Any) -> list[dict[str, Any]]:
    """Totals of the weights that share a key, in order of the key where it is a number, else of appearance."""
    keys = list(dict.fromkeys(key(w) for w in weights))
    if keys and not isinstance(keys[0], str):
        keys.sort()
    groups = []
    for k in keys:
        chosen = [w for w in weights if key(w) == k]
        totals: dict[str, Any] = {name: sum(w[name] for w in chosen) for name in ("scalars", "original", "stored")}
        counts = Counter(w["bits"] for w in chosen)
        totals |= {"key": k, "tensors": len(chosen), "error": mean_error(chosen)}
        totals |= {"widths": dict(sorted(counts.items())), "rate": rate(totals["stored"], totals["scalars"])}
        groups.append(totals)
    return groups


def _storage(weights: list[dict[str, Any]], accounting: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes by part, of the base and of the repository; the parts of each add up to its total in `accounting`."""
    embeddings = [w for w in weights if w["embedding"]]
    body = [w for w in weights if not w["embedding"] and w["kind"] == "quantized"]
    rest = [w for w in weights if not w["embedding"] and w["kind"] == "passthrough"]
    parts = [
        ("embeddings and output head", sum(w["original"] for w in embeddings), sum(w["stored"] for w in embeddings)),
        ("other quantized weights: codes", sum(w["original"] for w in body), sum(w["codes"] for w in body)),
        ("other quantized weights: scales", 0, sum(w["scales"] for w in body)),
        ("other tensors, kept unchanged", sum(w["original"] for w in rest), sum(w["stored"] for w in rest)),
        ("shared tables: codebooks, rotations", 0, accounting["stored_bytes"] - sum(w["stored"] for w in weights)),
    ]
    return [{"part": part, "original": original, "stored": stored} for part, original, stored in parts]


def _tables(raw: dict[str, Any], weights: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Codebooks and transforms, each with the number of weights that use it, the most used first."""
    found = {}
    for kind in ("codebooks", "transforms"):
        uses = Counter(key for w in weights for key in set(w[kind]))
        entries = [
            {"id": key, "uses": uses[key], "made_by": (entry.get("origin") or {}).get("method") or "not stated"} | entry
            for key, entry in raw[kind].items()
        ]
        found[kind] = sorted(entries, key=lambda entry: (-entry["uses"], natural(entry["id"])))
    return found


def _allocation(quantization: dict[str, Any], quantized: list[dict[str, Any]]) -> dict[str, Any]:
    """The allocator's record, and which unprotected weights have more or fewer bits than the primary width."""
    entry = quantization.get("allocation")
    body = [w for w in quantized if not w["protected"]]
    return {
        "entry": {"target_bits": None, "candidate_bits": []} | entry if entry else None,
        "extra": (entry or {}).get("extra", {}),
        "words": ALLOCATION,
        "uniform": {w["bits"] for w in body} <= {quantization["bits"]},
        "promoted": [w["name"] for w in body if w["bits"] > quantization["bits"]],
        "demoted": [w["name"] for w in body if w["bits"] < quantization["bits"]],
    }


def _protection(quantization: dict[str, Any], weights: list[dict[str, Any]]) -> dict[str, Any]:
    """The rules, and what became of the weights whose names they match."""
    names, fragments = (quantization.get(f"protected_{key}", []) for key in ("names", "fragments"))
    matching = [w for w in weights if w["name"] in names or any(f in w["name"] for f in fragments)]
    return {
        "names": names,
        "fragments": fragments,
        "bits": quantization.get("protected_bits"),
        "quantized": [w for w in weights if w["protected"] and w["kind"] == "quantized"],
        "kept": [w for w in matching if w["kind"] == "passthrough"],
        "wider": [w for w in weights if w["protected"] and (w["bits"] or 0) > quantization["bits"]],
    }


def _evaluation(path: Path, raw: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An evaluation file that the manifest lists, if there is one; BIND.DIGEST where it is about another payload."""
    if name not in raw["files"]:
        return None
    value = parse_json((path / name).read_bytes(), name)
    payload = {file: entry["sha256"] for file, entry in raw["files"].items() if entry["role"] == "payload"}
    if value.get("payload") != payload:
        advice = "it is about other payload files than those in the manifest; run the evaluation again"
        raise TQFormatError("BIND.DIGEST", name, advice)
    return value


def _quality(summary: dict[str, Any] | None) -> str:
    """How the perplexity stands to the base's: unknown, sound, damaged, collapsed."""
    if summary is None:
        return "unknown"
    ratio = summary["perplexity_ratio"]
    return "collapsed" if ratio > COLLAPSED else "damaged" if ratio > DAMAGED else "sound"


def _has_chat_template(path: Path, files: Iterable[str]) -> bool:
    if any("chat_template" in name for name in files):
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and "chat_template" in json.loads(
        config.read_bytes()
    )  # not strict: huge integers are usual


def _purpose(name: str, role: str) -> str:
    if name in PURPOSES:
        return PURPOSES[name]
    if role == "payload":
        return "codes, scales and unchanged tensors"
    if "chat_template" in name:
        return "chat template"
    if re.match("token|vocab|merges|special_tokens|added_tokens", name):
        return "tokenizer"
    if re.match("(?i)licen[cs]e|notice|copying|use_policy", name):
        return "terms of the base model"
    return ROLES[role]


def _commands(raw: dict[str, Any], summary: dict[str, Any] | None) -> list[str]:
    """The command lines that make and judge this repository; empty where another program made it."""
    if not raw["generator"].startswith(GENERATOR):
        return []
    base, quantization = raw["base_model"], raw["quantization"]
    imported = _imported(raw)
    source = imported["title"] if imported else base["id"] if HUB_ID.fullmatch(base["id"]) else "CHECKPOINT"
    command = "import" if _keeps_values(raw) else "quantize"
    arguments = [command, source, "OUT"] + ([] if source == base["id"] else ["--base-model", base["id"]])
    if base.get("revision"):
        arguments += ["--revision", base["revision"]]
    if command == "quantize":
        arguments += _quantize_arguments(quantization)
    program = "python -m reference_quantizer"
    commands = [f"{program} {shlex.join(arguments)}"]
    if summary:
        commands.append(f"{program} {shlex.join(_evaluate_arguments(source, summary))}")
    return [*commands, f"{program} card OUT", "python -m conformance check OUT"]


def _quantize_arguments(quantization: dict[str, Any]) -> list[str]:
    """The options of `quantize` that the manifest's record calls for."""
    arguments = _width_arguments(quantization)
    for key in KNOBS:
        if (value := quantization.get(key)) is not None:
            arguments += [f"--{key.replace('_', '-')}", str(value).lower()]
    lists = {"include": "include", "exclude": "exclude", "protected_names": "protect"}
    for key, option in (lists | {"protected_fragments": "protect-fragment"}).items():
        for value in quantization.get(key, []):
            arguments += [f"--{option}", value]
    return arguments


def _more_options(quantization: dict[str, Any]) -> list[str]:
    """The keys whose values came from options that `_commands` does not know."""
    calibration = quantization["calibration"]
    known = {"preset", "window", "codebook", "dimension", "stages", "inputs", "activation_order", "output_feedback"}
    given = {key for key, value in quantization["extra"].items() if value is not None}
    if tuning := quantization["extra"].get("tuning"):
        from reference_quantizer.job.tune import Settings  # torch takes seconds to import

        usual = asdict(Settings(steps=tuning["steps"], dtype=tuning["dtype"]))
        fast = quantization["extra"].get("preset") == "fast"  # which `quantize` does not tune
        texts = [
            (each or {}).get("extra", {}).get("names") for each in (tuning.get("calibration", calibration), calibration)
        ]
        known |= {"tuning"} if usual.items() <= tuning.items() and not fast and texts[0] == texts[1] else set()
    unknown = {
        "calibration": calibration and "names" not in calibration.get("extra", {}),
        "extra": given - known,
    }
    return [key for key, found in unknown.items() if found]


def _width_arguments(quantization: dict[str, Any]) -> list[str]:
    """The primary width or the target that an allocator was given, the preset, and the calibration of both."""
    allocation, calibration = (quantization.get(key) or {} for key in ("allocation", "calibration"))
    if stages := quantization.get("extra", {}).get("stages"):
        arguments = ["--stages", ",".join(map(str, stages))]
    elif not allocation:
        arguments = ["--bits", f"{quantization['bits']:g}"]
    else:
        target, nbytes = allocation.get("target_bits"), allocation.get("extra", {}).get("target_bytes")
        sizes = ["--target-bytes", str(nbytes)], ["--target-bpw", repr(target).removesuffix(".0")]
        arguments = list(sizes[target is not None])
        arguments += ["--candidate-bits", ",".join(f"{bits:g}" for bits in allocation.get("candidate_bits", []))]
        arguments += ["--allocator", allocation["allocator"]]
    bare = not any(quantization.get(f"protected_{key}") for key in ("names", "fragments"))
    if quantization.get("extra", {}).get("preset") == "fast" and bare and not allocation:
        arguments.append("--uniform")
    for key in ("preset", "window", "codebook", "dimension"):
        if (value := quantization.get("extra", {}).get(key)) is not None:
            arguments += [f"--{key}", str(value)]
    extra = quantization.get("extra", {})
    fast = extra.get("preset") == "fast"  # what was tuned then was so by `tune`, which has texts of its own
    arguments += ["--calibration-inputs", extra["inputs"]] if extra.get("inputs", "paired") != "paired" else []
    arguments += [] if extra.get("activation_order", True) else ["--no-activation-order"]
    if "output_feedback" in extra and extra["output_feedback"] != (extra.get("preset") == "best"):
        arguments += ["--output-feedback" if extra["output_feedback"] else "--no-output-feedback"]
    if extra.get("preset") == "best" or (extra.get("tuning") and not fast):
        arguments += ["--tune-steps", str((extra.get("tuning") or {"steps": 0})["steps"])]
    names = [] if fast and not allocation else calibration.get("extra", {}).get("names", [])
    for name in names:
        arguments += ["--calibration", name]
    return arguments + (["--calibration-tokens", str(calibration["tokens"])] if names else [])


def _evaluate_arguments(source: str, summary: dict[str, Any]) -> list[str]:
    texts, settings = [summary, *summary.get("further_texts", [])], summary["settings"]
    arguments = ["evaluate", source, "OUT"]
    for data in (text["dataset"] for text in texts):
        arguments += ["--dataset", data["id"] if not data["config"] else f"{data['id']}:{data['config']}"]
    for option in ("split", "dataset_revision"):  # one for all texts of the Hub, where each has its own revision
        values = {text["dataset"][option.removeprefix("dataset_")] for text in texts} - {None}
        arguments += [f"--{option.replace('_', '-')}", *values] if len(values) == 1 else []
    for key in ("max_length", "stride", "max_windows", "bos", "batch", "device", "dtype"):
        arguments += [f"--{key.replace('_', '-')}", str(settings[key])] if settings[key] is not None else []
    arguments += ["--no-kl"] if summary["kl_divergence"] is None else []
    return arguments + (["--floor"] if "floor" in summary else [])


def _configuration(
    raw: dict[str, Any],
    quantized: list[dict[str, Any]],
    summary: dict[str, Any] | None,
    samples: dict[str, Any] | None,
) -> dict[str, Any]:
    """What shaped the artifact and its evaluation, for the JSON block."""
    widths = Counter(w["bits"] for w in quantized)
    found = {key: raw[key] for key in ("format_version", "generator", "base_model", "loader_kind")}
    found |= {"quantization": raw["quantization"], "tensors_by_bits": {f"{b:g}": n for b, n in sorted(widths.items())}}
    if summary:
        found["evaluation"] = {key: summary[key] for key in ("role", "dataset", "settings")}
        if further := summary.get("further_texts"):
            found["evaluation"]["further_datasets"] = [text["dataset"] for text in further]
    if samples:
        found["samples"] = {key: samples[key] for key in ("decoding", "settings")}
    return found


# ------------------------------------------------------------------------------------------------ conformance


def conformance(repo: Path) -> dict[str, Any]:
    """The report of `python -m conformance check` on `repo`; `missing` names a library without which it cannot run."""
    for library in ("conformance", "jsonschema"):
        if not is_installed(library):
            return {"missing": library, "violations": []}
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.json"
        command = [sys.executable, "-m", "conformance", "check", str(repo), "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True)
        for number in FULL + CLOSED:
            if os.strerror(number) in done.stderr:
                raise OSError(number, os.strerror(number), str(report))
        if not report.is_file():
            message = (
                f"the conformance check gave no report (exit status {done.returncode}): {done.stderr.strip()[-500:]}"
            )
            raise TQFormatError("INTERNAL.ERROR", str(repo), message)
        return {"missing": None} | json.loads(report.read_text("utf-8"))


# ------------------------------------------------------------------------------------------------ text


def front_matter(facts: dict[str, Any]) -> str:
    """The metadata that the Hub reads, as YAML."""
    import yaml

    base, manifest = facts["base"], facts["manifest"]
    fields: dict[str, Any] = {}
    if base["license"]:
        known = base["license"] in HUB_LICENSES
        fields |= {"license": base["license"]} if known else {"license": "other", "license_name": base["license"]}
    if facts["on_hub"]:
        fields |= {"base_model": base["id"], "base_model_relation": "quantized"}
    fields["library_name"] = "tqformat"
    if manifest["pipeline_tag"]:
        fields["pipeline_tag"] = manifest["pipeline_tag"]
    method = str(facts["quantization"]["method"])
    tags = ["tqformat", "quantized", *(f"{group['key']:g}-bit" for group in facts["widths"]), method]
    tags += ["turboquant"] if facts["turboquant"] else []
    tags += ["mixed-precision"] if not facts["allocation"]["uniform"] else []
    fields["tags"] = list(dict.fromkeys(tags))
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def render(facts: dict[str, Any], verdict: dict[str, Any]) -> str:
    """The text of README.md."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reference_quantizer.release"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "n": lambda value: f"{value:,}",
        "size": size_text,
        "fixed": fixed,
        "short": lambda value: "unknown" if value is None else f"{value:.3g}",
        "percent": lambda value: f"{100 * value:.2f} %",
        "code": code,
        "plain": plain,
        "quote": quote,
        "widths": lambda widths: ", ".join(f"{bits:g} bit: {count:,}" for bits, count in widths.items()),
        "configuration": configuration_text,
    }
    marks = f"{MARKER}\n{evaluation_mark(facts['manifest']['files'])}"
    names = {"facts": facts, "verdict": verdict, "marker": marks, "front_matter": front_matter(facts)}
    text = environment.get_template("card.md.j2").render(
        names | {"captions": figures.CAPTIONS, "levels": LEVELS, "related": RELATED}
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def fixed(value: float, digits: int) -> str:
    """A number with that many decimals, beyond a million in powers of ten: 1234.5 -> '1,234.50'."""
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}e}"


def code(text: str) -> str:
    """`text` as a Markdown code span that may stand in a table."""
    text = json.dumps(str(text), ensure_ascii=False)[1:-1].replace('\\"', '"').replace("\\\\", "\\").replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def plain(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def quote(text: str) -> str:
    """`text` as a Markdown quotation that wraps, and shows each line as it is."""
    lines = [_literal(line) for line in text.split("\n")]
    ends = ["\\" if line and after else "" for line, after in zip(lines, [*lines[1:], ""], strict=True)]  # a break
    return "\n".join(f"> {line}{end}".rstrip() for line, end in zip(lines, ends, strict=True))


def _literal(line: str) -> str:
    """A line as Markdown that shows it as it is, with its indentation."""
    words = line.lstrip(" \t")
    indent = "&nbsp;" * len(line[: len(line) - len(words)].expandtabs(4))
    words = re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", words)
    return indent + re.sub(r"^(?:(\d+)(?=[.)])|(?=[-+=]))", r"\1\\", words)  # no list, no line below a heading


def fence(text: str) -> str:
    """`text` as a fenced block."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def configuration_text(value: Any) -> str:
    """JSON with one line a key; of a list longer than LARGEST only the length is shown."""

    def shorten(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: shorten(inner) for key, inner in item.items()}
        if isinstance(item, list) and len(item) > LARGEST:
            return f"{len(item)} entries, in {MANIFEST}"
        return item

    text = json.dumps(shorten(value), indent=2, ensure_ascii=False)
    inner = re.compile(r"\[\n\s+([^\[\]{}]*?)\n\s+\]")  # lists of plain values fit on a line
    text = inner.sub(lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text)
    return fence(text).replace("text\n", "json\n", 1)
