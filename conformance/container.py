"""A strict reader of the header of a payload file, by section 5 of SPEC.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conformance.findings import Finding, brief, join
from conformance.jsonio import MAX_INTEGER, read_object

MAX_HEADER = 100_000_000

# [TQ-PAY-4]
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Stored:
    """One payload tensor: where its bytes lie and what they are."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """The tensors of a payload file, and what is wrong with its header."""

    tensors: dict[str, Stored]
    findings: list[Finding]


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """The header of the payload file `file` of `size` bytes; `read(offset, size)` gives its bytes.

    The kinds of the findings are the `container.*` checks.
    """

    def refuse(kind: str, message: str, offset: int) -> Header:
        return Header({}, [Finding(message, file=file, offset=offset, kind=kind)])

    # [TQ-PAY-1] checked against the file's real length before anything is allocated
    if size < 8:
        return refuse("header_length", f"expected 8 bytes of header length, found a file of {size} bytes", 0)
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        message = f"expected a header length from 2 to {min(MAX_HEADER, size - 8)}, found {length}"
        return refuse("header_length", message, 0)
    # [TQ-PAY-2] `{` first, U+0020 alone after the object
    text = read(8, length)
    if not text.startswith(b"{"):
        return refuse("header", f"expected the header to begin with '{{', found the byte 0x{text[0]:02x}", 8)
    if text.rstrip(b" ")[-1:] != b"}":
        return refuse("header", "expected '}' and then only spaces at the end of the header", 8 + length - 1)
    parsed = read_object(text)
    del text
    findings = [_in_header(finding, file) for finding in parsed.findings]
    tensors = {}
    for name, entry in (parsed.value or {}).items():
        breach = _metadata_breach(entry) if name == "__metadata__" else _entry_breach(name, entry, size - 8 - length)
        if breach:
            kind, message, place = breach
            findings.append(Finding(message, join(name, *place), file=file, offset=8, kind=kind))
        elif name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    if parsed.value is not None and not findings:
        findings.extend(_coverage(file, tensors, 8 + length, size))
    findings.extend(_misaligned(file, tensors))
    return Header(tensors, findings)


def _in_header(finding: Finding, file: str) -> Finding:
    """A breach of section 3 in the header of `file`; a key that occurs twice at the top is a storage name."""
    offset = 8 + (finding.offset or 0)
    pointer = finding.pointer or ""
    is_name = finding.kind == "duplicate_key" and pointer.count("/") == 1 and pointer != "/__metadata__"
    kind = "values" if finding.kind == "values" else "duplicate_name" if is_name else "header"
    message = finding.message if finding.kind != "depth" else "the header is " + finding.message
    return Finding(message, finding.pointer, file, offset, kind, rule=RULES.get(finding.kind))


RULES = {
    "duplicate_key": "TQ-JSON-3",
    "encoding": "TQ-JSON-1",
    "surrogate": "TQ-JSON-1",
    "integer": "TQ-JSON-4",
    "number": "TQ-JSON-4",
    "constant": "TQ-JSON-4",
    "depth": "TQ-JSON-5",
}

Breach = tuple[str, str, tuple[str | int, ...]]  # kind, message, place below the entry


def _metadata_breach(metadata: object) -> Breach | None:
    # [TQ-PAY-2]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return "metadata", f"expected an object whose values are strings, found {brief(metadata)}", ()
    return None


def _entry_breach(name: str, entry: Any, data: int) -> Breach | None:
    """What is wrong with one header entry, alone; `data` is the number of bytes after the header."""
    # [TQ-MAN-4]
    if not 1 <= len(name) <= 512 or any(c < " " or c == "\x7f" for c in name):
        return "name", "expected a storage name of 1 to 512 characters without control characters", ()
    segments = name.replace("\\", "/").split("/")
    if ".." in segments or not segments[0]:
        return "name", "expected a storage name that leads nowhere as a path: no root and no segment ..", ()
    # [TQ-PAY-3]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = f"the keys {sorted(entry)}" if isinstance(entry, dict) else brief(entry)
        return "entry", f"expected an object with exactly dtype, shape and data_offsets, found {brief(found, 120)}", ()
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > 8:
        return "entry", f"expected a list of at most 8 integers from 0, found {brief(shape)}", ("shape",)
    if not _counts(offsets) or len(offsets) != 2:
        return "entry", f"expected two integers from 0, found {brief(offsets)}", ("data_offsets",)
    if not isinstance(dtype, str):
        return "entry", f"expected a dtype, found {brief(dtype)}", ("dtype",)
    # [TQ-PAY-4] Python's integers do not overflow
    if dtype not in DTYPES:
        return "dtype", f"expected one of {', '.join(DTYPES)}, found {brief(dtype)}", ("dtype",)
    if math.prod(length or 1 for length in shape) * DTYPES[dtype] > MAX_INTEGER:
        return "shape", f"expected at most 2^53 - 1 bytes, found shape {shape} of {dtype}", ("shape",)
    size = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != size:
        message = f"expected a range of {size} bytes for shape {shape} of {dtype}, found {offsets}"
        return "shape", message, ("data_offsets",)
    # [TQ-PAY-5]
    if offsets[1] > data:
        return (
            "offsets",
            f"expected a range within the {data} bytes after the header, found {offsets}",
            ("data_offsets",),
        )
    return None


def _counts(value: object) -> bool:
    """Whether `value` is a list of integers from 0; true and 2.0 are none [TQ-JSON-4]."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _coverage(file: str, tensors: dict[str, Stored], start: int, end: int) -> Iterator[Finding]:
    """[TQ-PAY-5] Whether the ranges cover the bytes from `start` to `end` exactly."""
    ranges = sorted((t.offset, t.offset + t.size, name) for name, t in tensors.items() if t.size)
    points = {start, end}
    covered = start
    for first, last, name in ranges:
        points |= {first, last}
        if first > covered:
            yield _gap(file, covered, first)
        elif first < covered:
            message = f"expected the range of {brief(name)} to begin at byte {covered} of the file, found an overlap at {first}"
            yield Finding(message, join(name, "data_offsets"), file, first, "offsets")
        covered = max(covered, last)
    if covered < end:
        yield _gap(file, covered, end)
    for name, tensor in tensors.items():
        if not tensor.size and tensor.offset not in points:
            message = f"expected the empty tensor {brief(name)} where a range begins or ends"
            yield Finding(message, join(name, "data_offsets"), file, tensor.offset, "offsets")


def _misaligned(file: str, tensors: dict[str, Stored]) -> Iterator[Finding]:
    """[TQ-PAY-8] The tensors with elements that begin at no multiple of their element size."""
    for name, tensor in tensors.items():
        if tensor.size and tensor.offset % DTYPES[tensor.dtype]:
            message = f"expected {brief(name)} at a multiple of {DTYPES[tensor.dtype]} bytes, found it at byte {tensor.offset}"
            yield Finding(message, join(name, "data_offsets"), file, tensor.offset, "alignment")


def _gap(file: str, first: int, last: int) -> Finding:
    return Finding(f"the bytes {first} to {last - 1} of the file belong to no tensor", None, file, first, "offsets")
