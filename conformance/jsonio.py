"""A strict reader of JSON by section 3 of SPEC.md: it finds every breach, where it is, and never crashes.

Python's `json` accepts duplicate keys, `NaN`, `1e999` and lone surrogates, and leaves the stack on deep nesting. So:

1. `_prescan` bounds the nesting and the number of values in the raw bytes, before anything is built from them.
2. `_fast` lets `json` build the value, with hooks that notice any breach.
3. `_locate` reads the text again, only if something was noticed, and says what and where.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from conformance.findings import Finding, brief, join

MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 64
MAX_VALUES = 2**23  # a limit of this judge: more values than this need more memory than it allows itself
MAX_FINDINGS = 1000

_CHUNK = 2**16
_OTHER = bytes(set(range(256)) - set(b'"[]{},'))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}
_WHITE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_CONSTANT = re.compile(r"NaN|-?Infinity")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Parsed:
    """The object that a text holds, or None where it cannot be read, and what is wrong with the text."""

    value: dict[str, Any] | None
    findings: list[Finding]


def read_object(data: bytes) -> Parsed:
    """The JSON object in `data` [TQ-JSON-1 to TQ-JSON-5]; the kinds of the findings are the `json.*` checks."""
    # [TQ-JSON-1] no byte order mark
    if data.startswith(b"\xef\xbb\xbf"):
        message = "the text begins with a byte order mark; write UTF-8 without one"
        return Parsed(None, [Finding(message, offset=0, kind="encoding")])
    refusal = _prescan(data)
    if refusal:
        return Parsed(None, [refusal])
    # [TQ-JSON-1] UTF-8; Python's decoder refuses overlong forms and encoded surrogates
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the bytes {data[error.start : error.end].hex(' ')} are not UTF-8 ({error.reason})"
        return Parsed(None, [Finding(message, offset=error.start, kind="encoding")])
    value = _fast(text)
    return Parsed(value, []) if value is not None else _locate(text)


def _prescan(data: bytes) -> Finding | None:
    """Refuses nesting deeper than MAX_DEPTH [TQ-JSON-5] and more than MAX_VALUES values; linear, small chunks."""
    depth = values = start = 0
    in_string = False
    while start < len(data):
        chunk = data[start : start + _CHUNK]
        if len(chunk) == _CHUNK and (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
            chunk = chunk[:-1]  # an escape is never cut in two
        # without its escapes a string ends at the next quotation mark; all that counts outside is in _STEP
        parts = chunk.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHER).split(b'"')
        outside = b"".join(parts[in_string::2])
        at_start, was_in_string = depth, in_string
        for byte in outside:
            depth += _STEP[byte]
            if depth > MAX_DEPTH:
                offset = _offset_of_depth(data, start, at_start, was_in_string)
                return Finding(f"nested deeper than {MAX_DEPTH} levels", offset=offset, kind="depth")
        values += len(outside) - outside.count(b"]") - outside.count(b"}")
        if values > MAX_VALUES:
            return Finding(f"more than {MAX_VALUES} values", offset=start, kind="values")
        in_string ^= len(parts) % 2 == 0
        start += len(chunk)
    return None


def _offset_of_depth(data: bytes, start: int, depth: int, in_string: bool) -> int:
    """Where, from `start` on, the nesting first exceeds MAX_DEPTH."""
    while depth <= MAX_DEPTH:
        byte = data[start]
        if in_string and byte == ord("\\"):
            start += 1
        elif byte == ord('"'):
            in_string = not in_string
        elif not in_string:
            depth += _STEP.get(byte, 0)
        start += 1
    return start - 1


class _BreachError(Exception):
    """Some rule is broken somewhere: `_locate` will say which, and where."""


def _fast(text: str) -> dict[str, Any] | None:
    """The object in `text`, or None if any rule of section 3 is or may be broken."""
    if _SURROGATE_ESCAPE.search(text):
        return None

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(items)
        if len(entry) != len(items):
            raise _BreachError
        return entry

    def integer(digits: str) -> int:
        if len(digits) > 17 or abs(value := int(digits)) > MAX_INTEGER:
            raise _BreachError
        return value

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise _BreachError
        return value

    def constant(name: str) -> float:
        raise _BreachError(name)

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=constant
        )
    except (_BreachError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class _SyntaxError(Exception):
    """The grammar of RFC 8259 is broken at a character."""

    def __init__(self, at: int, message: str) -> None:
        super().__init__(message)
        self.at = at


def _locate(text: str) -> Parsed:
    """Reads `text` slowly, with a finding for each breach; the value is as good as it can be made."""
    findings: list[Finding] = []
    path: list[str | int] = []
    mark = [0, 0]  # a character's index and its byte offset; findings come in the order of the text
    decoder = json.JSONDecoder()

    def find(kind: str, at: int, message: str) -> None:
        if len(findings) < MAX_FINDINGS:
            mark[:] = at, mark[1] + len(text[mark[0] : at].encode())
            findings.append(Finding(message, join(*path), offset=mark[1], kind=kind))

    def skip(at: int) -> int:
        match = _WHITE.match(text, at)
        assert match  # it matches the empty string
        return match.end()

    def string(at: int) -> tuple[str, int]:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _SyntaxError(error.pos, f"not a string of RFC 8259: {error.msg.lower()}") from None
        # [TQ-JSON-1] no surrogate code point after unescaping
        if _SURROGATE.search(value):
            find("surrogate", at, "the string holds a lone surrogate; write the character itself, or leave it out")
        return value, end

    def number(at: int) -> tuple[int | float, int]:
        if constant := _CONSTANT.match(text, at):
            find("constant", at, f"{constant[0]} is not JSON; write a finite number, or null where it is allowed")
            return float(constant[0]), constant.end()
        match = _NUMBER.match(text, at)
        if not match:
            raise _SyntaxError(at, "expected a value")
        # [TQ-JSON-4] an integer has neither fraction nor exponent, and a bounded magnitude
        if match[1] is None and match[2] is None:
            value = int(match[0]) if len(match[0]) < 400 else 10**400
            if abs(value) > MAX_INTEGER:
                find("integer", at, f"expected an integer of magnitude at most 2^53 - 1, found {brief(match[0])}")
            return value, match.end()
        if not math.isfinite(float(match[0])):
            find("number", at, f"expected a number that is finite as binary64, found {brief(match[0])}")
        return float(match[0]), match.end()

    def value_at(at: int) -> tuple[Any, int]:
        first = text[at : at + 1]
        if first == '"':
            return string(at)
        if first == "{":
            return object_at(at)
        if first == "[":
            return list_at(at)
        for word, value in (("true", True), ("false", False), ("null", None)):
            if text.startswith(word, at):
                return value, at + len(word)
        return number(at)

    def object_at(at: int) -> tuple[dict[str, Any], int]:
        entry: dict[str, Any] = {}
        at = skip(at + 1)
        while text[at : at + 1] != "}" or entry:
            if text[at : at + 1] != '"':
                raise _SyntaxError(at, "expected a key in quotation marks")
            key, end = string(at)
            path.append(key)
            # [TQ-JSON-3] compared after unescaping
            if key in entry:
                find("duplicate_key", at, f"the key {brief(key)} occurs twice in one object; keep one")
            end = skip(end)
            if text[end : end + 1] != ":":
                raise _SyntaxError(end, "expected a colon")
            entry[key], end = value_at(skip(end + 1))
            path.pop()
            at = skip(end)
            if text[at : at + 1] == "}":
                break
            if text[at : at + 1] != ",":
                raise _SyntaxError(at, "expected a comma or the end of the object")
            at = skip(at + 1)
        return entry, at + 1

    def list_at(at: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        at = skip(at + 1)
        while text[at : at + 1] != "]" or items:
            path.append(len(items))
            item, end = value_at(at)
            path.pop()
            items.append(item)
            at = skip(end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise _SyntaxError(at, "expected a comma or the end of the list")
            at = skip(at + 1)
        return items, at + 1

    # [TQ-JSON-2] one value, an object
    try:
        value, end = value_at(skip(0))
        if skip(end) != len(text):
            raise _SyntaxError(skip(end), "expected nothing after the value")
    except _SyntaxError as error:
        find("syntax", error.at, f"not JSON: {error}")
        return Parsed(None, findings)
    if not isinstance(value, dict):
        find("object", 0, "expected one object")
        return Parsed(None, findings)
    return Parsed(value, findings)
