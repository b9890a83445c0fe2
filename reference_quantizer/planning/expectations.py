"""What to expect of a plan before it is carried out, as far as it was measured on another model."""

from reference_quantizer.planning.plan import Plan

MODEL = "SmolLM2-135M"
RATIOS = {  # (preset, bits of the decoder layers) -> the perplexity ratio on that model, embedding at 8 bits; see docs/quality.md
    ("fast", 2): 17740.0,
    ("fast", 3): 7.240,
    ("fast", 4): 1.484,
    ("balanced", 2): 2.705,
    ("balanced", 3): 1.304,
    ("balanced", 4): 1.080,
}
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
    if plain and (ratio := RATIOS.get((preset, bits))):
        lines.append(
            f"expect: about {ratio:,.{2 if ratio < 100 else 0}f} times the base model's perplexity, which is what {MODEL} has at {bits} bits by this "
            "preset, with 8 bits for embeddings; `evaluate` tells what yours has"
        )
    if preset == "fast" and bits <= BROKEN_BITS:
        better = RATIOS.get(("balanced", bits))
        advice = f"--preset balanced ({better:.2f} times)" if better else "--preset balanced"
        lines.append(
            f"warning: the preset fast at {bits} bit{'s' * (bits > 1)} leaves a small model that babbles; "
            f"use {advice}, --preset best, or 4 bits"
        )
    return lines
