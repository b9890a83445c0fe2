"""What the options ask for: settings, a plan, calibration text, how to evaluate."""

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reference_quantizer.checkpoint import support
from reference_quantizer.checkpoint.source import Source
from reference_quantizer.commands.options import DATASET, FEEDBACK_TOKENS, INPUTS, TUNING_STEPS, TUNING_TOKENS
from reference_quantizer.libraries import is_installed, missing_library, need
from reference_quantizer.planning.allocate import ALLOCATORS, CANDIDATES, Request, make_allocation
from reference_quantizer.planning.expectations import expected_time
from reference_quantizer.planning.plan import (
    EMBEDDING_BITS,
    EMBEDDING_MARGIN,
    EMBEDDINGS,
    HEADS,
    MAX_SYMBOL,
    WINDOWED_BITS,
    Plan,
    make_plan,
)
from reference_quantizer.planning.settings import CODEBOOKS, PRESETS, SIGN, Settings
from reference_quantizer.progress import tell
from tqformat.load_quantized import TQFormatError

if TYPE_CHECKING:
    from reference_quantizer.calibration.tokens import Calibration


def find_plan(args: argparse.Namespace, source: Source) -> Plan:
    """The plan that the options ask for; with a target, the bits are chosen by measuring the model."""
    request, chosen = request_of(args), settings(args)
    if chosen.output_feedback and (kind := find_loader_kind(args, source)) not in support.KINDS:
        if args.output_feedback:
            advice = f"expected a model that predicts the next token ({', '.join(support.KINDS)}), found {kind}"
            raise TQFormatError("SCHEMA.VALUE", "--output-feedback", advice)
        chosen = replace(chosen, output_feedback=False)
    if request is None:
        return make_plan(
            source, chosen if args.uniform else with_wide_embeddings(chosen, source, predicts(args, source))
        )
    job = {name: getattr(args, name) for name in ("device", "quiet") if hasattr(args, name)}  # not of `plan`
    kind, cache = find_loader_kind(args, source), getattr(args, "cache_dir", None)
    return make_plan(source, *make_allocation(source, chosen, request, kind, cache, **job))


def with_wide_embeddings(chosen: Settings, source: Source, predicts: bool) -> Settings:
    """With more bits for embeddings and output layers where no option says what to protect.

    8 without feedback, since they would undo what is gained elsewhere. With a preset that has some, for a model that `predicts` the next
    token, EMBEDDING_MARGIN more than the others have: about as good for its size as any other choice of equal bits for all layers.
    """
    bits = EMBEDDING_BITS
    if chosen.preset != "fast" and predicts:
        bits = min(bits, chosen.bits + EMBEDDING_MARGIN)
    if chosen.bits >= EMBEDDING_BITS or chosen.protect or chosen.protect_fragments:
        return chosen
    endings = tuple(e for e in EMBEDDINGS + HEADS if any(e in name for name in source.tensors))
    if not endings:
        return chosen
    tell(f"note: {', '.join(endings)}: {bits} bits, unless --protect options or --uniform say otherwise")
    return replace(chosen, protect_fragments=endings, protected_bits=bits)


def predicts(args: argparse.Namespace, source: Source) -> bool:
    """Whether the model predicts the next token, as far as one can tell; an inventory says nothing of it."""
    if source.config is None and not getattr(args, "loader_kind", None):
        return True
    try:
        return find_loader_kind(args, source) in support.KINDS
    except TQFormatError:
        return not (source.config or {}).get("architectures")  # a GGUF file's, which is told later


def default_preset(args: argparse.Namespace) -> str:
    """The preset where no option names one: with feedback, unless another option asks for what only `fast` does."""
    return "fast" if args.uniform or SIGN in (args.stages or ()) else "balanced"


def check_uniform(args: argparse.Namespace, preset: str) -> None:
    """SCHEMA.VALUE where `--uniform` stands beside an option that contradicts it."""
    contradictions = {
        f"--preset {preset}": preset != "fast",
        "--target-bpw": args.target_bpw is not None,
        "--target-bytes": args.target_bytes is not None,
        "--protect": args.protect,
        "--protect-fragment": args.protect_fragment,
    }
    if found := next((option for option, given in contradictions.items() if given), None):
        advice = "--uniform gives every weight the same bits by the preset fast; leave one of the two out"
        raise TQFormatError("SCHEMA.VALUE", found, advice)


def feedback_options(args: argparse.Namespace) -> list[str]:
    """The options by which error feedback is asked to be otherwise than by default, and which nothing else knows."""
    asked = {
        "--output-feedback": args.output_feedback,
        "--calibration-inputs": args.calibration_inputs != INPUTS[-1],
        "--no-activation-order": not args.activation_order,
        "--spill": args.spill,
    }
    return [option for option, given in asked.items() if given]


def without_walk(args: argparse.Namespace, source: Source) -> argparse.Namespace:
    """The options, with the preset `fast` where none was chosen and feedback is not possible, which a line then explains."""
    asked = args.preset or args.calibration or args.calibration_tokens or args.tune_steps
    if (
        asked
        or feedback_options(args)
        or default_preset(args) == "fast"
        or not (obstacle := find_obstacle(args, source))
    ):
        return args
    tell(f"note: no error feedback, the preset is fast: {obstacle}")
    return argparse.Namespace(**vars(args) | {"preset": "fast"})


def find_obstacle(args: argparse.Namespace, source: Source) -> str | None:
    """Why the model's blocks cannot be walked with text that it writes itself; None where they can."""
    if (kind := find_loader_kind(args, source)) not in support.KINDS:
        return f"a model for {kind} writes no text to calibrate on"
    for library in ("transformers", "accelerate", *(["numba"] if args.device == "cpu" else [])):
        if not is_installed(library):
            return missing_library("", library).message
    from reference_quantizer.calibration.blocks import why_not_walked  # torch takes seconds to import
    from reference_quantizer.model.machine import default_cache, free_memory

    needed, free = 4 * sum(info.scalars for info in source.tensors.values()), free_memory()
    if args.device == "cpu" and needed > free:
        needs = f"its weights take {needed / 1e9:.0f} GB of memory while it writes text, {free / 1e9:.0f} GB are free"
        return f"{needs}; give text with --calibration, for which they stay in their files"
    return why_not_walked(source, kind, getattr(args, "cache_dir", None) or default_cache(), args.device)


def settings(args: argparse.Namespace) -> Settings:
    """The settings of a plan that the options ask for."""
    if args.protected_bits is not None and not (args.protect or args.protect_fragment):
        advice = "nothing is protected: add --protect NAME or --protect-fragment TEXT, or leave it out"
        raise TQFormatError("SCHEMA.VALUE", "--protected-bits", advice)
    preset = args.preset or default_preset(args)
    if args.uniform:
        check_uniform(args, preset)
    sized = args.target_bpw is not None or args.target_bytes is not None
    if preset == "fast" and not sized and (args.calibration or args.calibration_tokens):
        advice = "the preset fast uses no text; use --preset balanced or best, or a target"
        raise TQFormatError("SCHEMA.VALUE", "--calibration", advice)
    if preset == "fast" and (found := feedback_options(args)):
        raise TQFormatError("SCHEMA.VALUE", found[0], "the preset fast has no feedback; use balanced or best")
    if not sized and (args.candidate_bits, args.allocator) != (CANDIDATES, ALLOCATORS[0]):
        option = "--allocator" if args.candidate_bits == CANDIDATES else "--candidate-bits"
        raise TQFormatError("SCHEMA.VALUE", option, "bits are chosen for a target; add --target-bpw or --target-bytes")
    if preset == "best" and not sized and args.bits > WINDOWED_BITS:
        advice = f"trellis codes have at most {WINDOWED_BITS} bits; use --preset balanced"
        raise TQFormatError("SCHEMA.VALUE", f"--preset best --bits {args.bits}", advice)
    window = PRESETS[preset][1] if args.window is None else args.window
    if window is not None and not sized and window <= args.bits:
        raise TQFormatError("SCHEMA.VALUE", "--window", f"expected more than --bits {args.bits}, got {window}")
    if args.window is not None and PRESETS[preset][1] is None:
        raise TQFormatError("SCHEMA.VALUE", "--window", f"the preset {preset} has no trellis codes; use --preset best")
    if args.codebook != CODEBOOKS[0] and PRESETS[preset][1] is None:
        raise TQFormatError(
            "SCHEMA.VALUE", "--codebook", f"the preset {preset} has no trellis codes; use --preset best"
        )
    stages = args.stages or ()
    bits = sum(1 if word == SIGN else word for word in stages) or args.bits
    if stages and preset == "best":
        advice = f"trellis codes have one stage; use --preset balanced or fast, or --bits {bits}"
        raise TQFormatError("SCHEMA.VALUE", "--stages with --preset best", advice)
    if SIGN in stages and preset != "fast":
        advice = f"error feedback leaves no product unbiased; use --preset fast, or --bits {bits}"
        raise TQFormatError("SCHEMA.VALUE", f"--stages with --preset {preset}", advice)
    if SIGN in stages and args.rotation == "none":
        raise TQFormatError(
            "SCHEMA.VALUE", "--stages", "a sign is unbiased after a rotation only; use another --rotation"
        )
    widest = max((word for word in stages if word != SIGN), default=bits)
    if args.dimension > 1 and preset == "best":
        advice = "trellis codes have one weight per symbol; use --preset balanced or fast"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", advice)
    if args.dimension > 1 and sized:
        advice = "mixed precision has codebooks of one weight per symbol; use --bits"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", advice)
    if args.dimension * widest > MAX_SYMBOL:
        advice = f"expected at most {MAX_SYMBOL} bits per symbol, got {args.dimension} weights of {widest} bits"
        raise TQFormatError("SCHEMA.VALUE", "--dimension", f"{advice}; use fewer of either, or --stages")
    return Settings(
        bits=bits,
        preset=preset,
        window=window,
        codebook=args.codebook,
        dimension=args.dimension,
        stages=stages,
        rotation=args.rotation,
        vector_length=args.vector_length,
        seed=args.seed,
        grid_size=args.grid_size,
        iterations=args.iterations,
        scale_dtype=args.scale_dtype if args.scale_dtype == "auto" else args.scale_dtype.upper(),
        include=tuple(args.include),
        exclude=tuple(args.exclude),
        protect=tuple(args.protect),
        protect_fragments=tuple(args.protect_fragment),
        protected_bits=args.protected_bits,
        inputs=args.calibration_inputs,
        ordered=args.activation_order,
        output_feedback=preset == "best" if args.output_feedback is None else args.output_feedback,
    )


def request_of(args: argparse.Namespace) -> Request | None:
    """What the options ask for; None without a target."""
    texts = tuple(args.calibration or ("self",))
    if args.target_bpw is None and args.target_bytes is None:
        return None
    return Request(
        args.target_bpw, args.target_bytes, args.candidate_bits, args.allocator, texts, args.calibration_tokens
    )


def find_calibration(args: argparse.Namespace, source: Source, plan: Plan) -> "Calibration | None":
    """The tokens that a preset with error feedback needs; None for the others."""
    if plan.settings.preset == "fast":
        return None
    if args.device == "cpu":
        need(f"--preset {plan.settings.preset}", "numba")  # told before hours of work
    from reference_quantizer.calibration.tokens import SELF, find_tokens  # torch takes seconds to import

    texts, tokens, kind = *feedback_text(args), find_loader_kind(args, source)
    if SELF in texts and kind not in support.KINDS:
        advice = f"a model for {kind} writes no text; give some, or use --preset fast"
        raise TQFormatError("SCHEMA.VALUE", "--calibration", advice)
    return find_tokens(source, kind, texts, tokens, getattr(args, "cache_dir", None), args.device)


def feedback_text(args: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """The calibration text of a preset with error feedback, and how many tokens of it."""
    texts = tuple(args.calibration or ("self",))
    return texts, args.calibration_tokens or FEEDBACK_TOKENS["self" if "self" in texts else "given"]


def tell_time(args: argparse.Namespace, source: Source, chosen: Settings, steps: int) -> None:
    """How long a CPU takes for all that follows, `steps` of tuning included, by a preset with error feedback."""
    if args.device != "cpu" or chosen.preset == "fast":
        return
    texts, tokens = feedback_text(args)
    allocator = args.allocator if request_of(args) else None
    scalars = sum(info.scalars for info in source.tensors.values())
    tell(expected_time(scalars, chosen, tokens, "self" in texts, steps, allocator, os.cpu_count() or 1))


def tuning_steps(args: argparse.Namespace, chosen: Settings, loader_kind: str) -> int:
    """How many steps of tuning follow on quantizing; none for models that cannot be tuned, which a line then says."""
    usual = TUNING_STEPS if chosen.preset == "best" else 0
    steps = usual if args.tune_steps is None else int(args.tune_steps)
    if not steps:
        return 0
    if chosen.preset == "fast":
        advice = "the preset fast uses no text, and tuning needs some; use --preset balanced or best"
        raise TQFormatError("SCHEMA.VALUE", "--tune-steps", advice)
    if loader_kind not in support.KINDS:
        tell(f"note: not tuned: a model for {loader_kind} does not predict the next token")
        return 0
    return steps


def find_tuning_tokens(args: argparse.Namespace, source: Source, calibration: "Calibration") -> "Calibration":
    """More tokens of the texts that feedback has; of what the model writes itself, which takes long, half as many again."""
    from reference_quantizer.calibration.tokens import SELF, find_tokens

    kind = find_loader_kind(args, source)
    if calibration.texts == (SELF,):
        return add_written(source, kind, calibration, args.device)
    tokens = max(TUNING_TOKENS, calibration.tokens)
    return find_tokens(source, kind, tuple(args.calibration), tokens, None, args.device)


def add_written(source: Source, kind: str, calibration: "Calibration", device: str) -> "Calibration":
    """`calibration`, which the model wrote itself, and half as many tokens that it writes besides."""
    import torch

    from reference_quantizer.calibration.tokens import find_tokens

    more = find_tokens(source, kind, calibration.texts, calibration.tokens // 2, None, device, seed=1)
    return replace(calibration, ids=torch.cat([calibration.ids, more.ids]))


def find_loader_kind(args: argparse.Namespace, source: Source) -> str:
    """Which class builds the model: the option's word, or what config.json calls for."""
    return getattr(args, "loader_kind", None) or support.find_loader_kind(source.config)


def evaluation_datasets(args: argparse.Namespace) -> list[str]:
    """The texts that the options ask for."""
    return args.dataset or [DATASET]


def evaluation_settings(args: argparse.Namespace) -> Any:
    """The evaluate.Settings that the options ask for."""
    from reference_quantizer.evaluation.evaluate import Settings

    names = ("max_length", "stride", "max_windows", "bos", "batch", "device", "dtype", "kl", "floor")
    return Settings(**{name: getattr(args, name) for name in names})


def evaluation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The further arguments of evaluate.evaluate that the options ask for."""
    return {name: getattr(args, name) for name in ("split", "dataset_revision", "cache_dir", "quiet")}
