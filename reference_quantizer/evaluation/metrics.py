"""What two models' logits say of each other: NLL, KL divergence, agreement; of a window, and of all windows."""

import base64
import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.evaluation.windows import Window
from tqformat.load_quantized import TQFormatError

CHUNK = 2**23  # logits that are turned into probabilities at once: 32 MiB for each float32 work array
ARRAYS = {"base_nll": "<f4", "quantized_nll": "<f4", "top1": "<i4", "kl": "<f4"}  # of a Result, as a line holds them
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}
# lower ends of the histogram's bins [TQ-EVAL-3]: four for each octave from 2^-24 nats on, and one below
EDGES = np.array([0.0, *((4 + i % 4) * 2.0 ** (i // 4 - 26) for i in range(128))])


@dataclass(frozen=True)
class Result:
    """What one window gave, for each predicted token; of NLL, that of the token that follows in the text."""

    base_nll: np.ndarray  # [predicted] float32
    quantized_nll: np.ndarray  # [predicted] float32
    top1: np.ndarray  # [predicted] int32: the base's best tokens
    agreeing: int
    kl: np.ndarray | None  # [predicted] float32
    seconds: float

    def to_line(self) -> str:
        """One line of the file that a run continues from."""
        entry = {
            key: _text(value) if key in ARRAYS and value is not None else value for key, value in vars(self).items()
        }
        return json.dumps(entry) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Result":
        """Inverse of to_line."""
        entry = json.loads(line)
        for key, dtype in ARRAYS.items():
            if entry[key] is not None or key != "kl":
                entry[key] = np.frombuffer(base64.b64decode(entry[key]), dtype)
        return cls(**entry)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def next_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """The logits from which the last `count` tokens of each row are predicted, [batch, count, vocabulary]."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count + 1
    with torch.inference_mode():
        return model(input_ids=ids, **options).logits[:, -count - 1 : -1]


def compare(base: Tensor, quantized: Tensor, targets: Tensor, kl: bool) -> dict[str, Any]:
    """Both models' NLL of each target, KL(base || quantized) in nats, and at how many the best tokens agree: of a Result.

    Logits [predicted, vocabulary]; a chunk of positions at a time in float32, sums over the vocabulary in float64.
    """
    step = max(1, CHUNK // base.shape[-1])
    found: dict[str, list[Tensor]] = {key: [] for key in ARRAYS}
    agreeing = 0
    for a in range(0, max(1, len(targets)), step):  # once for no targets, too: the last window may be a single token
        wanted = targets[a : a + step, None]
        p, q = (x[a : a + step].float().log_softmax(-1) for x in (base, quantized))
        found["base_nll"].append(-p.gather(1, wanted)[:, 0])
        found["quantized_nll"].append(-q.gather(1, wanted)[:, 0])
        found["top1"].append(p.argmax(-1).int())
        agreeing += int((found["top1"][-1] == q.argmax(-1)).sum())
        if kl:
            share = p.exp()
            terms = p.sub_(q).mul_(share).masked_fill_(share == 0, 0)
            found["kl"].append(terms.sum(-1, dtype=torch.float64).clamp_(min=0).float())
    arrays = {key: torch.cat(parts).cpu().numpy() if parts else None for key, parts in found.items()}
    return {**arrays, "agreeing": agreeing}


def score_alone(quantized: Tensor, targets: Tensor, base_nll: np.ndarray, top1: np.ndarray) -> dict[str, Any]:
    """What `compare` gives, but for the divergence, with the base's results of an earlier run."""
    found = compare(quantized, quantized, targets, False)
    agreeing = int((found["top1"] == top1).sum())
    return found | {"base_nll": base_nll, "agreeing": agreeing, "top1": top1}


def summarize(windows: list[Window], results: list[Result]) -> dict[str, Any]:
    """What the summary says of one text but where it is from; the mean NLL is weighted by the windows' scored tokens.

    The ratio's standard error is that of the mean difference of the tokens' NLL, which counts them as independent, times
    the ratio (to first order), as llama.cpp's perplexity tool has it.
    """
    weights, positions = [w.scored for w in windows], [w.predicted for w in windows]
    nll = {name: [_mean(getattr(r, name)) for r in results] for name in ("base_nll", "quantized_nll")}
    base, quantized = (_average(values, weights) for values in nll.values())
    if max(base, quantized) > 700:
        message = f"an average NLL of {max(base, quantized):.4g} has no finite perplexity"
        raise TQFormatError("DATA.NON_FINITE", "perplexity", message)
    ratio = math.exp(quantized) / math.exp(base)
    squared = [_mean(_nll_delta(r) ** 2) for r in results]
    delta = _average([q - b for b, q in zip(nll["base_nll"], nll["quantized_nll"], strict=True)], positions)
    variance = max(0.0, _average(squared, positions) - delta**2)
    found = summarize_change(windows, results)
    return {
        "windows": len(windows),
        "scored_tokens": sum(weights),
        "positions": sum(positions),
        "base": {"average_nll": base, "perplexity": math.exp(base)},
        "quantized": {"average_nll": quantized, "perplexity": math.exp(quantized)},
        "perplexity_delta": math.exp(quantized) - math.exp(base),
        "perplexity_ratio": ratio,
        "perplexity_ratio_standard_error": ratio * math.sqrt(variance / max(1, sum(positions) - 1)),
        **found,
        "window_results": {**nll, "nll_delta_squared": squared, **found["window_results"]},
    }


def summarize_change(windows: list[Window], results: list[Result]) -> dict[str, Any]:
    """How far predictions moved, whatever the text made of it: divergence, probability of the right token, best tokens."""
    positions, agreeing = [w.predicted for w in windows], sum(r.agreeing for r in results)
    p_deltas = [np.exp(-r.quantized_nll.astype(np.float64)) - np.exp(-r.base_nll.astype(np.float64)) for r in results]
    mean, squared = [_mean(x) for x in p_deltas], [_mean(x**2) for x in p_deltas]
    kls = [r.kl for r in results if r.kl is not None]
    return {
        "kl_divergence": summarize_kl(np.concatenate(kls)) if kls else None,
        "p_delta": {"mean": _average(mean, positions), "rms": math.sqrt(_average(squared, positions))},
        "top1_agreement": {"agreeing": agreeing, "rate": agreeing / sum(positions)},
        "window_results": {
            "agreeing": [r.agreeing for r in results],
            "kl": [_mean(kl) for kl in kls] if kls else None,
            "p_delta": mean,
            "p_delta_squared": squared,
        },
    }


def summarize_kl(kl: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles (linear between neighbours), largest, and how many of the values [positions] are in each bin."""
    kl = kl.astype(np.float64)
    quantiles = np.quantile(kl, list(QUANTILES.values())).tolist()
    return {
        "mean": math.fsum(kl) / len(kl),
        **dict(zip(QUANTILES, quantiles, strict=True)),
        "max": float(kl.max()),
        "histogram": np.bincount(np.searchsorted(EDGES, kl, side="right") - 1).tolist(),
    }


def _nll_delta(result: Result) -> np.ndarray:
    return result.quantized_nll.astype(np.float64) - result.base_nll


def _mean(values: np.ndarray) -> float:
    """Of one window, as the summary holds it; 0 of none, for a last window of a single token."""
    return float(f"{math.fsum(values.tolist()) / max(1, len(values)):.9g}")


def _average(values: list[float], weights: list[int]) -> float:
    """The mean of windows' values."""
    return math.fsum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
