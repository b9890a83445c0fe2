"""Evaluation of a repository against the checkpoint it was made from: perplexity, KL divergence, agreement, samples.

Both models are in memory and see the same windows, a batch at a time, so that the divergence is exact and no logits are
kept. What each window gave goes to a file in the cache, from which an interrupted run continues; the base's own results
stay there, under a name made from the content of everything they depend on.
"""

import hashlib
import json
import math
import os
import re
import time
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
from reference_quantizer.evaluation.metrics import Result, compare, next_logits, score_alone, summarize
from reference_quantizer.evaluation.windows import ROUGH_WINDOWS, Window, batches, sliding_windows
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
from reference_quantizer.model.text import Corpus, read_corpus, same_data
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


@dataclass(frozen=True)
class Settings:
    """How to evaluate; what is None is chosen by `complete`."""

    max_length: int = 512
    stride: int = 256
    max_windows: int | None = None
    bos: str = "auto"
    batch: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    kl: bool = True

    def complete(self) -> "Settings":
        """With the batch and dtype that suit the device: the CPU computes in float32."""
        batch = self.batch or (8 if self.device.startswith("cuda") else 1)
        return replace(self, batch=batch, dtype=self.dtype or default_dtype(self.device))


@dataclass(frozen=True)
class Base:
    """What is kept of the base for later runs, and of which content."""

    key: str
    weights_sha256: str
    nll: np.ndarray | None = None  # [windows] float64
    top1: np.ndarray | None = None  # [positions] int32
    logits: Tensor | None = None  # [prompts, vocabulary] float32


def evaluate(
    base: str,
    repo: Path,
    dataset: str,
    settings: Settings | None = None,
    *,
    split: str = "test",
    dataset_revision: str | None = None,
    base_revision: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluates `repo` against the checkpoint `base` and writes both files into it; returns the summary.

    Interrupted, the same call continues where it stopped. A GGUF file as `base` is imported into the cache and stays there.
    """
    settings = (settings or Settings()).complete()
    check_device(settings.device)
    manifest, cache = read_manifest(repo), cache_dir or default_cache()
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    corpus = read_corpus(dataset, split, dataset_revision)
    tokenizer = load_tokenizer(repo)
    tokens, windows = cut_text(corpus, tokenizer, settings)
    source = find_base(base, base_revision, cache, quiet)
    check_same_model(source, manifest)
    bos = find_bos(tokenizer) if settings.bos == "auto" else None
    tokens_sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    payload = payload_digests(manifest)

    cache.mkdir(parents=True, exist_ok=True)
    kept = open_base(source, cache, [manifest.loader_kind, tokens_sha256, asdict(replace(settings, kl=True)), bos])
    job = json.dumps([kept.key, payload, settings.kl])
    partial = cache / f"evaluation-{hashlib.sha256(job.encode()).hexdigest()[:32]}.partial"
    with locked(partial.with_suffix(".lock")), running_models():
        model = load(repo, settings.device, DTYPES[settings.dtype or ""])
        check_length(model, settings.max_length + (bos is not None))
        base_model = None
        if settings.kl or kept.nll is None:
            base_model = load_base(source, manifest.loader_kind, settings.dtype or "", settings.device)
        runner = Runner(base_model, model, kept, tokens, windows, bos, settings)
        results = runner.run(partial, Progress(len(windows), quiet, action="evaluating", unit="window"))
        before = time.monotonic()
        logits = kept.logits if base_model is None else samples.prompt_logits(base_model, tokenizer, settings.device)
        assert logits is not None  # kept together with the windows
        cosines = samples.cosines(logits, samples.prompt_logits(model, tokenizer, settings.device))
        if base_model is not None:
            save_base(cache, kept.key, results, logits)
        generated = samples.generate(model, base_model, tokenizer, settings.device)
        seconds = sum(r.seconds for r in results) + time.monotonic() - before

    subject = {"base_model": manifest.base_model["id"], "payload": payload}
    dataset_entry = corpus.to_dict() | {"tokens": len(tokens), "tokens_sha256": tokens_sha256}
    setting_entry = {key: value for key, value in asdict(settings).items() if key != "kl"} | {"bos_token_id": bos}
    machine = {"hardware": hardware(settings.device), "libraries": libraries()}
    summary = {
        "schema_version": SCHEMA_VERSION,
        "role": ROLE,
        **subject,
        "base_weights_sha256": kept.weights_sha256,
        "dataset": dataset_entry,
        "settings": setting_entry,
        **summarize(windows, results),
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
    partial.unlink(missing_ok=True)
    return summary


def cut_text(corpus: Corpus, tokenizer: Any, settings: Settings) -> tuple[np.ndarray, list[Window]]:
    """The tokens of the corpus, int32 [tokens], and its windows; SCHEMA.VALUE for fewer than two, which say nothing of a model."""
    with running_models():
        ids = tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"]
    length, stride = settings.max_length, settings.stride
    windows = sliding_windows(len(ids), length, stride, settings.max_windows)
    if settings.max_windows == 1:
        raise TQFormatError("SCHEMA.VALUE", "--max-windows", "expected at least 2, got 1")
    if len(windows) < 2:  # the first one ends where the text does, or beyond
        message = f"two windows of --max-length {length} and --stride {stride} take at least {length + 1} tokens"
        advice = "give a longer text, or a smaller --max-length"
        raise TQFormatError("SCHEMA.VALUE", corpus.id, f"{message}, the text has {len(ids)}; {advice}")
    return np.array(ids, dtype="<i4"), windows


def payload_digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of each payload file: which weights an evaluation is about."""
    return {name: file.sha256 for name, file in manifest.files.items() if file.role == "payload"}


def is_current(
    repo: Path,
    base_weights_sha256: str,
    dataset: str,
    settings: Settings,
    *,
    split: str = "test",
    dataset_revision: str | None = None,
) -> bool:
    """Whether both files in `repo` are whole and are those of this base, these weights, this data set and these settings."""
    manifest, settings = read_manifest(repo), settings.complete()
    for name in (SUMMARY, SAMPLES):
        file = manifest.files.get(name)
        if file is None or not (repo / name).is_file() or file_sha256(repo / name) != file.sha256:
            return False
    summary, generations = (json.loads((repo / name).read_bytes()) for name in (SUMMARY, SAMPLES))
    wanted = {key: value for key, value in asdict(settings).items() if key != "kl"}
    found = {key: value for key, value in summary["settings"].items() if key != "bos_token_id"}
    return (
        summary["payload"] == generations["payload"] == payload_digests(manifest)
        and summary["base_weights_sha256"] == base_weights_sha256
        and found == wanted
        and (summary["kl_divergence"] is not None) == settings.kl
        and same_data(summary["dataset"], dataset, split, dataset_revision)
    )


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
                values = score_alone(quantized[row], targets[row], self.kept.nll[index], self.kept.top1[span])
            if not (math.isfinite(values["base_nll"]) and math.isfinite(values["quantized_nll"])):
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


# ------------------------------------------------------------------------------------------------ models


# ------------------------------------------------------------------------------------------------ cache


def open_base(source: Source, cache: Path, job: list[Any]) -> Base:
    """The base's results for `job`, with their arrays if an earlier run kept them.

    The name is made from content: of the weight files, the configuration, the tokens, the settings, and torch's version.
    """
    weights = weights_sha256(source)
    content = json.dumps([SCHEMA_VERSION, weights, job, samples.LOGIT_PROMPTS, libraries()], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    path = cache / f"base-{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Base(key, weights, stored["nll"], stored["top1"], torch.from_numpy(stored["logits"]))
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
    top1 = np.concatenate([r.top1 for r in results])
    try:
        with writing(path):
            np.savez(new, nll=np.array([r.base_nll for r in results]), top1=top1, logits=logits.numpy())
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


def describe(summary: dict[str, Any]) -> str:
    """The figures of a summary, for a terminal."""
    kl, settings = summary["kl_divergence"], summary["settings"]
    bos = "with BOS" if settings["bos_token_id"] is not None else "without BOS"
    lines = [
        f"{summary['dataset']['id']} ({summary['role']}): {summary['dataset']['tokens']:,} tokens, "
        f"{summary['windows']:,} windows {bos}, {summary['scored_tokens']:,} scored tokens",
        f"perplexity    base {summary['base']['perplexity']:.4f}, quantized {summary['quantized']['perplexity']:.4f}, "
        f"delta {summary['perplexity_delta']:+.4f}, ratio {summary['perplexity_ratio']:.4f}",
        f"top-1         {summary['top1_agreement']['rate']:.2%} agree",
        f"logit cosine  {summary['logit_cosine']['mean']:.6f}",
        f"took          {summary['seconds']:.0f} s on {summary['hardware']['description']}",
    ]
    if summary["windows"] < ROUGH_WINDOWS:
        lines.append(
            f"note          fewer than {ROUGH_WINDOWS} windows: the figures are rough; more text gives better ones"
        )
    if kl:
        lines.insert(2, f"KL (nats)     mean {kl['mean']:.5f}, median {kl['median']:.5f}, p99 {kl['p99']:.5f}")
    return "\n".join(lines)
