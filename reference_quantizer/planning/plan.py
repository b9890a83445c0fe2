"""What becomes of each tensor of a checkpoint, decided from names, shapes and dtypes alone; `quantize` executes it."""

import math
import re
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from reference_quantizer.checkpoint.source import Info, Source, same_bytes
from reference_quantizer.codes.rotation import divisors, rotation_size
from reference_quantizer.planning.settings import SIGN, Settings
from tqformat.load_quantized import DTYPES as ITEMSIZE
from tqformat.load_quantized import FLOATS, TQFormatError

MAX_COLS = 2**20  # [TQ-MAN-7]
HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight"),
    *("tok_embeddings.weight", "token_embedding.weight"),
)
WINDOWED_BITS = 6  # up to which a trellis is used: above it, the default window spans less than two weights
TILE_ROWS = 320  # at most, of a trellis that runs down a column
SHORT_TILE_ROWS = 128  # the same where there is feedback from tile to tile
KERNEL_ROWS = 128  # kernels divide a tile among so many lanes
MANY_TILES = 16  # from which on one that is left over hardly matters
MAX_SYMBOL = 16  # bits [TQ-CODE-1]
EMBEDDING_BITS = 8  # from which on embeddings and output layers need no feedback; what they have where there is none
EMBEDDING_MARGIN = 1  # bits that they have more than other weights where there is feedback for them
LARGE = 2**16  # scalars from which storing a tied tensor once is worth a look at its bytes


@dataclass(frozen=True)
class Allocation:
    """Bits that were chosen weight by weight, and why: sensitivities by name, and what the manifest says of both."""

    bits: dict[str, int]
    sensitivities: dict[str, float]
    record: dict[str, Any]  # the manifest's quantization.allocation
    calibration: dict[str, Any]  # and quantization.calibration
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Book:
    """A codebook to be made, of `bits` a weight: Lloyd-Max levels for vectors of `vector_length`; with window > bits those
    of a trellis, trained for these bits or computed, whatever the bits; with dimension > 1 entries of so many weights; or
    the two levels of an unbiased sign.
    """

    bits: int
    vector_length: int = 0
    window: int = 0
    computed: bool = False
    dimension: int = 1
    sign: bool = False

    @property
    def entries(self) -> int:
        return 2 ** max(self.bits * self.dimension, self.window)

    @property
    def stored(self) -> bool:
        """Whether the levels are in the payload, as F16; others are inline."""
        return self.window > self.bits or self.dimension > 1

    @property
    def nbytes(self) -> int:
        """In the payload."""
        return 2 * self.entries * self.dimension if self.stored else 0


@dataclass(frozen=True)
class Stage:
    """One stage of a weight: codes for what the stages before it leave."""

    bits: int  # per weight
    codebook: str
    transform: str


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's fate. `bits` is None for a passthrough tensor, and `reason` says why it is one."""

    info: Info
    stored_bytes: int
    bits: int | None = None  # per weight, of all stages
    vector_length: int = 0  # G
    stages: tuple[Stage, ...] = ()
    reason: str = ""
    protected: bool = False
    sensitivity: float | None = None  # what the allocation went by
    tile_rows: int = 0  # of a trellis; 0: scalar or vector codes
    dimension: int = 1  # p

    @property
    def kind(self) -> str:
        return "passthrough" if self.bits is None else "quantized"


@dataclass(frozen=True)
class Plan:
    """The whole repository, except for its values."""

    settings: Settings
    tensors: list[TensorPlan]
    transforms: dict[str, tuple[str, int, int]]  # id -> kind, size, seed
    codebooks: dict[str, Book]
    ties: dict[str, str] = field(default_factory=dict)  # alias -> source
    notes: list[str] = field(default_factory=list)
    allocation: Allocation | None = None

    def to_quantization(self) -> dict[str, Any]:
        """The manifest's `quantization` object [TQ-MAN-5]."""
        entry = self.settings.to_quantization()
        if self.allocation:
            entry |= {"allocation": self.allocation.record, "calibration": self.allocation.calibration}
        return entry

    @property
    def table_bytes(self) -> int:
        """Bytes of the stored rotation matrices and codebooks; small codebooks and signs are inline."""
        matrices = sum(4 * size * size for kind, size, _ in self.transforms.values() if kind == "dense")
        return matrices + sum(book.nbytes for book in self.codebooks.values())

    @property
    def model_order(self) -> list[str]:
        """All names in the order in which a model uses its weights, as far as names tell: layer 2 before layer 10, heads last."""

        def place(name: str) -> tuple[bool, list[str | int]]:
            return name.endswith(HEADS), [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", name)]

        return sorted((t.info.name for t in self.tensors), key=place)

    def accounting(self) -> dict[str, int | float]:
        """The manifest's `accounting` [TQ-ACC-1, TQ-ACC-2]."""
        quantized = [t for t in self.tensors if t.bits is not None]
        passthrough = [t for t in self.tensors if t.bits is None]
        original = sum(t.info.nbytes for t in self.tensors)
        stored = sum(t.stored_bytes for t in self.tensors) + self.table_bytes
        return {
            "original_bytes": original,
            "stored_bytes": stored,
            "ratio": round(original / stored, 6) if stored else 0,
            "quantized_tensors": len(quantized),
            "passthrough_tensors": len(passthrough),
            "quantized_scalars": sum(t.info.scalars for t in quantized),
            "passthrough_scalars": sum(t.info.scalars for t in passthrough),
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        tensors: dict[str, dict[str, Any]] = {}
        for t in self.tensors:
            entry = {"kind": t.kind, "shape": list(t.info.shape), "dtype": t.info.dtype, "stored_bytes": t.stored_bytes}
            if t.bits is None:
                entry |= {"reason": t.reason}
            else:
                entry |= {"bits": t.bits, "vector_length": t.vector_length, "protected": t.protected}
                entry |= {"tile_rows": t.tile_rows, "dimension": t.dimension, "stages": [asdict(s) for s in t.stages]}
            tensors[t.info.name] = entry
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        result = {"settings": settings, "accounting": self.accounting(), "tensors": tensors}
        if self.allocation:
            result |= {"allocation": self.allocation.record, "calibration": self.allocation.calibration}
        return result | {"tied_weights": self.ties, "notes": self.notes}


def make_plan(source: Source, settings: Settings, allocation: Allocation | None = None) -> Plan:
    """Decide every tensor of `source`. Reads headers alone, and the bytes of tensors that look tied.

    `allocation` has the bits of each weight that `settings` quantize and do not protect.
    """
    missing = [name for name in settings.protect if name not in source.tensors]
    if missing:
        raise TQFormatError("SCHEMA.REFERENCE", f"--protect {missing[0]}", "the checkpoint has no tensor of this name")
    for pattern in settings.include:
        if not any(fnmatchcase(name, pattern) for name in source.tensors):
            known = ", ".join(list(source.tensors)[:3])
            raise TQFormatError(
                "SCHEMA.REFERENCE", f"--include {pattern}", f"no tensor has such a name; there are {known}, ..."
            )
    ties = find_ties(source, settings)
    plan = Plan(settings, [], {}, {}, ties, list(source.notes), allocation)
    counts: dict[str, int] = {}  # line -> tensors that it is about
    for name, info in source.tensors.items():
        if name not in ties:
            plan.tensors.append(_plan_tensor(info, settings, plan, counts))
    plan.notes.extend(f"{line} ({count} tensor{'s' * (count > 1)})" for line, count in counts.items())
    for pattern in settings.exclude:
        if not any(fnmatchcase(name, pattern) for name in source.tensors):
            plan.notes.append(f"the glob {pattern!r} matches no tensor")
    for fragment in settings.protect_fragments:
        if not any(fragment in name for name in source.tensors):
            plan.notes.append(f"no tensor name holds the protected fragment {fragment!r}")
    plan.notes.extend(f"{alias} equals {original} byte for byte: stored once" for alias, original in ties.items())
    plan.notes.extend(allocation.notes if allocation else ())
    return plan


def _plan_tensor(info: Info, settings: Settings, plan: Plan, counts: dict[str, int]) -> TensorPlan:
    """Decide one tensor, and add the tables that it needs to `plan` and lines worth telling to `counts`."""

    def tell(line: str) -> None:
        counts[line] = counts.get(line, 0) + 1

    bits, reason, protected = choose_bits(info, settings)
    if bits is None:
        if info.cols > MAX_COLS and len(info.shape) >= 2:
            tell(f"rows of {info.cols} are beyond the format's {MAX_COLS}: kept as they are")
        return TensorPlan(info, info.nbytes, reason=reason, protected=protected)
    sensitivity = None
    if plan.allocation and not protected:
        bits, sensitivity = plan.allocation.bits[info.name], plan.allocation.sensitivities[info.name]
    g = choose_vector_length(info.cols, settings.vector_length)
    if settings.vector_length not in (None, g):
        tell(f"rows of {info.cols}: vectors of {g}, their largest divisor up to {settings.vector_length}")
    kind = {"hadamard": "hadamard", "haar": "dense", "none": "identity"}[settings.rotation]
    size = 1 if kind == "identity" else rotation_size(kind, g)
    if kind != "identity" and size < g:
        what = f"rotated in blocks of {size}" if size > 1 else "not rotated"
        tell(f"vectors of {g}: {what}, the largest size that {settings.rotation} has for them")
    if SIGN in settings.stages and size == 1:
        tell(f"vectors of {g}: not rotated, so inner products with them are not unbiased")
    kind = "identity" if size == 1 else kind
    tile_rows = choose_tile_rows(info, bits, settings.window, settings.output_feedback)
    if settings.window is not None and not tile_rows and bits <= WINDOWED_BITS and bits < settings.window:
        tell(f"{info.rows} row{'s' * (info.rows > 1)}: scalar codes, since no divisor of them suits a trellis")
    p = 1 if protected else choose_dimension(g, settings.dimension)
    if not protected and p < settings.dimension:
        tell(f"vectors of {g}: {p} weight{'s' * (p > 1)} a symbol, since {settings.dimension} do not divide them")
    stages = []
    for k, word in enumerate(settings.stages if settings.stages and not protected else (bits,)):
        transform = kind if size == 1 else f"{settings.rotation}-{size}" + (f"-stage{k}" if k else "")
        plan.transforms[transform] = (kind, size, (settings.seed + k) % 2**53)
        codebook, book = choose_book(
            word, g, p, settings.window if tile_rows else None, settings.codebook == "computed"
        )
        plan.codebooks[codebook] = book
        stages.append(Stage(book.bits, codebook, transform))
    scale_dtype = "F32" if settings.scale_dtype == "F32" else "F16"  # BF16 is as long
    shape = info.rows, info.cols, g
    stored = sum(stored_bytes_of_stage(*shape, stage.bits, scale_dtype, tile_rows) for stage in stages)
    facts = {"protected": protected, "sensitivity": sensitivity, "tile_rows": tile_rows, "dimension": p}
    return TensorPlan(info, stored, bits, g, tuple(stages), **facts)


def choose_book(
    bits: int | str, vector_length: int, dimension: int, window: int | None, computed: bool = False
) -> tuple[str, Book]:
    """The codebook of a stage, and its id; `bits` may be SIGN, `window` and `computed` are those of a trellis."""
    if isinstance(bits, str):
        return SIGN, Book(1, sign=True)
    if window is not None and computed:
        return f"byte-sum-w{window}", Book(bits, window=window, computed=True)
    if window is not None:
        return f"trellis-b{bits}-w{window}", Book(bits, window=window)
    if dimension > 1:
        return f"vector-p{dimension}-b{bits}", Book(bits, dimension=dimension)
    return f"lloyd-max-g{vector_length}-b{bits}", Book(bits, vector_length)


def choose_bits(info: Info, settings: Settings) -> tuple[int | None, str, bool]:
    """The bits of a tensor, or None and the reason why it stays as it is; and whether the protection rules matched."""
    protected = info.name in settings.protect or any(f in info.name for f in settings.protect_fragments)
    if info.dtype not in FLOATS:
        return None, f"dtype {info.dtype}", protected
    if not 2 <= len(info.shape) <= 8 or info.cols < 1:
        return None, f"shape {list(info.shape)}", protected
    if info.cols > MAX_COLS:
        return None, "too many columns", protected
    if settings.include and not any(fnmatchcase(info.name, glob) for glob in settings.include):
        return None, "not included", protected
    if any(fnmatchcase(info.name, glob) for glob in settings.exclude):
        return None, "excluded", protected
    if protected:
        return settings.protected_bits, "" if settings.protected_bits else "protected", True
    return settings.bits, "", False


def choose_tile_rows(info: Info, bits: int, window: int | None, output_feedback: bool = False) -> int:
    """How many rows of a column one trellis covers; 0 where codes are scalar: many bits, odd shapes.

    A multiple of KERNEL_ROWS where one divides the rows [TQ-CODE-7], else what leaves no bits unused. With output feedback,
    which goes from tile to tile, tiles are short.
    """
    if window is None or not bits < window or bits > WINDOWED_BITS:
        return 0
    most = SHORT_TILE_ROWS if output_feedback else TILE_ROWS
    fitting = [d for d in divisors(info.rows) if 4 * window <= d * bits and d <= most and d * info.cols <= 2**22]
    whole = [d for d in fitting if d * bits % 8 == 0] or fitting  # without unused bits
    suited = [d for d in whole if d % KERNEL_ROWS == 0] or whole
    even = [d for d in suited if info.rows // d % 2 == 0 or info.rows // d > MANY_TILES]  # encoded side by side
    return next(iter(even if even and not output_feedback else suited), 0)


def is_embedding(name: str) -> bool:
    """Whether the name is that of an embedding or an output layer."""
    return name.endswith(EMBEDDINGS + HEADS)


def choose_vector_length(cols: int, wanted: int | None) -> int:
    """G for rows of `cols`: the largest divisor of `cols` that is not above `wanted`."""
    return cols if wanted is None else next(d for d in divisors(cols) if d <= wanted)


def choose_dimension(vector_length: int, wanted: int) -> int:
    """Weights per symbol: the largest power of two up to `wanted` that divides the vectors."""
    return math.gcd(vector_length, wanted)


def find_ties(source: Source, settings: Settings) -> dict[str, str]:
    """Output heads and embeddings with the same bytes and the same fate: alias -> the embedding that is stored."""
    if source.is_inventory:
        return {}
    endings = EMBEDDINGS + HEADS
    matrices = {n: i for n, i in source.tensors.items() if len(i.shape) == 2 and i.scalars >= LARGE}
    named = {n: i for n, i in matrices.items() if n.endswith(endings)}
    ranked = sorted(named, key=lambda n: (next(k for k, ending in enumerate(endings) if n.endswith(ending)), n))
    ties: dict[str, str] = {}
    for k, name in enumerate(ranked):
        for original in ranked[:k]:
            alike = original not in ties and original.endswith(EMBEDDINGS)
            alike = alike and choose_bits(named[original], settings) == choose_bits(named[name], settings)
            if alike and same_bytes(source, named[original], named[name]):
                ties[name] = original
                break
    return ties


def stored_bytes_of_stage(
    rows: int, cols: int, vector_length: int, bits: int, scale_dtype: str, tile_rows: int = 0
) -> int:
    """Bytes of codes and scales; tiles are [tile_rows, 1], or [1, cols] if that is 0 [TQ-CODE-4, TQ-NUM-1]."""
    codes = rows // tile_rows * cols * -(-tile_rows * bits // 8) if tile_rows else rows * -(-cols * bits // 8)
    return codes + rows * (cols // vector_length) * ITEMSIZE[scale_dtype]
