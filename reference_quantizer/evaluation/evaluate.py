"""Evaluation of a repository against the checkpoint it was made from: perplexity, KL divergence, agreement, samples.

Both models are in memory and see the same windows, a batch at a time, so that the divergence is exact and no logits are
kept. What each window gave goes to a file in the cache, from which an interrupted run continues; the base's own results
stay there, under a name made from the content of everything they depend on. So does the floor: what arithmetic in bfloat16
alone makes of the base, whose divergence from the base in float32 no release can be told from, run in bfloat16.
"""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.checkpoint.source import Source, file_sha256, weights_sha256
from reference_quantizer.checkpoint.support import KINDS
from reference_quantizer.disk import add_documents, writing
from reference_quantizer.evaluation import samples
from reference_quantizer.evaluation.metrics import (
    Result,
    compare,
    next_logits,
    score_alone,
    summarize,
    summarize_change,
)
from reference_quantizer.evaluation.windows import LOOP, ROUGH_WINDOWS, Window, batches, sliding_windows
from reference_quantizer.model.base import (
    DTYPES,
    check_length,
    check_same_model,
    default_dtype,
    find_base,
    find_bos,
    load_base,
    running_models,
)
from reference_quantizer.model.machine import check_device, default_cache, hardware, libraries, locked
from reference_quantizer.model.text import Corpus, read_corpora, same_data
from reference_quantizer.progress import Progress
from tqformat.load_quantized import (
    Manifest,
    TQFormatError,
    load,
    load_tokenizer,
    read_manifest,
)

SCHEMA_VERSION = "1.0"
SUMMARY, SAMPLES = "eval_summary.json", "sample_generations.json"
ROLE = "sanity-test"  # of the data set: a small text that tells a sound model from a broken one, no benchmark
FLOOR = "bfloat16"  # the arithmetic whose rounding is the floor


@dataclass(frozen=True)
class Settings:
    """How to evaluate; what is None is chosen by `complete`."""

    max_length: int = 512
    stride: int | None = None
    max_windows: int | None = None
    bos: str = "auto"
    batch: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    kl: bool = True
    floor: bool = False

    def complete(self) -> "Settings":
        """With a stride of half a window, and the batch and dtype that suit the device: the CPU computes in float32."""
        batch = self.batch or (8 if self.device.startswith("cuda") else 1)
        stride = self.stride or max(1, self.max_length // 2)
        return replace(self, stride=stride, batch=batch, dtype=self.dtype or default_dtype(self.device))

    def to_dict(self) -> dict[str, Any]:
        """What the summary says about them; whether divergence and floor were measured shows by itself."""
        return {key: value for key, value in asdict(self).items() if key not in ("kl", "floor")}


@dataclass(frozen=True)
class Base:
    """What is kept of the base for later runs, and of which content."""

    key: str
    weights_sha256: str
    nll: np.ndarray | None = None  # [positions] float32
    top1: np.ndarray | None = None  # [positions] int32
    logits: Tensor | None = None  # [prompts, vocabulary] float32


@dataclass(frozen=True)
class Text:
    """One of the texts: what is read of it, and where its results go."""

    corpus: Corpus
    tokens: np.ndarray  # [tokens] int32
    windows: list[Window]
    kept: Base
    partial: Path

    @property
    def floor(self) -> Path:
        """The file of the floor's results, which stays in the cache."""
        return self.partial.with_name(f"floor-{self.kept.key}.jsonl")

    def to_dict(self) -> dict[str, Any]:
        """What the summary says about it."""
        return self.corpus.to_dict() | {"tokens": len(self.tokens), "tokens_sha256": tokens_sha256(self.tokens)}


def evaluate(
    base: str,
    repo: Path,
    datasets: Sequence[str],
    settings: Settings | None = None,
    *,
    split: str = "test",
    dataset_revision: str | None = None,
    base_revision: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates `repo` against the checkpoint `base` and writes both files into it; returns the summary.

    The first of `datasets` gives the figures that stand alone; each of the others gives its own beside them. Interrupted,
    the same call continues where it stopped. A GGUF file as `base` is imported into the cache and stays there.
    """
    settings = (settings or Settings()).complete()
    check_device(settings.device)
    manifest, cache = read_manifest(repo), cache_dir or default_cache()
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    corpora = read_corpora(datasets, split, dataset_revision)
    tokenizer = load_tokenizer(repo)
    cut = [cut_text(corpus, tokenizer, settings) for corpus in corpora]
    source = find_base(base, base_revision, cache, quiet)
    check_same_model(source, manifest)
    bos = find_bos(tokenizer) if settings.bos == "auto" else None
    payload, support = (file_digests(manifest, role) for role in ("payload", "support"))

    cache.mkdir(parents=True, exist_ok=True)
    texts = []
    for corpus, (tokens, windows) in zip(corpora, cut, strict=True):
        measured = asdict(replace(settings, kl=True, floor=False))
        kept = open_base(source, cache, [manifest.loader_kind, tokens_sha256(tokens), measured, bos])
        job = json.dumps([kept.key, payload, support, settings.kl])
        partial = cache / f"evaluation-{hashlib.sha256(job.encode()).hexdigest()[:32]}.partial"
        texts.append(Text(corpus, tokens, windows, kept, partial))
    with ExitStack() as stack:
        for text in texts:
            stack.enter_context(locked(text.partial.with_suffix(".lock")))
        stack.enter_context(running_models())
        model = load(repo, settings.device, DTYPES[settings.dtype or ""])
        check_length(model, settings.max_length + (bos is not None))
        base_model = None
        if settings.kl or any(text.kept.nll is None for text in texts):
            base_model = load_base(source, manifest.loader_kind, settings.dtype or "", settings.device)
        results = []
        for text in texts:
            runner = Runner(base_model, model, text.kept, text.tokens, text.windows, bos, settings)
            progress = Progress(len(text.windows), quiet, action="evaluating", unit="window")
            results.append(runner.run(text.partial, progress))
        before = time.monotonic()
        kept_logits = texts[0].kept.logits
        logits = kept_logits if base_model is None else samples.prompt_logits(base_model, tokenizer, settings.device)
        assert logits is not None  # kept together with the windows
        cosines = samples.cosines(logits, samples.prompt_logits(model, tokenizer, settings.device))
        if base_model is not None:
            for text, found in zip(texts, results, strict=True):
                save_base(cache, text.kept.key, found, logits)
        generated = samples.generate(model, base_model, tokenizer, settings.device)
        seconds = sum(r.seconds for found in results for r in found) + time.monotonic() - before
        del model, runner
        if settings.floor:
            floors = measure_floor(source, manifest.loader_kind, texts, bos, settings, base_model, quiet)

    subject = {"base_model": manifest.base_model["id"], "payload": payload}
    machine = {"hardware": hardware(settings.device), "libraries": libraries() | {"evaluation": code_version()}}
    entries = [
        {"dataset": text.to_dict(), **summarize(text.windows, found)}
        for text, found in zip(texts, results, strict=True)
    ]
    if settings.floor:
        for entry, text, found in zip(entries, texts, floors, strict=True):
            entry["floor"] = {"dtype": FLOOR, **summarize_change(text.windows, found)}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "role": ROLE,
        **subject,
        "support": support,
        "base_weights_sha256": texts[0].kept.weights_sha256,
        "settings": settings.to_dict() | {"bos_token_id": bos},
        **entries[0],
        **({"further_texts": entries[1:]} if entries[1:] else {}),
        "logit_cosine": {
            "prompts": list(samples.LOGIT_PROMPTS),
            "values": cosines,
            "mean": math.fsum(cosines) / len(cosines),
        },
        **machine,
        "seconds": round(seconds, 1),
    }
    generations = {"schema_version": SCHEMA_VERSION, **subject, **generated}
    generations |= {"settings": {"device": settings.device, "dtype": settings.dtype}, **machine}
    if read_manifest(repo).files != manifest.files:
        raise TQFormatError("BIND.DIGEST", str(repo), "the repository was changed while it was evaluated; run it again")
    add_documents(repo, {SUMMARY: to_text(summary), SAMPLES: to_text(generations)})
    for text in texts:
        text.partial.unlink(missing_ok=True)
    return summary


def measure_floor(
    source: Source, kind: str, texts: list[Text], bos: int | None, settings: Settings, base: Any, quiet: bool
) -> list[list[Result]]:
    """The base in float32 against itself in FLOOR, on the windows of each text; what the cache has is taken from there.

    `base`, if not None, is the base in `settings.dtype`, which is not loaded again. Weights that are no bfloat16 numbers
    are rounded to such, as they are where a model is loaded in bfloat16.
    """
    models: list[Any] = [None, None]
    if any(len(read_partial(text.floor)) < len(text.windows) for text in texts):
        for i, dtype in enumerate(("float32", FLOOR)):
            loaded = base is not None and settings.dtype == dtype
            models[i] = base if loaded else load_base(source, kind, dtype, settings.device)
    found, settings = [], replace(settings, kl=True)
    for text in texts:
        runner = Runner(*models, Base("", ""), text.tokens, text.windows, bos, settings)
        with locked(text.floor.with_suffix(".lock")):
            found.append(runner.run(text.floor, Progress(len(text.windows), quiet, action="floor", unit="window")))
    return found


def tokens_sha256(tokens: np.ndarray) -> str:
    """Of the tokens as little-endian int32."""
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


def cut_text(corpus: Corpus, tokenizer: Any, settings: Settings) -> tuple[np.ndarray, list[Window]]:
    """The tokens of the corpus, int32 [tokens], and its windows; SCHEMA.VALUE for fewer than two, which say nothing of a model."""
    with running_models():
        ids = tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"]
    settings = settings.complete()
    length, stride = settings.max_length, settings.stride or 0
    windows = sliding_windows(len(ids), length, stride, settings.max_windows)
    if settings.max_windows == 1:
        raise TQFormatError("SCHEMA.VALUE", "--max-windows", "expected at least 2, got 1")
    if len(windows) < 2:  # the first one ends where the text does, or beyond
        message = f"two windows of --max-length {length} and --stride {stride} take at least {length + 1} tokens"
        advice = "give a longer text, or a smaller --max-length"
        raise TQFormatError("SCHEMA.VALUE", corpus.id, f"{message}, the text has {len(ids)}; {advice}")
    return np.array(ids, dtype="<i4"), windows


def file_digests(manifest: Manifest, role: str) -> dict[str, str]:
    """SHA-256 of each file of the role: payload tells which weights an evaluation is about, support how they are run."""
    return {name: file.sha256 for name, file in manifest.files.items() if file.role == role}


@functools.cache
def code_version() -> str:
    """A digest of the source that decides the figures: this room's, and how models and texts are loaded."""
    rooms = Path(__file__).parent, Path(inspect.getfile(load_base)).parent
    paths = [path for room in rooms for path in sorted(room.glob("*.py"))] + [Path(inspect.getfile(load))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def is_current(
    repo: Path,
    base_weights_sha256: str,
    datasets: Sequence[str],
    settings: Settings,
    *,
    split: str = "test",
    dataset_revision: str | None = None,
) -> bool:
    """Whether both files in `repo` are whole and are those of this base, this repository, these texts and these settings,
    made by this version of the evaluation.
    """
    manifest, settings = read_manifest(repo), settings.complete()
    for name in (SUMMARY, SAMPLES):
        file = manifest.files.get(name)
        if file is None or not (repo / name).is_file() or file_sha256(repo / name) != file.sha256:
            return False
    summary, generations = (json.loads((repo / name).read_bytes()) for name in (SUMMARY, SAMPLES))
    found = {key: value for key, value in summary["settings"].items() if key != "bos_token_id"}
    texts = texts_of(summary)
    return (
        summary["payload"] == generations["payload"] == file_digests(manifest, "payload")
        and summary.get("support") == file_digests(manifest, "support")
        and summary["libraries"].get("evaluation") == code_version()
        and summary["base_weights_sha256"] == base_weights_sha256
        and found == settings.to_dict()
        and (summary["kl_divergence"] is not None) == settings.kl
        and (not settings.floor or all("floor" in text for text in texts))
        and len(texts) == len(datasets)
        and all(same_data(t["dataset"], d, split, dataset_revision) for t, d in zip(texts, datasets, strict=True))
    )


def texts_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of each text, of which the first stands in the summary itself."""
    return [summary, *summary.get("further_texts", [])]


# ------------------------------------------------------------------------------------------------ windows


class Runner:
    """Puts both models to the windows. Without `base`, the base's results are those that were kept."""

    def __init__(
        self,
        base: Any,
        model: Any,
        kept: Base,
        tokens: np.ndarray,
        windows: list[Window],
        bos: int | None,
        settings: Settings,
    ) -> None:
        self.base, self.model, self.kept, self.settings = base, model, kept, settings
        self.tokens, self.windows, self.bos = torch.from_numpy(tokens.astype(np.int64)), windows, bos
        self.starts = np.cumsum([0, *(w.predicted for w in windows)])  # of each window's positions

    def run(self, partial: Path, progress: Progress) -> list[Result]:
        """The result of each window; what `partial` holds is taken from it, the rest is appended batch by batch."""
        groups = list(batches(self.windows, self.settings.batch or 1))
        results = read_partial(partial)
        # a run that continues must batch as one that was never stopped: whole batches count, so that nothing differs
        ends = [0, *(group[-1] + 1 for group in groups)]
        done = max(end for end in ends if end <= len(results))
        size = sum(len(result.to_line()) for result in results[:done])
        results = results[:done]
        progress.advance(done)
        with writing(partial), open(partial, "ab") as file:
            file.truncate(size)
            for group in groups[ends.index(done) :]:
                found = self.score(group)
                file.write("".join(result.to_line() for result in found).encode())
                file.flush()
                results += found
                progress.advance(len(group))
        progress.close()
        return results

    def score(self, group: list[int]) -> list[Result]:
        """The results of the windows of one batch, which have one form."""
        start, first = time.monotonic(), self.windows[group[0]]
        rows = [self.tokens[self.windows[i].begin : self.windows[i].end] for i in group]
        ids = torch.stack(rows)  # [batch, length]
        targets = ids[:, first.length - first.predicted :].to(self.settings.device)  # [batch, predicted]
        if self.bos is not None:  # in front of the window, never scored: the same tokens are scored as without
            ids = torch.cat([torch.full((len(group), 1), self.bos), ids], 1)
        ids = ids.to(self.settings.device)
        quantized = next_logits(self.model, ids, first.predicted)
        base = None if self.base is None else next_logits(self.base, ids, first.predicted)
        results = []
        for row, index in enumerate(group):
            span = slice(self.starts[index], self.starts[index + 1])
            if base is not None:
                values = compare(base[row], quantized[row], targets[row], self.settings.kl)
            else:
                assert self.kept.nll is not None and self.kept.top1 is not None
                values = score_alone(quantized[row], targets[row], self.kept.nll[span], self.kept.top1[span])
            if not all(np.isfinite(values[key]).all() for key in ("base_nll", "quantized_nll")):
                raise TQFormatError("DATA.NON_FINITE", f"window {index}", "a model gives NaN or infinite logits")
            results.append(Result(**values, seconds=0.0))
        took = (time.monotonic() - start) / len(group)
        return [replace(result, seconds=round(took, 4)) for result in results]


def read_partial(path: Path) -> list[Result]:
    """The results in the file of an interrupted run; a torn last line is left out."""
    results: list[Result] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                result = Result.from_line(line)
            except (ValueError, KeyError, TypeError):
                break
            if result.to_line() != line:
                break
            results.append(result)
    return results


# ------------------------------------------------------------------------------------------------ cache


def open_base(source: Source, cache: Path, job: list[Any]) -> Base:
    """The base's results for `job`, with their arrays if an earlier run kept them.

    The name is made from content: of the weight files, the configuration, the tokens, the settings, and the code.
    """
    weights = weights_sha256(source)
    content = json.dumps([SCHEMA_VERSION, weights, job, code_version(), libraries()], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    path = cache / f"base-{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Base(key, weights, stored["token_nll"], stored["top1"], torch.from_numpy(stored["logits"]))
    except (OSError, ValueError, KeyError, EOFError):
        return Base(key, weights)
    except Exception as error:  # zipfile's own error for a file that was cut
        if type(error).__name__ != "BadZipFile":
            raise
        return Base(key, weights)


def save_base(cache: Path, key: str, results: list[Result], logits: Tensor) -> None:
    """Keeps the base's results for `open_base`; the file appears complete or not at all."""
    path = cache / f"base-{key}.npz"
    new = path.with_name(f".{path.name}.{os.getpid()}.npz")
    nll, top1 = (np.concatenate([getattr(r, key) for r in results]) for key in ("base_nll", "top1"))
    try:
        with writing(path):
            np.savez(new, token_nll=nll, top1=top1, logits=logits.numpy())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ surroundings


def to_text(value: dict[str, Any]) -> bytes:
    """JSON for people; a list of plain values stands on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    # a line feed never stands in a JSON string, so what is matched is layout
    flat = re.sub(r"\[\n[^\[\]{}\"]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)
    return (flat + "\n").encode()


def read_samples(repo: Path) -> dict[str, Any]:
    """What sample_generations.json in `repo` holds."""
    return dict(json.loads((repo / SAMPLES).read_bytes()))


def describe(summary: dict[str, Any], generations: dict[str, Any] | None = None) -> str:
    """The figures of a summary, for a terminal; of `generations`, the samples that repeat themselves."""
    settings = summary["settings"]
    bos = "with BOS" if settings["bos_token_id"] is not None else "without BOS"
    lines = []
    for text in texts_of(summary):
        base, quantized = text["base"], text["quantized"]
        ratio, error = text["perplexity_ratio"], text["perplexity_ratio_standard_error"]
        lines += [
            f"{text['dataset']['id']} ({summary['role']}): {text['dataset']['tokens']:,} tokens, "
            f"{text['windows']:,} windows of {settings['max_length']:,} {bos}, {text['scored_tokens']:,} scored tokens",
            f"perplexity    base {base['perplexity']:.4f}, quantized {quantized['perplexity']:.4f}, "
            f"delta {text['perplexity_delta']:+.4f}, ratio {ratio:.4f} ± {error:.4f}",
            *_lines_of_change(text),
        ]
        if text["windows"] < ROUGH_WINDOWS:
            lines.append(
                f"note          fewer than {ROUGH_WINDOWS} windows: the figures are rough; more text gives better ones"
            )
        if floor := text.get("floor"):
            lines += [f"the base in {floor['dtype']} against itself in float32:", *_lines_of_change(floor)]
    lines += [
        f"logit cosine  {summary['logit_cosine']['mean']:.6f}",
        f"took          {summary['seconds']:.0f} s on {summary['hardware']['description']}",
    ]
    for sample in (generations or {"samples": []})["samples"]:
        if sample["repetition"] > LOOP:
            base_loops = sample.get("base", {"repetition": 0})["repetition"] > LOOP
            also = "; so does the base's" if base_loops else ""
            lines.append(f"note          the answer to {sample['prompt']!r} repeats itself{also}")
    return "\n".join(lines)


def _lines_of_change(change: dict[str, Any]) -> list[str]:
    top, kl = change["top1_agreement"]["rate"], change["kl_divergence"]
    lines = [
        f"right token   probability changed by {change['p_delta']['rms']:.3%} (root mean square), "
        f"{change['p_delta']['mean']:+.3%} (mean)",
        f"top-1         {top:.2%} agree",
    ]
    if kl:
        quantiles = f"median {kl['median']:.5f}, p99 {kl['p99']:.5f}, p99.9 {kl['p999']:.5f}"
        lines.insert(0, f"KL (nats)     mean {kl['mean']:.5f}, {quantiles}")
    return lines
