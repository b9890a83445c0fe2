"""Read tqformat 1.0 repositories: low-bit model weights that anybody can check and decode. Licence: Apache-2.0.

This file is all of tqformat's reading, in the order of SPEC.md. It needs the standard library and torch (with numpy);
transformers is imported when a model is built. It is embedded in model repositories and works there alone:

    from load_quantized import load_quantized_model, load_tokenizer
    model, manifest = load_quantized_model(".", device="cuda")
    tokenizer = load_tokenizer(".")

It opens no connection, runs no code from a repository and unpickles nothing. Input that breaks a rule raises TQFormatError, which says where.
"""

import functools
import gc
import hashlib
import importlib
import json
import math
import os
import re
import threading
import typing
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Dtype: typing.TypeAlias = torch.dtype | None
    PathLike: typing.TypeAlias = str | os.PathLike[str]
    Shape: typing.TypeAlias = tuple[int | Container[int], ...]  # each dimension, or those that are allowed
else:

    class _Torch:  # imported when it is first used, so that a manifest can be read without it
        def __getattr__(self, name):
            global torch
            torch = importlib.import_module("torch")
            return getattr(torch, name)

    torch = _Torch()

__version__ = "1.0.0"
MANIFEST = "quant_manifest.json"


class TQFormatError(ValueError):
    """Input that SPEC.md forbids or this reader cannot handle: stable code, place, expected and found [TQ-ERR-1]."""

    def __init__(self, code: str, where: str, message: str) -> None:
        super().__init__(f"[{code}] {where}: {message}")
        self.code, self.where, self.message = code, where, message

    def inside(self, where: str) -> "TQFormatError":
        """The same error, whose place is a part of `where`."""
        return TQFormatError(self.code, where + self.where, self.message)


def require(ok: object, code: str, where: str, expected: str, found: object = None, advice: str = "") -> None:
    if not ok:
        got = "" if found is None else f", got {str(found)[:80]}"
        raise TQFormatError(code, where, f"expected {expected}{got}{advice}")


# 3 JSON ---------------------------------------------------------------------------------------------------------------
def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data` by the strict rules of SPEC section 3; raises TQFormatError JSON.* otherwise."""
    twice: list[tuple[dict[str, Any], str]] = []  # objects, and a key that they repeat

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) < len(items):
            twice.append((result, Counter(key for key, _ in items).most_common(1)[0][0]))
        return result

    def integer(text: str) -> int:  # [TQ-JSON-4]
        require(len(text) <= 17 and abs(int(text)) < 2**53, "JSON.NUMBER", where, "an integer within 2^53 - 1", text)
        return int(text)

    def real(text: str) -> float:
        require(math.isfinite(value := float(text)), "JSON.NUMBER", where, "a finite number", text)
        return value

    def constant(text: str) -> None:
        raise TQFormatError("JSON.SYNTAX", where, f"expected JSON, got {text}")

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
        if "\\u" in text:  # [TQ-JSON-1] finds the surrogates that escapes leave
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise TQFormatError("JSON.ENCODING", where, f"expected UTF-8 without surrogates: {error}") from None
    except json.JSONDecodeError as error:
        code = "JSON.ENCODING" if data.startswith(b"\xef\xbb\xbf") else "JSON.SYNTAX"
        raise TQFormatError(code, where, f"expected one JSON text: {error}") from None
    except RecursionError:  # [TQ-JSON-5]
        raise TQFormatError("JSON.DEPTH", where, "expected at most 64 levels of nesting") from None
    for found, key in twice:  # [TQ-JSON-3]
        at = where if found is value else f"{where}, below the top"
        raise TQFormatError("JSON.DUPLICATE_KEY", at, f"expected each key once in an object, got {key!r}")
    require(isinstance(value, dict), "JSON.SYNTAX", where, "an object")  # [TQ-JSON-2]
    return dict(value)


# 4 Manifest: the tables of the specification as frozen dataclasses. After Manifest.from_dict they are trusted. ---------

DTYPES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1) | {"U16": 2, "I16": 2, "F16": 2}
DTYPES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}  # in bytes [TQ-PAY-4]
TORCH_NAMES = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16"}
FLOATS = ("F16", "BF16", "F32")
OVERFLOW = {"F16": 65520.0, "BF16": (2 - 2**-8) * 2.0**127, "F32": math.inf}  # what rounds to infinity
HASHING = min(os.cpu_count() or 1, 16)  # threads that compute digests
NARROW = 32  # the order of matrices whose products are exact enough in float32
SMALL = ("U8", "I8", "F8_E4M3", "F8_E8M0")  # scales and offsets that outer ones multiply [TQ-NUM-1]
FEATURES: tuple[str, ...] = ("trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles")
FEATURES += ("offsets", "outer_scales", "fine_scales", "dense", "givens", "permutation")  # [TQ-VER-1]
LOADER_KINDS = {"text-generation": "AutoModelForCausalLM", "image-text-to-text": "AutoModelForImageTextToText"}
LOADER_KINDS |= {"text2text-generation": "AutoModelForSeq2SeqLM"}
LOADER_KINDS |= {"automatic-speech-recognition": "AutoModelForSpeechSeq2Seq", "fill-mask": "AutoModelForMaskedLM"}
LOADER_KINDS |= {"text-classification": "AutoModelForSequenceClassification"}  # [TQ-MAN-5]
LOADER_KINDS |= {"image-classification": "AutoModelForImageClassification", "feature-extraction": "AutoModel"}
Count = Annotated[int, (0, 2**53 - 1)]
Size = Annotated[int, (1, 2**20)]
_NAME = r"(?!__metadata__\Z)(?![/\\])(?!(.*[/\\])?\.\.([/\\]|\Z))[^\x00-\x1f\x7f]{1,512}"
Name = Annotated[str, _NAME, "1 to 512 characters, none a control character, no path, not __metadata__"]  # [TQ-MAN-4]
_FILE = r"(?!(?i:(quant_manifest\.json|readme\.md|__pycache__)\Z|(con|prn|aux|nul|com[1-9]|lpt[1-9])(\.|\Z)))"
_FILE += r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(?<!\.)"
_FILE_TEXT = "1 to 128 of A-Z a-z 0-9 . _ -, no . or - in front, no . at the end, no reserved name: README.md, nul ..."
FileName = Annotated[str, _FILE, _FILE_TEXT, "PATH.NAME"]  # a pattern, in words, and its error's code [TQ-REPO-2]
Sha256 = Annotated[str, "[0-9a-f]{64}", "64 lower-case hexadecimal digits"]
Extra = dict[str, Any]


@dataclass(frozen=True, slots=True)
class File:
    role: Literal["payload", "support", "code", "document"]
    size: Count
    sha256: Sha256
    chunk_size: Annotated[int, (4096, 2**53 - 1)] | None = None
    chunks: tuple[Sha256, ...] | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Transform:
    kind: Literal["identity", "hadamard", "dense", "givens", "permutation"]
    size: Size
    factors: tuple[Size, ...] | None = None
    signs: Annotated[str, "[0-9a-f]*", "lower-case hexadecimal digits"] | None = None
    seed: Count | None = None
    matrix: Name | None = None
    pairs: Name | None = None
    angles: Name | None = None
    index: Name | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Codebook:
    entries: Annotated[int, (1, 2**16)]
    dimension: Annotated[int, (1, 64)]
    values: tuple[float, ...] | None = None
    tensor: Name | None = None
    rows: Count | None = None
    origin: Extra | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stage:
    bits: Annotated[int, (1, 16)]
    codebook: str
    transform: str
    codes: Name
    scales: Name
    window: Annotated[int, (1, 16)] | None = None
    vector_length: Size | None = None
    tile: tuple[Annotated[int, (1, 2**22)], ...] | None = None
    outer_scales: Name | None = None
    offsets: Name | None = None
    outer_offsets: Name | None = None
    extra: Extra = field(default_factory=dict)

    def layout(self, cols: int) -> tuple[int, int, int, int]:
        """(window, G, tr, tc) for a weight of `cols` columns, defaults filled in [TQ-MAN-2]."""
        tr, tc = self.tile or (1, cols)
        return self.window or self.bits, self.vector_length or cols, tr, tc


@dataclass(frozen=True, slots=True)
class Weight:
    kind: Literal["quantized", "passthrough"]
    shape: tuple[Count, ...]
    dtype: str
    effective_bits: float | None = None
    stages: tuple[Stage, ...] | None = None
    column_scale: Name | None = None
    data: Name | None = None
    extra: Extra = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    format: str
    format_version: str
    features: tuple[str, ...]
    generator: str
    base_model: Extra
    loader_kind: Literal[tuple(LOADER_KINDS)]  # type: ignore[valid-type]
    quantization: Extra
    files: dict[FileName, File]
    transforms: dict[Name, Transform]
    codebooks: dict[Name, Codebook]
    tensors: dict[Name, Weight]
    accounting: Extra
    pipeline_tag: str | None = None
    tied_weights: dict[Name, Name] = field(default_factory=dict)
    extra: Extra = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Manifest":
        """The manifest in parsed JSON, with the checks of [TQ-ERR-3] that need no other file."""
        name, version, features = data.get("format"), data.get("format_version"), data.get("features")
        ok = name == "tqformat" and isinstance(version, str) and re.fullmatch(r"1\.(0|[1-9][0-9]*)", version)
        require(ok, "SCHEMA.VERSION", "format_version", "'tqformat' version 1.x", f"{name!r} version {version!r}")
        for feature in features if isinstance(features, list) else ():  # [TQ-VER-2]
            ok, wanted = feature in FEATURES or not isinstance(feature, str), f"one of {', '.join(FEATURES)}"
            require(ok, "SCHEMA.UNKNOWN_FEATURE", "features", f"{wanted} (or a newer reader)", feature)
        for key in ("files", "transforms", "codebooks", "tensors", "tied_weights"):  # [TQ-LIM-1]
            ok = not isinstance(data.get(key), dict) or len(data[key]) <= 2**20
            require(ok, "LIMIT.SIZE", key, "at most 2^20 entries")
        manifest: Manifest = typed(cls, data, "")
        require(len({*manifest.features}) == len(manifest.features), "SCHEMA.VALUE", "features", "each feature once")
        for key, file in manifest.files.items():
            size, chunks, at = file.chunk_size, file.chunks, f"files[{key!r}].chunks"  # [TQ-REPO-8]
            require((size is None) == (chunks is None), "SCHEMA.MISSING_FIELD", at, "chunk_size and chunks, or neither")
            ok = size is None or chunks is None or len(chunks) == -(-file.size // size) <= 2**20
            require(ok, "SCHEMA.VALUE", at, "a digest for each chunk, at most 2^20", len(chunks or ()))
        for key, t in manifest.transforms.items():
            check_transform(t, f"transforms[{key!r}]")
        for key, c in manifest.codebooks.items():
            check_codebook(c, f"codebooks[{key!r}]")
        for key, w in manifest.tensors.items():
            check_weight(w, f"tensors[{key!r}]", manifest)
        for alias, source in manifest.tied_weights.items():  # [TQ-TIE-1]
            ok = alias not in manifest.tensors and source in manifest.tensors
            require(ok, "BIND.TIED", f"tied_weights[{alias!r}]", "a new name for an entry of tensors", source)
        return manifest


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `kind` wants it: closed objects, no conversions [TQ-MAN-1, TQ-MAN-2]."""
    try:
        return _typed(_about(kind), value)
    except TQFormatError as error:
        raise TQFormatError(error.code, (where + error.where).lstrip("."), error.message) from None


@functools.cache
def _about(kind: Any) -> tuple[Any, ...]:
    """Of an annotation: the result's type, its parts, JSON's type, what must hold, or which error, keys needed, if optional."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return (*_about(args[0])[:-1], True)
    if is_dataclass(kind):
        parts = {key: _about(hint) for key, hint in typing.get_type_hints(kind, include_extras=True).items()}
        needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        return kind, parts, dict, None, (), needed, False
    if origin is Annotated and args[0] is int:
        (low, high), otherwise = args[1], f"an integer from {args[1][0]} to {args[1][1]}"
        return kind, None, int, range(low, high + 1).__contains__, ("SCHEMA.VALUE", otherwise), (), False
    if origin is Annotated:
        return kind, None, str, re.compile(args[1]).fullmatch, ([*args, "SCHEMA.VALUE"][3], args[2]), (), False
    if origin is Literal:
        return kind, None, str, args.__contains__, ("SCHEMA.VALUE", f"one of {', '.join(args)}"), (), False
    each = [_about(arg) for arg in args] if origin is tuple or (origin is dict and args[1] is not Any) else None
    return origin, each, {tuple: list, dict: dict}.get(origin, kind), None, (), (), False


def _typed(about: tuple[Any, ...], value: Any) -> Any:
    """As typed; the place in an error begins at the value."""
    origin, parts, json_type, holds, otherwise, needed, optional = about
    if optional and value is None:
        return None
    if type(value) is not json_type and json_type is not Any and (json_type is not float or type(value) is not int):
        names = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
        require(False, "SCHEMA.TYPE", "", names.get(json_type, "another type"), json.dumps(value, default=repr))
    if holds and not holds(value):
        require(False, otherwise[0], "", otherwise[1], repr(value))
    if not parts:
        return value
    at: Any = None  # the key or index in work
    try:
        if origin is tuple:
            return tuple([_typed(parts[0], value[at := i]) for i in range(len(value))])
        if origin is dict:
            return {_typed(parts[0], at := key): _typed(parts[1], part) for key, part in value.items()}
        for at in value.keys() - parts.keys():
            require(at is None, "SCHEMA.UNKNOWN_FIELD", "", f"only {', '.join(parts)}")
        for at in needed:
            require(at in value, "SCHEMA.MISSING_FIELD", "", "this key to be given")
        for at in ONLY & value.keys():
            require(value[at] is not None, "SCHEMA.TYPE", "", "another value than null")
        return origin(**{(at := key): _typed(parts[key], part) for key, part in value.items()})
    except TQFormatError as error:
        raise error.inside(f".{at}" if needed else f"[{at!r}]") from None


KEYS: dict[str, tuple[str, ...]] = {"hadamard": ("factors", "signs"), "dense": ("matrix",), "permutation": ("index",)}
KEYS |= {"givens": ("pairs", "angles"), "quantized": ("effective_bits", "stages"), "passthrough": ("data",)}
ONLY = {key for keys in KEYS.values() for key in keys}


def _check_keys(item: Transform | Weight, where: str) -> None:  # [TQ-MAN-6]
    for kind, keys in KEYS.items():
        for key in keys if hasattr(item, keys[0]) else ():
            ok = (getattr(item, key) is not None) == (kind == item.kind)
            code = "SCHEMA.MISSING_FIELD" if kind == item.kind else "SCHEMA.AMBIGUOUS"
            require(ok, code, f"{where}.{key}", f"this key for {kind}, and only there")


def check_transform(t: Transform, where: str) -> None:
    _check_keys(t, where)
    require(t.kind == "hadamard" or t.seed is None, "SCHEMA.AMBIGUOUS", f"{where}.seed", "this key for hadamard only")
    ok = (t.kind != "dense" or t.size <= 4096) and (t.kind != "givens" or t.size % 2 == 0)  # [TQ-TRAN-7, TQ-TRAN-8]
    require(ok, "SCHEMA.VALUE", f"{where}.size", "at most 4096 for dense, an even number for givens", t.size)
    if t.factors is not None and t.signs is not None:  # [TQ-TRAN-4, TQ-TRAN-5]
        ok = 1 <= len(t.factors) <= 20 and 1 not in t.factors and math.prod(t.factors) == t.size
        ok = ok and all(map(_order_kind, t.factors))
        require(ok, "SCHEMA.VALUE", f"{where}.factors", f"Sylvester or Paley orders with product {t.size}", t.factors)
        ok = len(t.signs) == 2 * -(-t.size // 8) and (t.size % 8 == 0 or int(t.signs[-2:], 16) >> t.size % 8 == 0)
        require(ok, "SCHEMA.VALUE", f"{where}.signs", f"{t.size} bits, the unused ones zero", t.signs)


def check_codebook(c: Codebook, where: str) -> None:
    size = c.entries * c.dimension
    require(None in (c.values, c.tensor), "SCHEMA.AMBIGUOUS", where, "values or tensor, not both")  # [TQ-BOOK-1]
    require(c.values is not None or c.tensor is not None, "SCHEMA.MISSING_FIELD", f"{where}.values", "values or tensor")
    require(size <= 2**20, "SCHEMA.VALUE", f"{where}.entries", "at most 2^20 levels", size)  # [TQ-BOOK-5]
    ok = c.values is None or (len(c.values) == size <= 4096 and c.rows is None)  # [TQ-BOOK-3]
    require(ok, "SCHEMA.VALUE", f"{where}.values", f"{size} numbers, at most 4096, no rows", len(c.values or ()))


def check_weight(w: Weight, where: str, m: Manifest) -> None:
    _check_keys(w, where)
    ok = w.kind == "quantized" or w.column_scale is None
    require(ok, "SCHEMA.AMBIGUOUS", f"{where}.column_scale", "this key for quantized only")
    ok = w.dtype in (FLOATS if w.kind == "quantized" else DTYPES)
    require(ok, "SCHEMA.VALUE", f"{where}.dtype", "F16, BF16 or F32 (quantized), or a known dtype", w.dtype)
    ok = len(w.shape) <= 8 and math.prod(n or 1 for n in w.shape) * DTYPES[w.dtype] < 2**53  # [TQ-SEC-3]
    require(ok, "SCHEMA.VALUE", f"{where}.shape", "at most 8 dimensions and 2^53 - 1 bytes", w.shape)
    if w.stages is None:
        return
    rows, cols = math.prod(w.shape[:-1]), (w.shape or (0,))[-1]
    ok = len(w.shape) >= 2 and 1 <= cols <= 2**20 and 1 <= len(w.stages) <= 8  # [TQ-MAN-7]
    require(ok, "SCHEMA.VALUE", where, "rank 2 to 8, 1 to 2^20 columns, 1 to 8 stages", list(w.shape))
    for i, s in enumerate(w.stages):
        at = f"{where}.stages[{i}]"
        require(s.codebook in m.codebooks, "SCHEMA.REFERENCE", f"{at}.codebook", "an id in codebooks", s.codebook)
        require(s.transform in m.transforms, "SCHEMA.REFERENCE", f"{at}.transform", "an id in transforms", s.transform)
        require(s.tile is None or len(s.tile) == 2, "SCHEMA.VALUE", f"{at}.tile", "[rows, columns]", s.tile)
        book, size, (window, g, tr, tc) = m.codebooks[s.codebook], m.transforms[s.transform].size, s.layout(cols)
        p, most = book.dimension, min(16, 8 * book.dimension)
        require(s.bits <= most, "SCHEMA.VALUE", f"{at}.bits", f"an integer from 1 to {most}", s.bits)  # [TQ-CODE-1]
        require(s.bits <= window, "SCHEMA.VALUE", f"{at}.window", f"an integer from {s.bits} to 16", window)
        ok = rows % tr == 0 and cols % tc == 0 and tc % p == 0 and tr * tc // p * s.bits >= window  # [TQ-CODE-2]
        require(ok, "SCHEMA.VALUE", f"{at}.tile", f"a divisor of [{rows}, {cols}] that holds whole entries", [tr, tc])
        ok = cols % g == 0 and g % p == 0  # [TQ-NUM-1, TQ-CODE-2]
        require(ok, "SCHEMA.VALUE", f"{at}.vector_length", f"a divisor of {cols}, a multiple of {p}", g)
        ok = cols % size == 0 and 0 in (g % size, size % g)  # [TQ-TRAN-1]
        require(ok, "SCHEMA.VALUE", f"{at}.transform", f"a size that divides {cols}, and {g} or the reverse", size)
        ok = s.offsets is not None or s.outer_offsets is None  # [TQ-NUM-9]
        require(ok, "SCHEMA.MISSING_FIELD", f"{at}.offsets", "offsets where outer_offsets are")
        ok = book.entries == 2**window if window > s.bits else book.entries <= 2**window  # [TQ-BOOK-4]
        ok = ok and book.rows in (None, rows)
        require(ok, "SCHEMA.VALUE", f"{at}.codebook", f"window {window}, {rows} rows", book)
    area = math.lcm(*(s.layout(cols)[2] for s in w.stages)) * cols
    require(area <= 2**22, "SCHEMA.VALUE", f"{where}.stages", "tile rows times columns within 2^22", area)


# 5 Payload container --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Entry:  # of a safetensors header; data_offsets count from its end [TQ-PAY-3]
    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class Span:  # where a payload tensor lies: bytes `begin` to `end` of `file`
    file: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO, size: int, name: str) -> dict[str, Span]:
    """The tensors of the safetensors file `name` of `size` bytes, read strictly by SPEC section 5."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    ok = len(prefix) == 8 and 2 <= length <= 100_000_000 and 8 + length <= size  # [TQ-PAY-1]
    require(ok, "CONTAINER.HEADER_LENGTH", name, f"a header that fits a file of {size} bytes", length)
    text = file.read(length).rstrip(b" ")  # [TQ-PAY-2]
    require(text[:1] + text[-1:] == b"{}", "CONTAINER.HEADER", name, "an object followed by nothing but spaces")
    try:
        header = parse_json(text, name)
        typed(dict[str, str], header.pop("__metadata__", {}), f"{name}: __metadata__")
        entries: dict[str, Entry] = typed(dict[str, Entry], header, name)
    except TQFormatError as error:
        ok = (error.code, error.where) == ("JSON.DUPLICATE_KEY", name) and "'__metadata__'" not in error.message
        code = "CONTAINER.DUPLICATE_NAME" if ok else "CONTAINER.HEADER"
        raise TQFormatError(code, error.where, error.message) from None
    spans, start = {}, 8 + length
    for key, entry in entries.items():
        where = f"{name}: {key!r}"
        ok = len(entry.shape) <= 8 and len(entry.data_offsets) == 2
        require(ok, "CONTAINER.HEADER", where, "at most 8 dimensions and two data_offsets")
        require(entry.dtype in DTYPES, "CONTAINER.DTYPE", where, "a known dtype", entry.dtype)  # [TQ-PAY-4]
        (begin, end), nbytes = entry.data_offsets, math.prod(entry.shape) * DTYPES[entry.dtype]
        ok = end - begin == nbytes and math.prod(n or 1 for n in entry.shape) * DTYPES[entry.dtype] < 2**53
        require(ok, "CONTAINER.SHAPE", where, f"{nbytes} bytes, fewer than 2^53", entry.data_offsets)
        spans[key] = Span(file, entry.dtype, entry.shape, start + begin, start + end)
    ordered = sorted(spans.values(), key=lambda s: (s.begin, s.end))
    for span in ordered:  # [TQ-PAY-5]
        require(span.begin == start, "CONTAINER.OFFSETS", name, f"tensor data at byte {start}", span.begin)
        start = span.end
    require(start == size, "CONTAINER.OFFSETS", name, f"the file to end with its last tensor, at byte {start}", size)
    odd = [f"{s.dtype} at byte {s.begin}" for s in ordered if s.begin % DTYPES[s.dtype] and s.begin < s.end]
    require(not odd, "CONTAINER.ALIGNMENT", name, "tensors at multiples of their element sizes", odd)  # [TQ-PAY-8]
    return spans


def fits(shape: tuple[int, ...], wanted: "Shape") -> bool:
    each = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(n == w if isinstance(w, int) else n in w for n, w in each)


def stored_tensors(m: Manifest) -> Iterator[tuple[str, tuple[str, ...], "Shape", str]]:
    """Every storage name in the manifest, its allowed dtypes, its shape and its place [TQ-PAY-6]."""
    for name, t in m.transforms.items():
        where = f"transforms[{name!r}]"
        if t.matrix is not None:  # [TQ-TRAN-7]
            yield t.matrix, FLOATS, (t.size, t.size), f"{where}.matrix"
        if t.pairs is not None and t.angles is not None:  # [TQ-TRAN-8]
            yield t.pairs, ("I32",), (range(1, 65), t.size // 2, 2), f"{where}.pairs"
            yield t.angles, ("F32",), (range(1, 65), t.size // 2), f"{where}.angles"
        if t.index is not None:  # [TQ-TRAN-9]
            yield t.index, ("I32",), (t.size,), f"{where}.index"
    for name, c in m.codebooks.items():
        if c.tensor is not None:  # [TQ-BOOK-3]
            shape = (c.entries, c.dimension) if c.rows is None else (c.rows, c.entries, c.dimension)
            yield c.tensor, FLOATS, shape, f"codebooks[{name!r}].tensor"
    for name, w in m.tensors.items():
        where = f"tensors[{name!r}]"
        if w.data is not None:  # [TQ-PASS-1]
            yield w.data, (w.dtype,), w.shape, f"{where}.data"
        for i, s in enumerate(w.stages or ()):
            rows, cols, at = math.prod(w.shape[:-1]), w.shape[-1], f"{where}.stages[{i}]"
            _, g, tr, tc = s.layout(cols)
            n = cols // g
            tile_bytes = -(-tr * tc // m.codebooks[s.codebook].dimension * s.bits // 8)  # [TQ-CODE-4]
            yield s.codes, ("U8",), (rows * cols // (tr * tc), tile_bytes), f"{at}.codes"
            for kind in ("scales", "offsets"):
                values, outer = getattr(s, kind), getattr(s, f"outer_{kind}")
                if values is not None:  # [TQ-NUM-1, TQ-NUM-9]
                    yield values, FLOATS if outer is None else SMALL, (rows, n), f"{at}.{kind}"
                if outer is not None:  # [TQ-NUM-8]
                    parts = sorted({d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)})
                    yield outer, FLOATS, ((rows, 1), parts), f"{at}.outer_{kind}"
        if w.column_scale is not None:  # [TQ-NUM-2]
            yield w.column_scale, FLOATS, (w.shape[-1],), f"{where}.column_scale"


# 6 Codes --------------------------------------------------------------------------------------------------------------
def unpack(codes: "Tensor", n: int, bits: int, window: int) -> "Tensor":
    """The symbols, int32 [tiles, n], of `codes`, uint8 [tiles, tile_bytes] [TQ-CODE-5, TQ-CODE-6]. Inverse of writer.pack."""
    whole, rest = divmod(n * bits, 8)
    ok = not rest or not bool((codes[:, -1] >> rest).any())
    require(ok, "PACK.PADDING", "codes", "the unused high bits of each tile's last byte to be zero")
    if bits == window == 8:
        return codes.int()
    period = 8 // math.gcd(bits, 8)  # so many symbols take whole bytes, `size` of them
    groups, size = -(-n // period), bits * period // 8
    stream = codes.new_zeros(len(codes), groups * size + 3, dtype=torch.int32)
    stream[:, : codes.shape[1]] = codes
    if window > bits:  # the stream goes on with its own first bits
        head = (stream[:, 0] | stream[:, 1] << 8 | stream[:, 2] << 16) & (1 << window - bits) - 1
        for k in range(3):
            stream[:, whole + k] |= head << rest >> 8 * k & 255
    octets = stream.unfold(1, size + 2, size)[:, :groups]  # [tiles, groups, size + 2]
    symbols = codes.new_empty(len(codes), groups, period, dtype=torch.int32)
    for j in range(period):
        byte, shift = divmod(j * bits, 8)
        if j * bits // 8 > (j - 1) * bits // 8:
            word = octets[:, :, byte] | octets[:, :, byte + 1] << 8 | octets[:, :, byte + 2] << 16
        symbols[:, :, j] = word >> shift & (1 << window) - 1
    return symbols.reshape(len(codes), groups * period)[:, :n]


# 7 Codebooks ----------------------------------------------------------------------------------------------------------
def table(levels: "Tensor", bits: int, window: int, k: int) -> "Tensor":
    """Levels of k symbols by the bits that they lie in, float32 [2^(window + (k-1) bits), k * p]; NaN for no symbol.

    `levels` is float32 [entries, p] [TQ-BOOK-4, TQ-BOOK-6]; the tables of [n, entries, p] come one below the other.
    """
    levels = torch.nn.functional.pad(levels, (0, 0, 0, (1 << window) - levels.shape[-2]), value=math.nan)
    index = torch.arange(1 << window + k * bits - bits)[:, None] >> torch.arange(k) * bits
    return levels[..., index & (1 << window) - 1, :].flatten(-2).flatten(0, -2)


def lookup(symbols: "Tensor", table: "Tensor") -> "Tensor":
    """The rows of `table` [m, width] that `symbols` name, as float32 [symbols * width]."""
    kind = {1: torch.float32, 2: torch.float64, 4: torch.complex128}.get(table.shape[1])
    if kind is not None and table.device.type != "mps":  # scalars are looked up several times faster than rows
        table = table.view(kind)[:, 0]
    return table.index_select(0, symbols.flatten()).view(torch.float32).flatten()


# 8 Transforms: each is built as its inverse, a function of blocks float32 [m, B] ---------------------------------------
def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))


def _order_kind(f: int) -> str:
    """Which construction gives a Hadamard matrix of order f; empty if none does [TQ-TRAN-4]."""
    if f & (f - 1) == 0:
        return "sylvester"
    if f <= 2048 and f % 4 == 0 and _is_prime(f - 1):
        return "paley1"
    return "paley2" if f <= 2048 and f % 4 == 0 and f // 2 % 4 == 2 and _is_prime(f // 2 - 1) else ""


@functools.lru_cache(maxsize=8)  # a Paley factor may take 16 MiB, and there are 220 of them
def hadamard_factor(f: int) -> "Tensor":
    """H_f as float32 [f, f], entries 1 and -1 [TQ-TRAN-4]."""
    kind = _order_kind(f)
    if kind == "sylvester":
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        return torch.kron(two, hadamard_factor(f // 2)) if f > 1 else torch.ones(1, 1)
    q = f - 1 if kind == "paley1" else f // 2 - 1
    i, chi = torch.arange(q), torch.full((q,), -1.0)
    chi[i * i % q], chi[0] = 1.0, 0.0
    c = torch.nn.functional.pad(chi[(i[:, None] - i) % q], (1, 0, 1, 0), value=1.0)  # order q + 1
    c[0, 0] = 0.0
    if kind == "paley1":
        c[1:, 0] = -1.0
        return c + torch.eye(q + 1)
    same, cross = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    return torch.kron(c, cross) + torch.kron(torch.eye(q + 1), same)


def hadamard_matrices(factors: tuple[int, ...]) -> list["Tensor"]:
    """Matrices of which H_f1 (x) H_f2 ... is the product: Sylvester's split to at most 32, small neighbours joined."""
    matrices: list[Tensor] = []
    for f in reversed(factors):
        e = f.bit_length() - 1
        many = -(-e // 5) if f == 1 << e else 1
        for h in [hadamard_factor(1 << (e + i) // many if f == 1 << e else f) for i in reversed(range(many))]:
            if matrices and len(h) * len(matrices[0]) <= NARROW:
                matrices[0] = torch.kron(h, matrices[0])
            else:
                matrices.insert(0, h)
    return matrices


def wide(y: "Tensor") -> "Tensor":
    """float64 where the device has it."""
    return y if y.device.type == "mps" else y.double()


def inverse_hadamard(factors: tuple[int, ...], signs: str, device: "torch.device") -> Callable[["Tensor"], "Tensor"]:
    """y -> s * (H_f1 (x) H_f2 ...)^t y / sqrt(B) [TQ-TRAN-3, TQ-TRAN-5].

    In float32, and in float64 where its rounding could leave the tolerance of [TQ-NUM-4]: products of great matrices, all
    where the program has set TF32 or bfloat16 for products, and blocks whose sums have terms of one sign: they peak.
    """
    size = math.prod(factors)
    bits = torch.tensor(list(bytes.fromhex(signs)))[:, None] >> torch.arange(8) & 1
    s = wide((1.0 - 2.0 * bits.flatten()[:size]).to(device)) / math.sqrt(size)
    double = [wide(h.to(device)) for h in hadamard_matrices(factors)]
    ones = torch.full((256, 64), 1 + 2.0**-20, dtype=torch.float32, device=device)
    exact = torch.equal(ones @ torch.eye(64, dtype=torch.float32, device=device), ones)
    single = [h.float() if exact and len(h) <= NARROW else h for h in double]
    most, s32 = 0.5 if sum(map(len, single)) > 32 else 1.0, s.float()

    def rotate(y: "Tensor", matrices: list["Tensor"]) -> "Tensor":
        below = size
        for h in matrices:
            y, below = y.to(h.dtype), below // len(h)
            y = y.reshape(-1, len(h)) @ h if below == 1 else h.t() @ y.reshape(-1, len(h), below)
        return y.reshape(-1, size)

    def inverse(y: "Tensor") -> "Tensor":
        x = rotate(y, single).float().mul_(s32)
        peak, norm = torch.maximum(x.amax(1), -x.amin(1)), torch.linalg.vector_norm(x, dim=1)
        good = (peak <= most * norm) & (peak > 2.0**-50) & (peak < 2.0**50)  # NaN is not
        if not bool(good.all()):
            x[~good] = (rotate(wide(y[~good]), double) * s).float()
        return x

    return inverse


def inverse_givens(pairs: "Tensor", angles: "Tensor") -> Callable[["Tensor"], "Tensor"]:
    """Rotates back, last round first; pairs [rounds, B/2, 2], angles [rounds, B/2] [TQ-TRAN-8]."""
    rounds = [(p[:, 0], p[:, 1], a.cos(), a.sin()) for p, a in zip(pairs.long(), wide(angles), strict=True)]

    def inverse(y: "Tensor") -> "Tensor":
        y = wide(y)
        for i, j, c, s in reversed(rounds):
            a, b = y[:, i], y[:, j]
            y = y.index_copy(1, i, c * a + s * b).index_copy(1, j, c * b - s * a)
        return y.float()

    return inverse


# 9 to 13 Numbers, stages, passthrough, ties, shards: an open repository ------------------------------------------------
def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name."""
    plain = name.replace("U", "uint").replace("I", "int").replace("F", "float").lower()
    dtype = getattr(torch, TORCH_NAMES.get(name, plain), None)
    require(dtype is not None, "UNSUPPORTED.LIBRARY", name, "a torch that has this dtype", torch.__version__)
    return dtype  # type: ignore[return-value]


def finite(values: "Tensor", where: str, dtype: str = "F32") -> "Tensor":
    """`values`, float32, once they are seen to be finite, rounded to `dtype`, too."""
    if values.numel():
        low, high = (float(end) for end in values.aminmax())  # NaN if there is one
        require(-OVERFLOW[dtype] < low and high < OVERFLOW[dtype], "DATA.NON_FINITE", where, "finite numbers")
    return values


class Repo(ExitStack):
    """An open repository; get one from open_repo. Weights are decoded one at a time, their groups of rows in parallel.

    Digests are computed beside that; leaving the context waits for them, and a wrong one is told before other errors.
    """

    def __init__(self, path: "PathLike", verify: bool = True, beside: bool = False) -> None:
        super().__init__()  # closes the files
        self.path, self._verify, self._lock = Path(path), verify, threading.Lock()
        self._advice = f"; if you changed it yourself: python -m tqformat update {path}"
        self.spans: dict[str, Span] = {}
        self._tables: dict[Any, Any] = {}
        self._digests: list[Future[None]] = []
        self._hashing = self.enter_context(ThreadPoolExecutor(HASHING))
        collects = gc.isenabled()
        gc.disable()  # it would look at all objects again and again while those of a great manifest are made
        try:
            self.manifest = m = read_manifest(self.path)
            known = {MANIFEST, "README.md", "__pycache__", *m.files}
            extra = [key for key in sorted(os.listdir(path)) if key[0] != "." and key not in known]  # [TQ-REPO-5]
            require(not extra, "BIND.EXTRA_FILE", str(path), "only files that the manifest lists", extra, self._advice)
            self._open_payload(m)
            if not beside:
                self.settle()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        finally:
            if collects:
                gc.enable()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None or isinstance(error, TQFormatError):
                self.settle()
        finally:
            self._verify = False  # stops what is still being hashed
            super().__exit__(kind, error, trace)

    def settle(self) -> None:
        """Waits for the payload's digests; raises TQFormatError BIND.DIGEST if one is wrong."""
        for digest in self._digests:
            digest.result()

    @functools.cached_property
    def _workers(self) -> ThreadPoolExecutor:
        """Threads that decode groups of rows, each with one thread of torch: beside busy cores more of these spin."""
        threads = torch.get_num_threads()

        def start() -> None:
            torch.get_num_threads()  # or torch would take the number of new threads when it first works in this one
            torch.set_num_threads(1)
            torch.empty(31 << 20, dtype=torch.uint8)  # from now on glibc keeps what is freed: new pages are slow
            reset = threading.Thread(target=torch.set_num_threads, args=(threads,))  # what new threads start with
            reset.start()
            reset.join()

        return self.enter_context(ThreadPoolExecutor(threads, initializer=start))

    def _open_payload(self, m: Manifest) -> None:
        named = re.compile(r"turboquant_weights.*\.safetensors")
        shards = sorted(name for name, file in m.files.items() if file.role == "payload" or named.fullmatch(name))
        many = [f"turboquant_weights-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        ok = shards == ["turboquant_weights.safetensors"] or (shards == many and len(shards) > 1)  # [TQ-SHARD-1]
        ok = ok and all(m.files[name].role == "payload" for name in shards)
        require(ok, "BIND.SHARDS", "files", "turboquant_weights.safetensors or its shards as payload", shards)
        for name in shards:
            file = self.enter_context(self.check_file(name, beside=True).open("rb"))
            header = read_header(file, m.files[name].size, name)
            require(header or not shards[1:], "BIND.SHARDS", name, "a tensor in every shard")  # [TQ-SHARD-2]
            for key, span in header.items():
                require(key not in self.spans, "CONTAINER.DUPLICATE_NAME", name, "a name once in all shards", key)
                self.spans[key] = span
        seen: set[str] = set()
        for key, dtypes, shape, where in stored_tensors(m):  # [TQ-PAY-6]
            require(key not in seen, "BIND.MULTIPLE", where, "a storage name that nothing else uses", key)
            require(key in self.spans, "BIND.MISSING_TENSOR", where, "a tensor in the payload", key)
            seen.add(key)
            span, code = self.spans[key], "PACK.LENGTH" if where.endswith(".codes") else "BIND.TENSOR"
            ok = span.dtype in dtypes and fits(span.shape, shape)
            require(ok, code, where, f"{' or '.join(dtypes)} {list(shape)}", f"{span.dtype} {list(span.shape)}")
        extra = sorted(self.spans.keys() - seen)
        require(not extra, "BIND.EXTRA_TENSOR", "payload", "only tensors that the manifest names", extra)
        for name, t in m.transforms.items():  # [TQ-TRAN-8]
            rounds = {self.spans[key].shape[0] for key in (t.pairs, t.angles) if key is not None}
            require(len(rounds) <= 1, "BIND.TENSOR", f"transforms[{name!r}]", "as many pairs as angles", rounds)

    def check_file(self, name: str, beside: bool = False) -> Path:
        """The path of a listed file, once its type, its size and (by default) its digest are right [TQ-REPO-1, TQ-REPO-4].

        `beside`: or while the digest is being computed.
        """
        path, listed = self.path / name, self.manifest.files[name]
        advice = self._advice * (listed.role != "payload")
        require(path.exists(), "BIND.MISSING_FILE", name, f"this file in {self.path}")
        require(path.is_file(), "PATH.TYPE", name, "a regular file")
        require((n := path.stat().st_size) == listed.size, "BIND.SIZE", name, f"{listed.size} bytes", n, advice)
        size, digests = listed.chunk_size or listed.size, listed.chunks or (listed.sha256,)  # [TQ-REPO-8]

        def check(k: int) -> None:
            left, digest, block = size, hashlib.sha256(), memoryview(bytearray(1 << 18))
            with open(path, "rb", buffering=0) as file:
                file.seek(k * size)
                while self._verify and (n := file.readinto(block[:left])):
                    digest.update(block[:n])
                    left -= n
            found, wanted = digest.hexdigest(), f"sha256 {digests[k]} of the bytes from {k * size}"
            require(found == digests[k] or not self._verify, "BIND.DIGEST", name, wanted, found, advice)

        ks = range(len(digests) * self._verify)
        self._digests += [self._hashing.submit(check, k) for k in ks if beside]
        for k in () if beside else ks:  # here, as those of the payload may keep the other threads busy
            check(k)
        return path

    def check_roles(self, *roles: str) -> None:
        for name in [key for key, file in self.manifest.files.items() if file.role in roles]:
            self.check_file(name)

    def names(self) -> list[str]:
        """The names of all weights, aliases of tied weights not among them."""
        return list(self.manifest.tensors)

    def dequantize(self, name: str, device: Any = "cpu", dtype: "Dtype" = None) -> "Tensor":
        """The weight (or alias) `name`, decoded on `device` in its shape; `dtype` converts the result [TQ-NUM-7]."""
        device, name = find_device(device), self.manifest.tied_weights.get(name, name)
        require(name in self.manifest.tensors, "BIND.MISSING_TENSOR", name, "a weight of this repository")
        try:  # in threads of our own, where modes and settings that the caller's thread is in do not hold
            result, fill, groups = self._workers.submit(self._plan, self.manifest.tensors[name], device, dtype).result()
            list(self._workers.map(fill, groups))
        except TQFormatError as error:
            raise error.inside(f"tensors[{name!r}].") from None
        return result

    def _plan(self, w: Weight, device: "torch.device", dtype: "Dtype") -> tuple["Tensor", Callable[[int], None], range]:
        """A place for the weight, what fills a group of its rows, and the first row of each group [TQ-LIM-2]."""
        own, cols = torch_dtype(w.dtype), w.shape[-1] if w.stages else 1
        result, decode = torch.empty(w.shape, dtype=dtype or own, device=device), self._decoder(w, device)
        matrix = result.reshape(-1, cols)  # passthrough: [scalars, 1]
        books = [self.manifest.codebooks[s.codebook] for s in w.stages or ()]
        height = math.lcm(*(s.layout(cols)[2] for s in w.stages or ()))
        width = height * max(cols, *(c.entries * c.dimension for c in books if c.rows is not None), 1)
        elements, group = len(matrix) // height * width, 19 if device.type == "cpu" else 23  # of 2^group, or fewer,
        many = max(-(-elements >> group), min(self._workers._max_workers, elements >> group - 2), 1)  # some a thread
        step = max(1, len(matrix) // height // many) * height

        def fill(a: int) -> None:
            b = min(len(matrix), a + step)
            try:
                values = decode(a, b)
            except TQFormatError as error:
                raise TQFormatError(error.code, f"{error.where}, rows {a} to {b - 1}", error.message) from None
            matrix[a:b] = values if result.dtype == own else values.to(own)

        return result, fill, range(0, max(1, len(matrix)), step)

    def _decoder(self, w: Weight, device: "torch.device") -> Callable[[int, int], "Tensor"]:
        """Gives rows a to b of a weight, before they are rounded to its dtype [TQ-STAGE-2, TQ-PASS-1]."""
        if (data := w.data) is not None:
            return lambda a, b: self._read(data, a, b, flat=True).view(torch_dtype(w.dtype)).to(device)[:, None]
        stages = [self._stage_decoder(s, w.shape[-1], device, f"stages[{i}].") for i, s in enumerate(w.stages or ())]

        def decode(a: int, b: int) -> "Tensor":
            total = functools.reduce(torch.Tensor.add_, (stage(a, b) for stage in stages))
            if w.column_scale is not None:  # [TQ-NUM-2]
                total *= self._floats(w.column_scale, "column_scale", device)
            return finite(total, "decoded values", w.dtype)  # [TQ-NUM-6]

        return decode

    def _stage_decoder(
        self, s: Stage, cols: int, device: "torch.device", where: str = "", rotated: bool = False
    ) -> Callable[[int, int], "Tensor"]:
        """Gives rows a to b of a stage, float32 [b - a, cols] [TQ-STAGE-1]; `rotated`: as they are before T^-1."""
        book, t = self.manifest.codebooks[s.codebook], self.manifest.transforms[s.transform]
        (window, g, tr, tc), p, bits = s.layout(cols), book.dimension, s.bits
        own = None if book.rows is None else book.tensor
        n, across = tr * tc // p, cols // tc
        great = t.matrix is not None or any(f > 256 and _order_kind(f) != "sylvester" for f in t.factors or ())
        inverse = self._kept(lambda: self._inverse(t, device), great, s.transform, device)
        many = (k for k in (4, 2) if n % k == 0 and k * p <= 4 and k * p << window + k * bits - bits <= 2**16)
        k = next(many, 1) if own is None else 1  # symbols that one look-up takes, of a table of 256 KiB at most

        def make() -> "Tensor":
            return table(self._levels(book), bits, window, k).to(device)

        shared: Any = self._kept(make, False, s.codebook, bits, window, k, device) if own is None else None

        def decode(a: int, b: int) -> "Tensor":
            codes, levels = self._read(s.codes, a // tr * across, b // tr * across).to(device), shared
            symbols = unpack(codes, n // k, bits * k, window + bits * k - bits)
            if own is not None:  # [TQ-BOOK-3]
                levels = table(self._floats(own, f"{where}codebook", device, a, b), bits, window, 1)
                first = (torch.arange(b - a, device=device) << window).reshape(-1, 1, tr, 1)
                symbols = symbols.reshape(-1, across, tr, tc // p) + first
            y = lookup(symbols, levels)
            ok = book.entries == 1 << window or not y.numel() or not bool(y.amax().isnan())
            require(ok, "PACK.CODE_RANGE", f"{where}codes", f"symbols below {book.entries}")  # [TQ-BOOK-4]
            y = y.reshape(-1, across, tr, tc).transpose(1, 2).contiguous().reshape(b - a, cols // g, g)  # [TQ-CODE-3]
            y *= self._scales(s, "scales", a, b, device, where)
            if s.offsets is not None:  # [TQ-NUM-9]
                y += self._scales(s, "offsets", a, b, device, where)
            return (y if rotated else inverse(y.reshape(-1, t.size))).reshape(b - a, cols)

        return decode

    def _scales(self, s: Stage, kind: str, a: int, b: int, device: "torch.device", where: str) -> "Tensor":
        """Rows a to b of the scales or offsets, float32 [b - a, cols/G, 1] [TQ-NUM-1, TQ-NUM-8]."""
        key, outer = getattr(s, kind), getattr(s, f"outer_{kind}")
        values = self._floats(key, where + kind, device, a, b)
        if outer is not None:
            rows = (0, 1) if self.spans[outer].shape[0] == 1 else (a, b)
            factors = self._floats(outer, f"{where}outer_{kind}", device, *rows)[:, :, None]  # [rows or 1, n, 1]
            values = values.reshape(b - a, factors.shape[1], values.shape[1] // factors.shape[1])
            products = values * factors
            if bool(((products.abs() < 2.0**-126) & (values != 0) & (factors != 0)).any()):  # subnormal [TQ-NUM-5]
                products = wide(values) * factors
            values = products.flatten(1)
        return values[:, :, None]

    def _kept(self, make: Callable[[], Any], great: bool, *key: Any) -> Any:
        """make(), kept by its key for the next weights; of great ones one at a time (a dense matrix may take 128 MiB)."""
        if (found := self._tables.get(key)) is None:
            if great or len(self._tables) > 16:
                self._tables = {}
            found = self._tables[key] = make()
        return found

    def _levels(self, book: Codebook) -> "Tensor":
        """float32 [entries, p], on the CPU [TQ-BOOK-2, TQ-BOOK-3]."""
        if book.tensor is not None:
            return self._floats(book.tensor, "codebook")
        return finite(torch.tensor(book.values, dtype=torch.float64).float(), "codebook").reshape(book.entries, -1)

    def _inverse(self, t: Transform, device: "torch.device") -> Callable[["Tensor"], "Tensor"]:
        if t.matrix is not None:  # [TQ-TRAN-7]
            q = wide(self._floats(t.matrix, "transform", device))
            return lambda y: (wide(y) @ q).float()
        if t.pairs is not None and t.angles is not None:  # [TQ-TRAN-8]
            pairs, angles = self._read(t.pairs), self._floats(t.angles, "transform", device)
            ok = torch.equal(pairs.flatten(1).sort(1).values, torch.arange(t.size).expand(len(pairs), -1).int())
            require(ok, "DATA.PAIRS", "transform", "every index once in each round")
            return inverse_givens(pairs.to(device), angles)
        if t.index is not None:  # [TQ-TRAN-9]
            values, places = self._read(t.index).to(device).sort()
            ok = torch.equal(values.cpu(), torch.arange(t.size).int())
            require(ok, "DATA.PERMUTATION", "transform", "every index once")
            return lambda y: y.index_select(1, places)
        if t.factors is not None and t.signs is not None:
            return inverse_hadamard(t.factors, t.signs, device)
        return lambda y: y  # [TQ-TRAN-2]

    def _floats(self, key: str, where: str, device: Any = "cpu", a: int = 0, b: int | None = None) -> "Tensor":
        """Rows a to b of a payload tensor as float32, once they are seen to be finite."""
        values = self._read(key, a, b).to(device)
        if self.spans[key].dtype == "F8_E8M0":  # the exponents of float32 numbers: 0 is subnormal there, 255 infinite
            values = (values.int() << 23 | (values == 0).int() << 22).view(torch.float32)
        return finite(values.float(), where)

    def _read(self, key: str, a: int = 0, b: int | None = None, flat: bool = False) -> "Tensor":
        """Rows a to b of a payload tensor (its scalars, if flat) as a new tensor on the CPU; F8_E8M0 as its bytes."""
        span = self.spans[key]
        shape = (math.prod(span.shape),) if flat else span.shape
        shape = ((shape[0] if b is None else b) - a, *shape[1:])
        width = math.prod(shape[1:]) * DTYPES[span.dtype]
        dtype = torch_dtype("U8" if span.dtype == "F8_E8M0" else span.dtype)  # torch before 2.7 has no F8_E8M0
        data = torch.empty(shape[0] * width, dtype=torch.uint8)
        with self._lock:
            span.file.seek(span.begin + a * width)
            ok = span.file.readinto(data.numpy().data) == len(data)  # type: ignore[attr-defined]
        require(ok, "BIND.SIZE", key, "a file that does not change while it is read")
        return data.view(dtype).reshape(shape)


open_repo = Repo


def read_manifest(path: "PathLike") -> Manifest:
    """The checked manifest of a repository directory; needs no torch."""
    file, path = Path(path) / MANIFEST, Path(path)
    found = ", ".join(sorted(os.listdir(path))) if path.is_dir() else "no directory"
    plain = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    hint = f"; load this plain checkpoint with transformers, or python -m reference_quantizer quantize {path} OUT"
    require(file.is_file(), "BIND.MISSING_FILE", str(path), f"a directory with {MANIFEST}", found, hint * plain)
    require(file.stat().st_size <= 2**26, "LIMIT.SIZE", MANIFEST, "at most 64 MiB", file.stat().st_size)  # [TQ-LIM-1]
    return Manifest.from_dict(parse_json(file.read_bytes(), MANIFEST))


def load_state_dict(path: "PathLike", device: Any = "cpu", dtype: "Dtype" = None, verify: bool = True) -> Extra:
    """All weights of a repository directory by name, floats in `dtype`; tied weights share their tensors [TQ-TIE-1]."""
    with Repo(path, verify, beside=True) as repo:
        floats = {name for name, w in repo.manifest.tensors.items() if torch_dtype(w.dtype).is_floating_point}
        state = {name: repo.dequantize(name, device, dtype if name in floats else None) for name in repo.names()}
        return state | {alias: state[source] for alias, source in repo.manifest.tied_weights.items()}


# Models: transformers maps weights to modules by its own rules; this code hands it the weights -------------------------

REFUSED = {"token", "cache_dir", "local_files_only", "force_download", "subfolder", "variant", "gguf_file"}
REFUSED |= {"quantization_config", "tp_plan", "tp_size", "device_mesh", "distributed_config"}
LIBRARIES = "needs transformers 5.4 or newer, accelerate and huggingface_hub (the extra `models` of tqformat)"
_building = threading.Lock()  # transformers changes what is global while it builds a model: torch.nn.init, its logging


def load(path: "PathLike", device: Any = None, dtype: "Dtype" = None, verify: bool = True, **options: Any) -> Any:
    """The ready model, in eval mode, of a repository directory; `dtype` defaults to the configuration's.

    It is built on `device`, the CPU by default, or as `device_map` says. Other `options` are those of transformers'
    from_pretrained (trust_remote_code, max_memory, attn_implementation ...) or keys of the configuration.
    """
    with Repo(path, verify, beside=True) as repo, _building:
        return build_model(repo, device, dtype, options)


def load_quantized_model(path: "PathLike" = ".", device: Any = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, manifest as parsed JSON): the call that model cards of this kind show; `options` are those of load."""
    return load(path, device, **options), parse_json((Path(path) / MANIFEST).read_bytes(), MANIFEST)


def load_tokenizer(path: "PathLike" = ".", verify: bool = True) -> Any:
    """The tokenizer of a repository directory."""
    transformers = import_transformers()
    with open_repo(path, verify=False) as repo:
        repo._verify = verify
        repo.check_roles("support")
        names = [name for name, file in repo.manifest.files.items() if file.role == "support"]
    ok = any(re.search(r"tokenizer|vocab|merges|tekken|\.(model|spm|tiktoken)\Z", name) for name in names)
    require(ok, "BIND.MISSING_FILE", str(path), "files of a tokenizer; this repository has none", ", ".join(names))
    with translated("tokenizer_config.json"):
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def find_device(device: Any) -> "torch.device":
    with translated(f"device {device!r}", "UNSUPPORTED.DEVICE"):
        return torch.empty(0, device=device).device


def import_transformers() -> Any:
    with translated("transformers", "UNSUPPORTED.LIBRARY"):
        import accelerate  # noqa: F401 (with it transformers places weights on a device)
        import transformers

        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
            raise ImportError(f"transformers is {transformers.__version__}")
        return transformers


@contextmanager
def translated(where: str, code: str = "BIND.MODEL") -> Iterator[None]:
    """What transformers and huggingface_hub say about what they cannot use or find, as an error of ours."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, (TQFormatError, MemoryError)) or "out of memory" in text:
            raise
        if isinstance(error, ImportError):
            code, text = "UNSUPPORTED.LIBRARY", f"{LIBRARIES}: {text}"
        elif "trust_remote_code" in str(error):
            code = "UNSUPPORTED.REMOTE_CODE"
            text = "this is program text of the repository: read it, then load the model with trust_remote_code=True"
        elif "keyword argument" in text:  # an option that nobody knows, or that is the loader's
            code = "SCHEMA.UNKNOWN_FIELD"
        raise TQFormatError(code, where, text) from error


class LazyWeight:
    """Stands for a weight in the state dict: decodes when transformers moves it to its device, so that none exists twice."""

    def __init__(self, repo: Repo, name: str) -> None:
        w = repo.manifest.tensors[repo.manifest.tied_weights.get(name, name)]
        self.repo, self.name, self.shape, self.dtype = repo, name, w.shape, torch_dtype(w.dtype)

    def __getitem__(self, _: Any) -> "LazyWeight":
        return self

    def to(self, device: Any = None, dtype: "Dtype" = None) -> "Tensor":
        if str(device) == "meta":
            return torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        return self.repo.dequantize(self.name, "cpu" if device is None else device, dtype)  # 0 is a GPU


def fits_model(m: Manifest, model: Any) -> bool:
    """Whether each weight plainly has its place in `model`; where that is not plain, transformers may still know one."""
    wanted = {name: getattr(t, "shape", None) for name, t in model.state_dict().items()}
    found = {name: wanted.get(name) for name in getattr(model, "all_tied_weights_keys", None) or ()}
    found |= {name: w.shape for name, w in m.tensors.items()}
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)")
    return wanted == {name: shape for name, shape in found.items() if name in wanted or not ignored.search(name)}


def build_model(repo: Repo, device: Any, dtype: Any, options: Extra) -> Any:
    """The model that config.json and the manifest's loader_kind name, with the repository's weights [TQ-MAN-5]."""
    refused = ", ".join(sorted(REFUSED & options.keys()))
    require(not refused, "SCHEMA.UNKNOWN_FIELD", refused, "options that keep the weights (for the Hub, set HF_TOKEN)")
    device_map, trust = options.pop("device_map", None), {"trust_remote_code": options.pop("trust_remote_code", False)}
    require(None in (device, device_map), "SCHEMA.AMBIGUOUS", "device", "device or device_map, not both")
    device_map = {"": find_device("cpu" if device is None else device)} if device_map is None else device_map
    repo.check_roles("support", *["code"] * bool(trust["trust_remote_code"]))
    transformers, m = import_transformers(), repo.manifest
    with translated(" with ".join(["config.json", *options])):  # an option may be a key of the configuration
        options = {**options, "local_files_only": True, "return_unused_kwargs": True, **trust}
        config, options = transformers.AutoConfig.from_pretrained(repo.path, **options)
        config.__dict__.pop("quantization_config", None)  # for transformers, which is given decoded weights
        with torch.device("meta"):
            model = getattr(transformers, LOADER_KINDS[m.loader_kind]).from_config(config, **trust)
        model_class, sure = type(model), fits_model(m, model)
    if dtype in (None, "auto"):
        sizes = [(math.prod(w.shape), w.dtype) for w in m.tensors.values() if w.dtype in FLOATS] or [(0, "F32")]
        dtype = config.dtype or getattr(config.get_text_config(), "dtype", None) or torch_dtype(max(sizes)[1])

    def place(device_map: Any, names: list[str]) -> Any:
        fixed = {"config": config, "state_dict": {name: LazyWeight(repo, name) for name in names}}
        fixed |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        with translated(" with ".join([model_class.__name__, *options])):
            return model_class.from_pretrained(None, dtype=dtype, device_map=device_map, **fixed, **options)

    logging, names = transformers.utils.logging, repo.names()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:  # unless names and shapes are the model's, first on the meta device, which allocates nothing [TQ-SEC-4]
        for places in ({"": "meta"}, device_map)[sure:]:
            model, info = place(places, names)
            if needed := [alias for alias in m.tied_weights if alias in info["missing_keys"]]:  # [TQ-TIE-2]
                names += needed
                model, info = place(places, names)
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
                found = ", ".join(sorted(map(str, info[key])))
                require(not found, "BIND.MODEL", model_class.__name__, f"no {key.replace('_', ' ')}", found)
    finally:
        logging.set_verbosity(verbosity)
    offloaded = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    require(offloaded or not left, "BIND.MODEL", model_class.__name__, "every weight to be loaded", left)
    if "generation_config.json" in m.files and "generation_config" not in options:
        model.generation_config = transformers.GenerationConfig.from_pretrained(repo.path, local_files_only=True)
    model.name_or_path = model.config.name_or_path = str(repo.path)  # the base model's name, for PEFT
    return model.eval()
