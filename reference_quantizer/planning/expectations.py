"""What to expect of a plan before it is carried out, as far as it was measured on another model."""

import math

from reference_quantizer.planning.plan import EMBEDDING_BITS, EMBEDDING_MARGIN, Plan, is_embedding

MODEL = "SmolLM2-135M"
RATIOS = {  # (preset, bits of the decoder layers) -> the perplexity ratio on that model, embeddings wide, see with_wide_embeddings; docs/quality.md
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
    "best": 4e-6,
}  # to encode it; the last with WINDOW, twice that for each bit more
WINDOW = 12
READING, WRITING = 9e-11, 2e-10  # for each token that the model reads, or writes itself
TUNING = 2.2e-7  # for a step of tuning
BROKEN_BITS = 3  # up to which `fast` leaves a small model that babbles


def expectations(plan: Plan) -> list[str]:
    """Lines about the quality to expect, and a warning where a small model would be of no use."""
    settings, lines = plan.settings, []
    preset, bits = settings.preset, settings.bits
    plain = not settings.stages and settings.dimension == 1 and settings.rotation == "hadamard"
    if plan.allocation:
        predicted = plan.allocation.record["extra"]["objective"]
        return [
            f"expect: a KL divergence of about {predicted:.3g} nats from the base model, as predicted from sensitivities"
        ]
    wide = min((t.bits or 16 for t in plan.tensors if is_embedding(t.info.name)), default=EMBEDDING_BITS)
    plain = plain and wide >= min(EMBEDDING_BITS, bits + EMBEDDING_MARGIN)
    if plain and (ratio := RATIOS.get((preset, bits))):
        lines.append(
            f"expect: about {ratio:,.{2 if ratio < 100 else 0}f} times the base model's perplexity, which is what {MODEL} has at {bits} bits by this "
            f"preset, with {wide} bits for embeddings; `evaluate` tells what yours has"
        )
    if preset == "fast" and bits <= BROKEN_BITS:
        better = RATIOS.get(("balanced", bits))
        advice = f"--preset balanced ({better:.2f} times)" if better else "--preset balanced"
        lines.append(
            f"warning: the preset fast at {bits} bit{'s' * (bits > 1)} leaves a small model that babbles; "
            f"use {advice}, --preset best, or 4 bits"
        )
    return lines


def expected_time(plan: Plan, tokens: int, writes: bool, steps: int, cores: int) -> str:
    """A line about how long a CPU takes to encode the plan with so many tokens of text, which the model `writes` itself or not."""
    scalars, preset = sum(t.info.scalars for t in plan.tensors), plan.settings.preset

    def minutes(preset: str, tokens: int, steps: int) -> int:
        wider = max(0, (plan.settings.window or WINDOW) - WINDOW) if preset == "best" else 0
        seconds = SECONDS[preset] * 2**wider + tokens * (READING + WRITING * writes) + steps * TUNING
        return max(1, math.ceil(scalars * seconds / cores / 60))

    line = (
        f"takes: about {minutes(preset, tokens, steps)} min on {cores} CPU core{'s' * (cores > 1)}, judging by {MODEL}"
    )
    return f"{line}; --preset fast takes {minutes('fast', 0, 0)}, fewer --calibration-tokens take less"
