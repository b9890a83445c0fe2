"""What to expect of a plan before it is carried out, as far as it was measured on another model."""

import math

from reference_quantizer.libraries import is_installed
from reference_quantizer.planning.plan import EMBEDDING_BITS, EMBEDDING_MARGIN, Plan, is_embedding
from reference_quantizer.planning.settings import Settings

MODEL = "SmolLM2-135M"
RATIOS = {  # (preset, bits of the decoder layers) -> the perplexity ratio on that model, embeddings at EMBEDDING_BITS; docs/quality.md
    ("fast", 2): 17740.0,
    ("fast", 3): 7.240,
    ("fast", 4): 1.484,
    ("balanced", 2): 2.705,
    ("balanced", 3): 1.304,
    ("balanced", 4): 1.080,
}
# Processor seconds that it took on a CPU, for a weight; see "Time and memory of quantizing" in benchmarks/RESULTS.md.
SECONDS = {
    "fast": 1e-7,
    "balanced": 7e-7,
    "best": 3.5e-6,
}  # to encode it; the last with WINDOW, twice that for each bit more
COMPILED = 1.5e-6  # in place of the last, where tqformat_kernels searches
WINDOW = 12
MEASURING = {"fisher": 2.5e-6, "perturbation": 5e-6}  # what a target asks for, with the default numbers of tokens
GAINS = 1.2e-6  # what it asks for beside, where there is feedback
GRADIENTS = 7e-11  # of feedback between rows, for each token, up to GRADIENT_TOKENS
GRADIENT_TOKENS = 32768
READING, WRITING = 9e-11, 2e-10  # for each token that the model reads, or writes itself
TUNING = 2.2e-7  # for a step of tuning
COMPARING = 7e-11  # for each token of an evaluation, which both models read
BROKEN_BITS = 3  # up to which `fast` leaves a small model that babbles


def expectations(plan: Plan) -> list[str]:
    """Lines about the quality to expect, and a warning where a small model would be of no use."""
    settings, lines = plan.settings, []
    preset, bits = settings.preset, settings.bits
    plain = not settings.stages and settings.dimension == 1 and settings.rotation == "hadamard"
    if plan.allocation:
        predicted = plan.allocation.record["extra"]["objective"]
        line = f"expect: a KL divergence of about {predicted:.3g} nats from the base model, as predicted from sensitivities"
        # 135M at 3.3 bits: 0.126 predicted, 0.129 seen with 16,384 tokens; 0.097 and 0.204 with 2,048
        return [line + "; twice as much with few tokens of calibration text, some 2,000" * (preset != "fast")]
    wide = min((t.bits or 16 for t in plan.tensors if is_embedding(t.info.name)), default=EMBEDDING_BITS)
    plain = plain and wide >= min(EMBEDDING_BITS, bits + EMBEDDING_MARGIN)
    if plain and (ratio := RATIOS.get((preset, bits))):
        lines.append(
            f"expect: about {ratio:,.{2 if ratio < 100 else 0}f} times the base model's perplexity, which is what {MODEL} has at {bits} bits by this "
            f"preset, with {EMBEDDING_BITS} bits for embeddings (here {wide}); `evaluate` tells what yours has"
        )
    if preset == "fast" and bits <= BROKEN_BITS:
        better = RATIOS.get(("balanced", bits))
        advice = f"--preset balanced ({better:.2f} times)" if better else "--preset balanced"
        lines.append(
            f"warning: the preset fast at {bits} bit{'s' * (bits > 1)} leaves a small model that babbles; "
            f"use {advice}, --preset best, or 4 bits"
        )
    return lines


def expected_time(
    scalars: int, settings: Settings, tokens: int, writes: bool, steps: int, allocator: str | None, cores: int
) -> str:
    """A line about how long a CPU takes, stage by stage, to quantize so many scalars by a preset with feedback.

    With so many tokens of text, which the model `writes` itself or not, and steps of tuning. `allocator` measures sensitivities; None
    without a target.
    """
    wider = max(0, (settings.window or WINDOW) - WINDOW) if settings.preset == "best" else 0
    compiled = settings.preset == "best" and is_installed("tqformat_kernels")
    seconds = {  # for a weight
        "text": tokens * WRITING * writes * (1.5 if steps else 1),  # tuning has half as much again
        "sensitivities": MEASURING[allocator] + GAINS if allocator else 0,
        "gradients": min(tokens, GRADIENT_TOKENS) * GRADIENTS * settings.output_feedback,
        "codes": (COMPILED if compiled else SECONDS[settings.preset]) * 2**wider + tokens * READING,
        "tuning": steps * TUNING,
    }
    stages = {stage: round(scalars * value / cores / 60) for stage, value in seconds.items()}
    parts = [f"{stage} {minutes}" for stage, minutes in stages.items() if minutes]
    line = f"takes: about {_minutes(scalars * sum(seconds.values()), cores)} min on {cores} CPU core{'s' * (cores > 1)}, judging by {MODEL}"
    line += f": {', '.join(parts)}" if len(parts) > 1 else ""
    fast = _minutes(scalars * SECONDS["fast"], cores)
    return f"{line}; --preset fast takes {fast}, fewer --calibration-tokens take less"


def expected_evaluation(scalars: int, tokens: int, cores: int) -> str:
    """A line about how long a CPU takes to evaluate a model of so many scalars on so many tokens, those of all windows."""
    return f"takes: about {_minutes(scalars * tokens * COMPARING, cores)} min more for the evaluation; --max-windows N takes less"


def _minutes(seconds: float, cores: int) -> int:
    return max(1, math.ceil(seconds / cores / 60))
