"""Tasks with right and wrong answers, which lm-eval (EleutherAI's harness, a library of its own) puts to a repository and to its base.

Both get the same documents, so that it can be counted how many answers became right and how many wrong: that says more of a
small model than two accuracies do.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference_quantizer.checkpoint.source import weights_sha256
from reference_quantizer.checkpoint.support import KINDS
from reference_quantizer.disk import add_documents
from reference_quantizer.evaluation.evaluate import Settings, file_digests, to_text
from reference_quantizer.libraries import need, reason
from reference_quantizer.model.base import DTYPES, check_same_model, find_base, load_base, running_models
from reference_quantizer.model.machine import default_cache, hardware, libraries
from tqformat.load_quantized import TQFormatError, load, load_tokenizer, read_manifest

RESULTS = "task_results.json"
METRICS = ("acc_norm", "acc", "exact_match")  # 0 or 1 for each document; the first that a task has is taken


def find_tasks(names: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's tasks of these names, with their data; `folder` has further descriptions of tasks (YAML).

    UNSUPPORTED.LIBRARY without lm-eval; SCHEMA.VALUE for a task that it does not know, whose data are not here and cannot be
    fetched, or whose answers are not right or wrong.
    """
    need("--tasks", "lm_eval")
    from lm_eval.tasks import TaskManager

    try:
        found: dict[str, Any] = TaskManager(include_path=folder and str(folder)).load(list(names))["tasks"]
    except Exception as error:  # of lm-eval, datasets, the Hub or a task's own code
        advice = "expected tasks that lm-eval knows (`lm-eval ls tasks`) and whose data are here or can be fetched"
        raise TQFormatError("SCHEMA.VALUE", f"--tasks {','.join(names)}", f"{advice}: {reason(error)}") from error
    for name, task in found.items():
        if not _metric(task.aggregation()):
            raise TQFormatError("SCHEMA.VALUE", name, f"expected a task with one of the metrics {', '.join(METRICS)}")
    return found


def evaluate_tasks(
    base: str,
    repo: Path,
    tasks: dict[str, Any],
    settings: Settings,
    *,
    limit: int | None = None,
    base_revision: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Puts `tasks` to `repo` and to the checkpoint `base`, one model after the other; writes RESULTS into `repo`.

    Returns for each task its `metric`, the number of `documents` (at most `limit`), and of how many the answer of the base is
    right (`base`), that of the repository (`quantized`), the latter alone (`gained`) and the former alone (`lost`).
    """
    settings, manifest = settings.complete(), read_manifest(repo)
    if manifest.loader_kind not in KINDS:
        message = f"expected a model that predicts the next token ({', '.join(KINDS)}), found {manifest.loader_kind}"
        raise TQFormatError("SCHEMA.VALUE", "loader_kind", message)
    source = find_base(base, base_revision, cache_dir or default_cache(), quiet)
    check_same_model(source, manifest)
    device, dtype, tokenizer = settings.device, settings.dtype or "", load_tokenizer(repo)
    with running_models():
        before = _answers(load_base(source, manifest.loader_kind, dtype, device), tokenizer, tasks, settings, limit)
        after = _answers(load(repo, device, DTYPES[dtype]), tokenizer, tasks, settings, limit)
    results = []
    for name, task in tasks.items():
        pairs = [(right, after[name][key]) for key, right in before[name].items()]
        entry = {"task": name, "version": str(task.VERSION), "metric": _metric(task.aggregation())}
        entry |= {"fewshot": task.config.num_fewshot or 0, "documents": len(pairs)}
        entry |= {"base": sum(b for b, _ in pairs), "quantized": sum(q for _, q in pairs)}
        results.append(entry | {"gained": pairs.count((False, True)), "lost": pairs.count((True, False))})
    subject = {"payload": file_digests(manifest, "payload"), "base_weights_sha256": weights_sha256(source)}
    machine = {"hardware": hardware(device), "libraries": libraries() | {"lm_eval": _version()}}
    content = subject | {"settings": {"limit": limit, "device": device, "dtype": dtype}, "tasks": results} | machine
    add_documents(repo, {RESULTS: to_text(content)})
    return results


def describe(results: list[dict[str, Any]]) -> str:
    """A line for each task, for a terminal; the error is that of the change, of the same documents."""
    lines = []
    for r in results:
        n, change = r["documents"], (r["gained"] - r["lost"]) / r["documents"]
        error = math.sqrt(max(0.0, (r["gained"] + r["lost"]) / n - change**2) / n)
        lines.append(
            f"{r['task']}: {r['metric']} base {r['base'] / n:.2%}, quantized {r['quantized'] / n:.2%}, change {change:+.2%} ± {error:.2%}; "
            f"of {n:,} answers {r['gained']:,} became right, {r['lost']:,} wrong"
        )
    return "\n".join(lines)


def _metric(known: Any) -> str | None:
    return next((metric for metric in METRICS if metric in known), None)


def _answers(
    model: Any, tokenizer: Any, tasks: dict[str, Any], settings: Settings, limit: int | None
) -> dict[str, dict[Any, bool]]:
    """Whether the model's answer is right, for each document of each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch)
    found = simple_evaluate(lm, tasks=list(tasks.values()), limit=limit, bootstrap_iters=0)
    return {
        name: {s["doc_id"]: bool(s[_metric(task.aggregation())]) for s in found["samples"][name]}
        for name, task in tasks.items()
    }


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
