"""The settings that shape a release; each is recorded in the manifest."""

from dataclasses import dataclass
from typing import Any

PRESETS = {  # name -> method recorded, and window of its codes (None: no wider than their bits)
    "fast": ("turboquant_mse", None),
    "balanced": ("feedback", None),
    "best": ("feedback_trellis", 12),
}
CODEBOOKS = ("trained", "computed")  # of a trellis
SIGN = "sign"  # in place of a stage's bits: one unbiased bit


@dataclass(frozen=True)
class Settings:
    """The knobs that shape the result; each is recorded in the manifest's `quantization`."""

    bits: int = 4
    preset: str = "fast"
    window: int | None = None  # of trellis codes; None: no trellis
    codebook: str = "trained"  # of a trellis: one of CODEBOOKS
    dimension: int = 1  # weights per symbol
    stages: tuple[int | str, ...] = ()  # bits of each, or SIGN; together `bits`; empty: one stage
    rotation: str = "hadamard"  # hadamard, haar, none
    vector_length: int | None = None  # None: the whole row
    seed: int = 42
    grid_size: int = 8193
    iterations: int = 96
    scale_dtype: str = "auto"  # auto, F16, BF16, F32
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    protect_fragments: tuple[str, ...] = ()
    protected_bits: int | None = None  # None: passthrough
    inputs: str = "paired"  # of calibrated layers: original, quantized, paired
    ordered: bool = True  # feedback from the columns of more power to those of less
    output_feedback: bool = False  # feedback between blocks of rows, too, by what the end loss minds

    def to_quantization(self) -> dict[str, Any]:
        """The manifest's `quantization` object [TQ-MAN-5]."""
        calibrated: dict[str, Any] = {}
        if self.preset != "fast":
            calibrated = {"inputs": self.inputs, "activation_order": self.ordered}
            calibrated |= {"output_feedback": self.output_feedback}
        return {
            "method": self.method,
            "bits": self.bits,
            "seed": self.seed,
            "rotation": self.rotation,
            "vector_length": self.vector_length,
            "grid_size": self.grid_size,
            "iterations": self.iterations,
            "scale_dtype": self.scale_dtype,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "protected_names": list(self.protect),
            "protected_fragments": list(self.protect_fragments),
            "protected_bits": self.protected_bits,
            "extra": {"preset": self.preset, "window": self.window}
            | calibrated
            | ({"codebook": self.codebook} if self.codebook != "trained" else {})
            | ({"dimension": self.dimension} if self.dimension > 1 else {})
            | ({"stages": list(self.stages)} if self.stages else {}),
        }

    @property
    def method(self) -> str:
        """The name that is recorded."""
        prod = SIGN in self.stages
        name = "turboquant_prod" if prod else PRESETS[self.preset][0]
        return name + "_vector" * (self.dimension > 1) + "_stages" * (bool(self.stages) and not prod)
