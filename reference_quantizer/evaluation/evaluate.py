"""Evaluation of a repository against the checkpoint it was made from: perplexity, KL divergence, agreement, samples.

Both models are in memory and see the same windows, a batch at a time, so that the divergence is exact and no logits are
kept. What each window gave goes to a file in the cache, from which an interrupted run continues; the base's own results
stay there, under a name made from the content of everything they depend on.
"""

import base64
import hashlib
import inspect
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer import __version__
from reference_quantizer.calibration.tokens import find_bos
from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.checkpoint.source import Source, file_sha256, open_source, weights_sha256
from reference_quantizer.checkpoint.support import KINDS
from reference_quantizer.evaluation import samples
from reference_quantizer.evaluation.windows import Window, batches, read_corpus, same_data, sliding_windows
from reference_quantizer.job.quantize import check_device
from reference_quantizer.progress import Progress
from tqformat.load_quantized import (
    LOADER_KINDS,
    Manifest,
    TQFormatError,
    load,
    load_tokenizer,
    read_manifest,
    translated,
)
from tqformat.load_quantized import __version__ as tqformat_version
from tqformat.writer import add_files

SCHEMA_VERSION = "1.0"
SUMMARY, SAMPLES = "eval_summary.json", "sample_generations.json"
ROLE = "sanity-test"  # of the data set: a small text that tells a sound model from a broken one, no benchmark
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHUNK = 2**23  # logits that are turned into probabilities at once: 32 MiB for each float32 work array


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
        cuda = self.device.startswith("cuda")
        dtype = self.dtype or ("bfloat16" if cuda else "float32")
        return replace(self, batch=self.batch or (8 if cuda else 1), dtype=dtype)


@dataclass(frozen=True)
class Result:
    """What one window gave; `kl` holds float32 values of the predicted tokens, `top1` the base's best tokens."""

    base_nll: float
    quantized_nll: float
    agreeing: int
    top1: np.ndarray  # [predicted] int32
    kl: np.ndarray | None  # [predicted] float32
    seconds: float

    def to_line(self) -> str:
        """One line of the file that a run continues from."""
        entry = asdict(self) | {"top1": _text(self.top1), "kl": None if self.kl is None else _text(self.kl)}
        return json.dumps(entry) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Result":
        """Inverse of to_line."""
        entry = json.loads(line)
        kl = None if entry["kl"] is None else np.frombuffer(base64.b64decode(entry["kl"]), "<f4")
        return cls(**entry | {"top1": np.frombuffer(base64.b64decode(entry["top1"]), "<i4"), "kl": kl})


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


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
    source = find_base(base, base_revision, cache)
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    check_same_model(source, manifest)
    corpus = read_corpus(dataset, split, dataset_revision)
    with running_models():
        tokenizer = load_tokenizer(repo)
        ids = tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = find_bos(tokenizer) if settings.bos == "auto" else None
    tokens = np.array(ids, dtype="<i4")  # [tokens]
    windows = sliding_windows(len(tokens), settings.max_length, settings.stride, settings.max_windows)
    if sum(w.scored for w in windows) < 1:
        raise TQFormatError("SCHEMA.VALUE", corpus.id, f"expected a text to score, found {len(tokens)} tokens")
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
            base_model = load_base(source, manifest.loader_kind, settings)
        runner = Runner(base_model, model, kept, tokens, windows, bos, settings)
        results = runner.run(partial, Progress(len(windows), quiet, action="evaluating", unit="window"))
        before = time.monotonic()
        logits = kept.logits if base_model is None else samples.prompt_logits(base_model, tokenizer, settings.device)
        assert logits is not None  # kept together with the windows
        cosines = samples.cosines(logits, samples.prompt_logits(model, tokenizer, settings.device))
        if base_model is not None:
            save_base(cache, kept.key, results, logits)
            del base_model, runner
        generated = samples.generate(model, tokenizer, settings.device)
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
    add_files(repo, {SUMMARY: ("document", to_text(summary)), SAMPLES: ("document", to_text(generations))})
    partial.unlink(missing_ok=True)
    return summary


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
        with open(partial, "ab") as file:
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


def next_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """The logits from which the last `count` tokens of each row are predicted, [batch, count, vocabulary]."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count + 1
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits[:, -count - 1 : -1]


def compare(base: Tensor, quantized: Tensor, targets: Tensor, kl: bool) -> dict[str, Any]:
    """Both models' mean NLL over the targets, KL(base || quantized) of each in nats, and where the best token agrees.

    Logits [predicted, vocabulary]; a chunk of positions at a time in float32, sums in float64.
    """
    step = max(1, CHUNK // base.shape[-1])
    base_nll = quantized_nll = 0.0
    divergences: list[Tensor] = []
    best: list[Tensor] = []
    agreeing = 0
    for a in range(0, len(targets), step):
        wanted = targets[a : a + step, None]
        p, q = (x[a : a + step].float().log_softmax(-1) for x in (base, quantized))
        base_nll -= p.gather(1, wanted).sum(dtype=torch.float64).item()
        quantized_nll -= q.gather(1, wanted).sum(dtype=torch.float64).item()
        best.append(p.argmax(-1))
        agreeing += int((best[-1] == q.argmax(-1)).sum())
        if kl:
            share = p.exp()
            terms = p.sub_(q).mul_(share).masked_fill_(share == 0, 0)
            divergences.append(terms.sum(-1, dtype=torch.float64).clamp_(min=0).float().cpu())
    return {
        "base_nll": base_nll / len(targets),
        "quantized_nll": quantized_nll / len(targets),
        "agreeing": agreeing,
        "top1": torch.cat(best).int().cpu().numpy(),
        "kl": torch.cat(divergences).numpy() if kl else None,
    }


def score_alone(quantized: Tensor, targets: Tensor, base_nll: float, top1: np.ndarray) -> dict[str, Any]:
    """What `compare` gives, but for the divergence, with the base's results of an earlier run."""
    found = compare(quantized, quantized, targets, False)
    agreeing = int((found["top1"] == top1).sum())
    return found | {"base_nll": float(base_nll), "agreeing": agreeing, "top1": top1}


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


def summarize(windows: list[Window], results: list[Result]) -> dict[str, Any]:
    """Counts, figures of both models and their comparison; the mean NLL is weighted by the windows' scored tokens."""
    weights = [w.scored for w in windows]
    scored, positions = sum(weights), sum(w.predicted for w in windows)
    base, quantized = (
        math.fsum(w * value for w, value in zip(weights, values, strict=True)) / scored
        for values in ([r.base_nll for r in results], [r.quantized_nll for r in results])
    )
    if max(base, quantized) > 700:
        message = f"an average NLL of {max(base, quantized):.4g} has no finite perplexity"
        raise TQFormatError("DATA.NON_FINITE", "perplexity", message)
    agreeing = sum(r.agreeing for r in results)
    divergence = None
    kls = [r.kl for r in results if r.kl is not None]
    if kls:
        kl = np.concatenate(kls).astype(np.float64)
        median, p99 = np.quantile(kl, [0.5, 0.99])  # linear between neighbours
        mean = math.fsum(kl) / len(kl)
        divergence = {"mean": mean, "median": float(median), "p99": float(p99), "max": float(kl.max())}
    return {
        "windows": len(windows),
        "scored_tokens": scored,
        "positions": positions,
        "base": {"average_nll": base, "perplexity": math.exp(base)},
        "quantized": {"average_nll": quantized, "perplexity": math.exp(quantized)},
        "perplexity_delta": math.exp(quantized) - math.exp(base),
        "perplexity_ratio": math.exp(quantized) / math.exp(base),
        "kl_divergence": divergence,
        "top1_agreement": {"agreeing": agreeing, "rate": agreeing / positions},
        "window_results": {
            "base_nll": [_rounded(r.base_nll) for r in results],
            "quantized_nll": [_rounded(r.quantized_nll) for r in results],
            "agreeing": [r.agreeing for r in results],
            "kl": [_rounded(math.fsum(kl) / len(kl)) for kl in kls] if kls else None,
        },
    }


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


# ------------------------------------------------------------------------------------------------ models


def find_base(base: str, revision: str | None, cache: Path) -> Source:
    """The checkpoint that `base` names; of a GGUF file, its import in the cache."""
    gguf = gguf_source.is_gguf(base)
    if revision and (gguf or Path(base).exists()):
        raise TQFormatError("SCHEMA.VALUE", "--revision", "BASE is no Hub id, so there is nothing to select")
    if not gguf:
        return open_source(base, revision)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "gguf.lock"):
        return gguf_source.cached(base, cache)


def load_base(source: Source, loader_kind: str, settings: Settings, **placement: Any) -> Any:
    """The checkpoint's model, in eval mode; every weight must be there. `placement`, for transformers, takes the place of the settings' device."""
    import transformers

    with translated(source.path.name):
        model, info = getattr(transformers, LOADER_KINDS[loader_kind]).from_pretrained(
            source.path,
            dtype=DTYPES[settings.dtype or ""],
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise TQFormatError("BIND.MODEL", source.path.name, f"the checkpoint lacks weights: {', '.join(wrong)[:200]}")
    return (model if placement else model.to(settings.device)).eval()


def check_same_model(source: Source, manifest: Any) -> None:
    """BIND.TENSOR if a weight has another shape in the checkpoint: then it is not the base."""
    for name, weight in manifest.tensors.items():
        info = source.tensors.get(name)
        if info is not None and tuple(info.shape) != tuple(weight.shape):
            message = f"the repository has the shape {list(weight.shape)}, the base {list(info.shape)}: another model"
            raise TQFormatError("BIND.TENSOR", name, message)


def check_length(model: Any, length: int) -> None:
    """SCHEMA.VALUE if the model has fewer positions than a window takes."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        message = f"the model takes {limit} tokens, a window has {length} (with its BOS token, if it has one)"
        raise TQFormatError("SCHEMA.VALUE", "--max-length", message)


@contextmanager
def running_models() -> Iterator[None]:
    """How models are run here: subnormal numbers count as 0, and libraries show no bars and give no advice.

    A damaged model's activations are full of subnormal numbers, which change nothing, but make a processor ten times slower.
    Threads inherit the setting, so this comes before the first work that torch shares among them.
    """
    import transformers

    torch.set_flush_denormal(True)

    advice = getLogger("accelerate")  # that weights were left in files, where that is wanted
    level = advice.level
    advice.setLevel(ERROR)
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        logging.set_verbosity(verbosity)
        advice.setLevel(level)
        if bars:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------ cache


def default_cache() -> Path:
    """Where results are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqformat"


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
    np.savez(new, nll=np.array([r.base_nll for r in results]), top1=top1, logits=logits.numpy())
    os.replace(new, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One run at a time: two would write their results into one file."""
    with open(path, "ab") as file:
        try:
            import fcntl
        except ImportError:  # not on this system
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another run is writing what this one needs; wait until it is done"
            raise TQFormatError("PATH.COLLISION", path.name, message) from None
        yield


# ------------------------------------------------------------------------------------------------ surroundings


def hardware(device: str) -> dict[str, str]:
    """The machine, in words."""
    if device.startswith("cuda"):
        return {"device": "cuda", "description": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M)):
        name = found[1].strip()
    threads = torch.get_num_threads()
    return {"device": "cpu", "description": f"{name}, {threads} thread{'s' if threads > 1 else ''}"}


def libraries() -> dict[str, str]:
    """The versions that the figures depend on."""
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "tqformat": tqformat_version,
        "reference_quantizer": __version__,
    }


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
    if kl:
        lines.insert(2, f"KL (nats)     mean {kl['mean']:.5f}, median {kl['median']:.5f}, p99 {kl['p99']:.5f}")
    return "\n".join(lines)
