"""What both fuzz targets share: the form of an input, the properties that are put to it, and the mutations.

An input is a small archive, so that a mutator can change one file of a repository and leave the others alone:

    flags (1 byte), then sections of: file (1 byte, an index into FILES modulo its length), length (4 bytes, little-endian,
    cut to what is left), content.

The flags REPAIR_* let a mutation get past what would stop nearly every one of them: digests, sizes, header lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(__file__).resolve().parent / "corpus"
sys.path.insert(0, str(ROOT))

MANIFEST, PAYLOAD = "quant_manifest.json", "turboquant_weights.safetensors"
FILES = (
    MANIFEST,
    PAYLOAD,
    "turboquant_weights-00001-of-00002.safetensors",
    "turboquant_weights-00002-of-00002.safetensors",
    "config.json",
    "load_quantized.py",
    "README.md",
    ".hidden",
    "LICENSE",
    "example.py",
)
REPAIR_FILES, REPAIR_LENGTH, VERIFY = 1, 2, 4  # of the flags; the other bits are free
DEFAULT = REPAIR_FILES | REPAIR_LENGTH | VERIFY

SECONDS = 5.0  # of processor time for one input
ADDRESS_SPACE = 2**30  # bytes that one input may add to the process
RESIDENT = 2**28  # bytes that one input may add to the peak of resident memory
DECODED = 2**20  # scalars of a weight that are decoded; greater weights are opened and not decoded
ORACLE_FACTOR = 128  # the oracle builds Paley factors by definition, which takes long beyond this order

Sections = list[tuple[str, bytes]]
Json = dict[str, Any]


class PropertyError(Exception):
    """A property of the programs under test does not hold."""


# The form of an input


def unpack(data: bytes) -> tuple[int, Sections]:
    """The flags and the files of an input; any bytes are an input."""
    sections: Sections = []
    at = 1
    while at + 5 <= len(data) and len(sections) < len(FILES):
        size = int.from_bytes(data[at + 1 : at + 5], "little")
        sections.append((FILES[data[at] % len(FILES)], data[at + 5 : at + 5 + size]))
        at += 5 + size
    return (data[0] if data else DEFAULT), sections


def pack(flags: int, sections: Sections) -> bytes:
    """Inverse of `unpack`."""
    parts = (bytes([FILES.index(name)]) + len(raw).to_bytes(4, "little") + raw for name, raw in sections)
    return bytes([flags]) + b"".join(parts)


def from_directory(path: Path) -> bytes | None:
    """The input that stands for the repository at `path`; None if it has other files than FILES."""
    names = sorted((entry.name for entry in path.iterdir()), key=lambda n: FILES.index(n) if n in FILES else -1)
    if not set(names) <= set(FILES):
        return None
    return pack(DEFAULT, [(name, (path / name).read_bytes()) for name in names])


def header_end(raw: bytes) -> int | None:
    """Where the JSON value that begins at byte 8 ends, spaces after it included; where the file says so, if that can be."""
    try:
        _, end = json.JSONDecoder().raw_decode(raw[8:].decode("latin-1"))
    except (ValueError, RecursionError):
        return None
    stated = int.from_bytes(raw[:8], "little")
    if end <= stated <= len(raw) - 8 and not raw[8 + end : 8 + stated].strip(b" "):
        return 8 + stated  # the data may begin with a space
    while raw[8 + end : 9 + end] == b" ":
        end += 1
    return 8 + end


def repaired(flags: int, sections: Sections) -> dict[str, bytes]:
    """The content of the files, with header lengths, sizes and digests made right where the flags say so."""
    files = dict(sections)
    if flags & REPAIR_LENGTH:
        for name, raw in files.items():
            if name.endswith(".safetensors") and (end := header_end(raw)):
                files[name] = (end - 8).to_bytes(8, "little") + raw[8:]
    if flags & REPAIR_FILES:
        # in the text, so that all else in it stays as odd as it is
        text = files.get(MANIFEST, b"")
        for name, raw in files.items():
            begin = text.find(b'"' + name.encode() + b'"')
            if name == MANIFEST or begin < 0:
                continue
            entry = text[begin : begin + 400]
            entry = re.sub(rb'("size"\s*:\s*)\d+', rb"\g<1>%d" % len(raw), entry, count=1)
            digest = hashlib.sha256(raw).hexdigest().encode()
            entry = re.sub(rb'("sha256"\s*:\s*)"[0-9a-f]{64}"', rb'\g<1>"' + digest + b'"', entry, count=1)
            text = text[:begin] + entry + text[begin + 400 :]
        if MANIFEST in files:
            files[MANIFEST] = text
    return files


# The properties


def spec_codes() -> set[str]:
    """The codes of SPEC.md section 17."""
    text = (ROOT / "SPEC.md").read_text(encoding="utf-8")
    rows = [line for line in text[text.index("## 17 ") : text.index("## 18 ")].splitlines() if line.startswith("| `")]
    return {code for row in rows for code in re.findall(r"`([A-Z]+\.[A-Z_]+)`", row)}


CODES = spec_codes()
# no input as small as these takes more memory or time than a judge has
NOT_HERE = {"INTERNAL.ERROR", "LIMIT.MEMORY", "LIMIT.TIME", "UNSUPPORTED.LIBRARY", "UNSUPPORTED.DEVICE"}


@contextlib.contextmanager
def limits(what: str) -> Iterator[None]:
    """Holds what is run inside to SECONDS, ADDRESS_SPACE and RESIDENT, and to the descriptors it found."""
    if not Path("/proc/self/statm").exists():  # Linux alone tells what we ask
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    open_before, peak = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, hard))
    start = time.process_time()
    try:
        yield
    finally:
        seconds = time.process_time() - start
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if seconds > SECONDS:
        raise PropertyError(f"{what}: {seconds:.1f} s of processor time")
    if grown > RESIDENT:
        raise PropertyError(f"{what}: peak of resident memory grew by {grown / 2**20:.0f} MiB")
    if len(os.listdir("/proc/self/fd")) > open_before:
        raise PropertyError(f"{what}: leaves a file open")


def run_loader(path: Path, verify: bool) -> tuple[Any, dict[str, Any]]:
    """The loader's TQFormatError, or None and its weights (those of at most DECODED scalars)."""
    from tqformat.load_quantized import TQFormatError, open_repo

    weights: dict[str, Any] = {}
    with limits("loader"):
        try:
            with open_repo(path, verify=verify) as repo:
                for name in [*repo.names(), *repo.manifest.tied_weights]:
                    source = repo.manifest.tied_weights.get(name, name)
                    if math.prod(repo.manifest.tensors[source].shape) <= DECODED:
                        weights[name] = repo.dequantize(name)
        except TQFormatError as error:
            if error.code not in CODES - NOT_HERE or not error.message:
                raise PropertyError(f"loader: {error.code!r} at {error.where!r}: {error.message!r}") from error
            return error, {}
    return None, weights


def run_validator(folder: Any, reports: bool) -> tuple[Any, Any]:
    """The validator's judgement of an open folder at L2, and its subject."""
    from conformance import __main__ as command  # importing it lists the checks
    from conformance import report
    from conformance.subject import Subject

    with limits("validator"):
        subject = Subject(folder)
        judgement = command.judge(subject, "L2")
        if reports:
            code = command.exit_code(judgement)
            json.dumps(report.as_json(judgement, subject, "1.0", code), allow_nan=False).encode()
            ElementTree.fromstring(report.as_junit(judgement, subject).encode())
            report.text(judgement, "1.0").encode("ascii")
    for violation in judgement.violations:
        if violation.code not in CODES - NOT_HERE or not violation.message or not violation.rule.startswith("TQ-"):
            raise PropertyError(f"validator: {violation}")
    if not judgement.violations and judgement.passed != "L2":
        raise PropertyError(f"validator: neither a violation nor a pass: {judgement.unreached}")
    return judgement, subject


# what a reader MAY leave to validators [TQ-ERR-3]
LENIENT_CODES = {"PATH.COLLISION", "SCHEMA.FEATURES", "BIND.ACCOUNTING"}
LENIENT_CODES |= {"DATA.ORTHOGONALITY", "DATA.SIGNS", "DATA.CODEBOOK", "JSON.DEPTH"}  # JSON.DEPTH by [TQ-JSON-5]
PROVENANCE = re.compile(
    r"/(generator|base_model|quantization|accounting|pipeline_tag)(/.*)?|(/.*)?/(origin|extra)(/.*)?"
    r"|/files/[^/]*/(chunks|chunk_size)(/.*)?",
    re.DOTALL,
)


def is_lenient(violation: Any, manifest: Any, verify: bool) -> bool:
    """Whether a reader may accept a repository with this violation."""
    pointer = violation.pointer or ""
    if violation.code in LENIENT_CODES or PROVENANCE.fullmatch(pointer) or pointer.endswith("/effective_bits"):
        return True
    if violation.check in ("schema.unused", "container.name", "schema.loader_role", "schema.origin", "schema.byte_sum"):
        return True
    if violation.rule == "TQ-MAN-4" and violation.code == "SCHEMA.VALUE":  # the characters of names
        return True
    needed = violation.file == MANIFEST or violation.file.endswith(".safetensors")
    if not needed and violation.code in ("BIND.MISSING_FILE", "BIND.SIZE", "BIND.DIGEST", "PATH.TYPE"):
        return True
    # the loader checks chunks in place of the whole file
    chunked = violation.check in ("bind.digest", "bind.chunks") and manifest["files"][violation.file].get("chunks")
    if violation.code == "BIND.DIGEST" and (chunked or not verify):
        return True
    value = manifest
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            return False
    return value is None  # a stray key


def compare(path: Path, judgement: Any, subject: Any, error: Any, weights: dict[str, Any], verify: bool) -> None:
    """Validator and loader agree about the repository, and loader and oracle about its weights."""
    from conformance.check import CHECKS

    if judgement.violations:
        readable = not any(v.check.startswith("manifest.") for v in judgement.violations)
        manifest = subject.parsed.value if readable else None
        strict = [v for v in judgement.violations if not is_lenient(v, manifest, verify)]
        if error is None and strict:
            raise PropertyError(f"the loader accepts what the validator rejects: {strict[0]}")
        if error is not None and len(judgement.violations) == 1 and strict:
            # the loader names it, or what it keeps the validator from judging
            named = {strict[0].code, *(CHECKS[id].code for id in judgement.unreached)}
            named |= {
                "LIMIT.SIZE": {"SCHEMA.VALUE"},  # [TQ-LIM-1] allows both
                "CONTAINER.HEADER": {"CONTAINER.DUPLICATE_NAME"},  # of a key that occurs twice below a storage name
                "SCHEMA.AMBIGUOUS": {"SCHEMA.TYPE", "SCHEMA.VALUE"},  # of what a stray key holds
            }.get(strict[0].code, set())
            # a weight of more than 2^53 - 1 bytes the loader refuses before the payload, whose shape the rule is about
            claim = error.code == "SCHEMA.VALUE" and error.where.endswith(".shape")
            if error.code not in named and not claim:
                raise PropertyError(f"the loader says {error}, the validator {strict[0]}")
        return
    tensors, transforms = subject.manifest["tensors"], subject.manifest["transforms"]
    if error is not None:
        if error.code == "DATA.NON_FINITE" and "decoded values" in error.where and may_overflow(subject):
            return  # the business of L3 [TQ-NUM-6]
        raise PropertyError(f"the loader rejects what the validator passes: {error}") from error
    if any(factor > ORACLE_FACTOR for t in transforms.values() for factor in t.get("factors", ())):
        return
    from conformance import oracle

    repo = oracle.read_repo(path)
    for name, weight in weights.items():
        source = subject.manifest.get("tied_weights", {}).get(name, name)
        decoded = oracle.decode_weight(*repo, source)
        if list(weight.shape) != tensors[source]["shape"]:
            raise PropertyError(f"{name!r} has the shape {list(weight.shape)}")
        if decoded.data is not None:
            stored = decoded.data
            if decoded.dtype == "BOOL":  # any byte other than 0 means true [TQ-PASS-1]
                stored = bytes(map(bool, stored))
            if as_bytes(weight) != stored:
                raise PropertyError(f"{name!r} is not what is stored")
            continue
        correct = oracle.is_correct(weight.double().numpy(), decoded)
        if not correct.all() and not may_overflow(subject):
            raise PropertyError(f"{name!r} is outside the tolerance of [TQ-NUM-5]: {tensors[source]}")


def as_bytes(tensor: Any) -> bytes:
    import torch

    raw: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def may_overflow(subject: Any) -> bool:
    """Whether an element, or a step on the way to one, can be too great for its dtype, by a bound."""
    from conformance import checks_decode as d

    growth = {id: d._growth(subject, id) for id in subject.manifest["transforms"]}
    levels = {id: d._largest_level(subject, id) for id in subject.manifest["codebooks"]}
    for name, entry in subject.quantized.items():
        stages = [s for s in subject.stages if s.weight == name]
        bound = sum(d._bound(subject, s, levels[s.codebook], growth[s.transform]) for s in stages)
        last = d._largest(subject, entry["column_scale"]) if entry.get("column_scale") is not None else 1.0
        if max(bound * last / d.LARGEST[entry["dtype"]], bound / d.LARGEST["F32"]) > 0.999:
            return True
    return False


class Runner:
    """Puts inputs to the properties, in one directory that is used again and again."""

    def __init__(self, mode: str) -> None:
        import torch

        from conformance import shape

        self.mode = mode
        self.counts: dict[str, int] = {}  # verdict -> inputs
        self._stack = contextlib.ExitStack()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tqformat-fuzz-", dir=memory))
        self.path = Path(folder) / "repo"
        self.path.mkdir()
        self._stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        # the validator reads its schema anew for each manifest; here it does so once
        schema = shape.load_schema()
        validator = shape.validator(schema)
        self._stack.enter_context(mock.patch.object(shape, "load_schema", lambda: schema))
        self._stack.enter_context(mock.patch.object(shape, "validator", lambda _: validator))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, data: bytes) -> str:
        """The verdict on an input: the loader's code or `decoded`; raises whatever is wrong."""
        flags, sections = unpack(data)
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name, raw in repaired(flags, sections).items():
            (self.path / name).write_bytes(raw)
        # judging takes longer than loading: the loader's target spends its time behind the JSON
        everything = self.mode == "validator"
        verdict = check(self.path, bool(flags & VERIFY), everything, everything and sum(data) % 8 == 0)
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        return verdict


def check(path: Path, verify: bool = True, judge_all: bool = True, reports: bool = False) -> str:
    """Puts the repository at `path` to the properties; the loader's code or `decoded`."""
    from conformance.folder import Folder

    error, weights = run_loader(path, verify)
    if judge_all or error is None or not error.code.startswith(("JSON.", "SCHEMA.V")):
        folder = Folder(path)
        try:
            judgement, subject = run_validator(folder, reports)
            compare(path, judgement, subject, error, weights, verify)
        finally:
            folder.close()
    return "decoded" if error is None else str(error.code)


# The mutations

NUMBERS = [0, 1, -1, 2, 3, 4, 5, 7, 8, 11, 12, 15, 16, 17, 20, 24, 28, 32, 64, 65, 256, 2047, 2048, 4096, 4097]
NUMBERS += [2**16, 2**20, 2**20 + 1, 2**22, 2**31 - 1, 2**31, 2**32, 2**52, 2**53 - 1, 2**53, 2**62, 2**63, 2**64]
STRINGS = ["", "identity", "hadamard", "dense", "givens", "quantized", "passthrough", "payload", "support", "code"]
STRINGS += ["document", "F16", "BF16", "F32", "F64", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL"]
STRINGS += [
    "permutation",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "1.0",
    "1.1",
    "2.0",
    "0f",
    "ff",
    "00",
    "lloyd-max-sphere",
    "byte-sum",
    "__metadata__",
    "\x00",
]
STRINGS += ["é", "\U0001f600", "a" * 513, "\ud800", "../x", *FILES]
STRINGS += ["trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles"]
STRINGS += ["offsets", "outer_scales", "fine_scales"]
KEYS = ["extra", "window", "tile", "vector_length", "column_scale", "values", "tensor", "rows", "origin", "factors"]
KEYS += ["outer_scales", "offsets", "outer_offsets", "index", "chunk_size", "chunks"]
KEYS += ["signs", "seed", "matrix", "pairs", "angles", "data", "stages", "tied_weights", "pipeline_tag", "kind", "size"]
TOKENS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "2.0", "2e0", "01", "0x1", "9" * 20, "1."]
TOKENS += [
    "true",
    "false",
    "null",
    '"\\ud800"',
    '"\\ud83d\\ude00"',
    "[" * 70 + "]" * 70,
    '{"a":1,"a":2}',
    "-",
    "",
    "3.5e38",
]
MARK = "\x02token:"


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON document, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        item = todo.pop()
        keys = list(item) if isinstance(item, dict) else list(range(len(item))) if isinstance(item, list) else []
        found += [(item, key) for key in keys]
        todo += [item[key] for key in keys]
    return found


def edit(document: Any, rng: random.Random) -> None:
    """One change of a JSON document in place."""
    where = places(document)
    if not where:
        return
    container, key = rng.choice(where)
    value = container[key]
    action = rng.randrange(12)
    if action == 0:
        container[key] = rng.choice(NUMBERS)
    elif action == 1:
        container[key] = rng.choice(STRINGS)
    elif action == 2:
        container[key] = MARK + rng.choice(TOKENS)
    elif action == 3:
        other, name = rng.choice(where)
        container[key] = json.loads(json.dumps(other[name]))
    elif action == 4:
        del container[key]
    elif action == 5 and isinstance(container, dict):
        container[rng.choice(KEYS + STRINGS)] = rng.choice(
            [value, None, rng.choice(NUMBERS), rng.choice(STRINGS), {}, []]
        )
    elif action == 6 and isinstance(container, dict):
        container[rng.choice(KEYS + STRINGS)] = container.pop(key)
    elif action == 7 and isinstance(container, list):
        container.insert(key, value)
    elif action == 8 and isinstance(container, list):
        rng.shuffle(container)
    elif action == 9 and isinstance(value, dict | list):
        container[key] = rng.choice([None, {}, [], [value], value, rng.choice(NUMBERS)])
    elif isinstance(value, bool) or not isinstance(value, int | float):
        container[key] = rng.choice([None, True, False, 1.5, rng.choice(NUMBERS), rng.choice(STRINGS)])
    else:
        container[key] = rng.choice(
            [value + 1, value - 1, value * 2, value // 2, -value, value + 0.0, rng.choice(NUMBERS)]
        )


def dump(document: Any, rng: random.Random) -> bytes:
    """The text of an edited document, with its tokens in place."""
    separators = rng.choice([(",", ":"), (", ", ": ")])
    text = json.dumps(document, ensure_ascii=True, separators=separators)
    text = re.sub(r'"\\u0002token:((?:[^"\\]|\\.)*)"', lambda m: json.loads(f'"{m[1]}"'), text)
    return text.encode("utf-8", "surrogatepass")


def put_factor(repo: Any, stage: Json, key: str, shape: tuple[int, ...], rng: random.Random) -> None:
    """Random scales or offsets of a stage under the names that it gives them, with outer ones if it names some."""
    from conformance.vectors import builder

    outer = stage.get(f"outer_{key}")
    factor = builder.Factor(rng.choice(["F16", "BF16", "F32"]))
    if outer is not None:
        across = rng.choice([b for b in range(1, shape[1] + 1) if shape[1] % b == 0])
        dtype = rng.choice(["U8", "I8", "F8_E4M3", "F8_E8M0"])
        factor = builder.Factor(dtype, (rng.choice([1, shape[0]]), across), rng.choice(["F16", "BF16", "F32"]))
    made: Json = {}
    repo.factor(made, "\x01", key, factor, shape)
    for name in made:
        repo.payload[stage[name]] = repo.payload.pop(made[name])


def rebuild(manifest: Json, rng: random.Random) -> Sections:
    """The repository that a manifest asks for: payload of random data, accounting, features and files made right."""
    from conformance.vectors import builder

    repo = builder.Repo(str(rng.random()))
    repo.transforms, repo.codebooks = manifest["transforms"], manifest["codebooks"]
    repo.tied = manifest.get("tied_weights", {})
    repo.shards = rng.choice([1, 1, 1, 1, 2])
    room = [2**14]

    def fits(*shape: int) -> tuple[int, ...]:
        if any(type(size) is not int for size in shape):
            raise ValueError("no integer")
        room[0] -= math.prod(shape) + 1
        if room[0] < 0 or min(shape, default=0) < 0 or max(shape, default=0) > 2**20:
            raise ValueError("too much")
        return shape

    for entry in repo.codebooks.values():
        if entry.get("tensor") is not None:
            rows = () if entry.get("rows") is None else (entry["rows"],)
            shape = fits(*rows, entry["entries"], entry["dimension"])
            dtype = rng.choice(["F16", "BF16", "F32"])
            repo.put(entry["tensor"], dtype, repo.random.fixed(-256, 256, 256, shape))
        if entry["entries"] < 1:
            raise ValueError("out of range")
    for entry in repo.transforms.values():
        size = entry["size"]
        if not 1 <= size <= 2**12 or not 0 <= (entry.get("seed") or 0) < 2**53:
            raise ValueError("out of range")
        if entry["kind"] == "dense":
            fits(size, size)
            repo.put(entry["matrix"], "F32", builder.orthogonal(size, 2**16))
        elif entry["kind"] == "givens":
            rounds = rng.randint(1, 3)
            repo.givens(*fits(size, rounds), id="\x01")
            made = repo.transforms.pop("\x01")
            for key in ("pairs", "angles"):
                repo.payload[entry[key]] = repo.payload.pop(made[key])
        elif entry["kind"] == "permutation":
            repo.permutation(*fits(size), id="\x01")
            repo.payload[entry["index"]] = repo.payload.pop(repo.transforms.pop("\x01")["index"])
        elif entry["kind"] == "hadamard" and "signs" in entry:
            fits(size)
            entry["signs"] = builder.seed_signs(entry.get("seed") or 0, size)
    for name, entry in manifest["tensors"].items():
        if entry["kind"] == "passthrough":
            shape = fits(*entry["shape"])
            repo.passthrough(name, entry["dtype"], shape)
            repo.payload[entry["data"]] = repo.payload.pop(f"{name}.data")
        else:
            rows, cols = math.prod(entry["shape"][:-1]), entry["shape"][-1]
            for s in entry["stages"]:
                book = repo.codebooks[s["codebook"]]
                tr, tc = s.get("tile") or (1, cols)
                if not 1 <= s["bits"] <= (s.get("window") or s["bits"]) <= 16 or book["dimension"] > 64:
                    raise ValueError("out of range")
                stage = builder.Stage(s["bits"], window=None if s.get("window") == s["bits"] else s.get("window"))
                n = tr * tc // book["dimension"]
                fits(rows, cols)
                fits(n, s["bits"])
                repo.payload[s["codes"]] = repo.draw_codes(stage, rows * cols // (tr * tc), n, book["entries"])
                shape = fits(rows, cols // (s.get("vector_length") or cols))
                for key in ("scales", "offsets"):
                    if s.get(key) is not None:
                        put_factor(repo, s, key, shape, rng)
            if entry.get("column_scale") is not None:
                repo.put(
                    entry["column_scale"], rng.choice(["F16", "F32"]), repo.random.fixed(-128, 128, 64, fits(cols))
                )
            books = [repo.codebooks[s["codebook"]] for s in entry["stages"]]
            entry["effective_bits"] = sum(
                s["bits"] / b["dimension"] for s, b in zip(entry["stages"], books, strict=True)
            )
        repo.tensors[name] = entry
    made = repo.manifest()
    kept = {key: value for key, value in manifest.items() if key not in ("features", "files", "accounting")}
    text = json.dumps(made | kept).encode("utf-8", "surrogatepass")
    return [(MANIFEST, text), *repo.contents.items()]


def poked(raw: bytes, rng: random.Random) -> bytes:
    """A payload file with some bytes of its data changed, often to infinities, NaN and the like; its header stays."""
    start, out = header_end(raw) or 0, bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if start < len(out):
            new = rng.choice(
                [b"\xff", b"\x7f", b"\x80", b"\0", b"\x7c", b"\x80\x7f", b"\xff\xff\xff\xff", rng.randbytes(1)]
            )
            at = rng.randrange(start, len(out))
            out[at : at + len(new)] = new[: len(out) - at]
    return bytes(out)


def havoc(data: bytes, size: int, rng: random.Random) -> bytes:
    """Changes some bytes; what libFuzzer does better, where it is there."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(out) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 1 and at < len(out):
            out[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif action == 2:
            out[at:at] = rng.choice(
                [b"0", b'"', b"{", b"]", b"\x00", b"\xff", b" ", b"\\", out[at : at + rng.randrange(40)]]
            )
        else:
            del out[at : at + rng.choice([1, 2, 8, 100])]
    return bytes(out[:size])


def mutate(data: bytes, size: int, seed: int, raw: Callable[[bytes, int], bytes] | None = None) -> bytes:
    """Another input of at most `size` bytes; `raw` changes bytes (libFuzzer's own mutator, where there is one)."""
    rng = random.Random(seed)
    change = raw or (lambda content, most: havoc(content, most, rng))
    flags, sections = unpack(data)
    if not sections:
        return change(data, size)[:size]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        index = rng.randrange(len(sections)) if rng.random() < 0.5 else 0
        name, content = sections[index]
        action = rng.randrange(20)
        if action == 0:
            flags ^= 1 << rng.randrange(3)
        elif action == 1:
            sections.insert(rng.randrange(len(sections) + 1), (rng.choice(FILES), content))
        elif action == 2 and len(sections) > 1:
            del sections[index]
            if not sections:
                break
        elif action < 5:
            sections[index] = (name, change(content, len(content) + 256))
        elif action < 8 and len(sections) > 1:
            index = rng.randrange(1, len(sections))
            sections[index] = (sections[index][0], poked(sections[index][1], rng))
        else:
            sections = _edited(sections, index, rng)
    out = pack(flags, sections)
    return out if len(out) <= size else pack(flags, sections)[:size]


def _edited(sections: Sections, index: int, rng: random.Random) -> Sections:
    """The files with one of their JSON documents edited; after the manifest's, often the rest is made to fit."""
    name, content = sections[index]
    end = (header_end(content) or 8) if name.endswith(".safetensors") else len(content)
    start = 8 if name.endswith(".safetensors") else 0
    try:
        document = json.loads(content[start:end])
        for _ in range(rng.choice([1, 1, 2])):
            edit(document, rng)
        text = dump(document, rng)
        if name == MANIFEST and rng.random() < 0.4:
            return rebuild(json.loads(text), rng)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError, OverflowError, MemoryError):
        return sections
    except RecursionError:
        return sections
    sections = list(sections)
    sections[index] = (name, content[:start] + text + content[end:])
    return sections


# The two ways to run a target


def without_atheris(mode: str, runs: int, seed: int = 0) -> dict[str, int]:
    """`runs` inputs: the corpus, then mutations of it; the verdicts and how often each came."""
    corpus = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    rng = random.Random(seed)
    with Runner(mode) as runner:
        for number in range(runs):
            data = corpus[number] if number < len(corpus) else mutate(rng.choice(corpus), 2**14, rng.getrandbits(32))
            try:
                runner(data)
            except Exception as error:
                raise PropertyError(f"input {number} of seed {seed}: {data[:4000]!r}") from error
        return runner.counts


def main(mode: str, package: str, argv: list[str]) -> int:
    """Runs a target: with `--runs-without-atheris N` in plain Python, or under atheris with libFuzzer's options."""
    if len(argv) == 3 and argv[1] == "--runs-without-atheris":
        print(without_atheris(mode, int(argv[2])))
        return 0
    import atheris

    importlib.import_module("conformance.vectors.builder")  # not instrumented: it serves the mutator alone
    with atheris.instrument_imports(include=[package]):
        importlib.import_module("tqformat.load_quantized" if mode == "loader" else "conformance.__main__")
    runner = Runner(mode)
    for path in sorted(CORPUS.iterdir())[:20]:  # what is imported late is imported now
        runner(path.read_bytes())
    runner.counts.clear()
    start, executions = time.time(), itertools.count(1)

    def one(data: bytes) -> None:
        runner(data)
        if (number := next(executions)) % 20000 == 0:
            counts = dict(sorted(runner.counts.items(), key=lambda item: -item[1]))
            print(f"VERDICTS of {number} in {time.time() - start:.0f} s: {counts}", file=sys.stderr, flush=True)

    def custom(data: bytes, size: int, seed: int) -> bytes:
        return mutate(data, size, seed, atheris.Mutate)

    atheris.Setup(argv, one, custom_mutator=custom)
    atheris.Fuzz()
    return 0
