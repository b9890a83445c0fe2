"""What two models' logits say of each other: NLL, KL divergence, agreement; of a window, and of all windows."""

import base64
import inspect
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference_quantizer.evaluation.windows import Window
from tqformat.load_quantized import TQFormatError

CHUNK = 2**23  # logits that are turned into probabilities at once: 32 MiB for each float32 work array


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
    for a in range(0, max(1, len(targets)), step):  # once for no targets, too: the last window may be a single token
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
        "base_nll": base_nll / max(1, len(targets)),
        "quantized_nll": quantized_nll / max(1, len(targets)),
        "agreeing": agreeing,
        "top1": torch.cat(best).int().cpu().numpy(),
        "kl": torch.cat(divergences).numpy() if kl else None,
    }


def score_alone(quantized: Tensor, targets: Tensor, base_nll: float, top1: np.ndarray) -> dict[str, Any]:
    """What `compare` gives, but for the divergence, with the base's results of an earlier run."""
    found = compare(quantized, quantized, targets, False)
    agreeing = int((found["top1"] == top1).sum())
    return found | {"base_nll": float(base_nll), "agreeing": agreeing, "top1": top1}


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
            "kl": [_rounded(math.fsum(kl) / max(1, len(kl))) for kl in kls] if kls else None,
        },
    }


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")
