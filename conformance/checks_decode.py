"""Level L3, decode: every weight is finite, and the embedded loader is a known one or decodes as the oracle does."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conformance import isolate, oracle
from conformance.check import check
from conformance.checks_data import PACKED, WORDS, floats, not_finite, read_floats
from conformance.checks_structure import NAMED
from conformance.container import DTYPES
from conformance.findings import Finding, NotReachedError, brief, join
from conformance.jsonio import read_object
from conformance.subject import Stage, Subject

LOADER = "load_quantized.py"
STAMP = b"# tqformat-stamp: "
MAX_LOADER = 2**24
GROUP = 2**18  # elements that are decoded at a time, in each of THREADS
THREADS = min(os.cpu_count() or 1, 8)

DECODABLE = (*PACKED, "pack.", "data.")
LARGEST = {"F16": 65504.0, "BF16": (2 - 2.0**-7) * 2.0**127, "F32": (2 - 2.0**-23) * 2.0**127}

# 9 Arithmetic: no decoded element overflows


@check(
    "decode.finite",
    "L3",
    "DATA.NON_FINITE",
    "TQ-NUM-6",
    "Scale the weight down, or give it a wider dtype.",
    needs=DECODABLE,
)
def decode_finite(repo: Subject) -> Iterator[Finding]:
    levels = {id: _largest_level(repo, id) for id in repo.manifest["codebooks"]}
    growth = {id: _growth(repo, id) for id in repo.manifest["transforms"]}
    stages: dict[str, list[Stage]] = {}
    for stage in repo.stages:
        stages.setdefault(stage.weight, []).append(stage)
    with repo.progress("weights", len(repo.quantized), "weight") as bar:
        for name, entry in repo.quantized.items():
            # most weights are far from the limits, and a bound shows it without decoding
            bound = sum(_bound(repo, stage, levels[stage.codebook], growth[stage.transform]) for stage in stages[name])
            column = _largest(repo, entry["column_scale"]) if entry.get("column_scale") is not None else 1.0
            if bound * 1.001 > LARGEST["F32"] or bound * column * 1.001 > LARGEST[entry["dtype"]]:
                message = _overflow(repo, stages[name])
                if message:
                    yield Finding(message, join("tensors", name))
            bar.update()


def _overflow(repo: Subject, stages: list[Stage]) -> str | None:
    """Where a weight overflows its dtype, or binary32 on the way there."""
    cols = stages[0].cols
    for first, count in _groups(stages):
        manifest, payload = _cut(repo, stages, first, count)
        entry = manifest["tensors"][stages[0].weight]
        total = np.zeros((count, cols))
        for stage in entry["stages"]:
            for key in ("scales", "offsets"):
                if stage.get(key) is not None and (
                    where := _beyond(oracle.vector_values(stage, key, payload), "F32", first)
                ):
                    return f"one of the {key}, times its outer one, at {where}"
            for part in oracle.decode_stage(stage, manifest, payload, (count, cols)):
                total[part.rows] += part.exact
                steps = (part.product, part.product + part.offset, part.exact, total[part.rows])
                for what, values in zip(
                    ("scale * level", "its sum with the offset", "T^-1", "a sum of stages"), steps, strict=True
                ):
                    if where := _beyond(values, "F32", first + part.rows.start):
                        return f"{what} at {where}"
        decoded = oracle.decode_weight(manifest, payload, stages[0].weight)
        if where := _beyond(decoded.exact.reshape(count, cols), decoded.dtype, first):
            return f"the element at {where}"
    return None


def _beyond(values: NDArray[np.float64], dtype: str, first: int) -> str | None:
    """The place of the first value that rounds to infinity, in rows that begin at `first`."""
    bad = np.argwhere(~np.isfinite(oracle.round_to(values, dtype)))
    if not len(bad):
        return None
    row, column = (int(i) for i in bad[0])
    return f"row {first + row}, column {column} is {abs(values[row, column]):.6g} in magnitude, beyond {dtype}"


def _bound(repo: Subject, stage: Stage, level: float, growth: float) -> float:
    """A bound on the magnitudes of a stage's scales, products, offsets and decoded values."""
    scale, offset = (_largest_factor(repo, stage, key) for key in ("scales", "offsets"))
    return max(scale, (scale * level + offset) * growth)


def _largest_factor(repo: Subject, stage: Stage, key: str) -> float:
    """A bound on the magnitudes of a stage's scales or offsets, outer ones included."""
    largest = [
        _largest(repo, name) * (1.0 if outer is None else _largest(repo, outer))
        for found, name, outer in stage.factors
        if found == key
    ]
    return sum(largest)


def _largest(repo: Subject, name: str) -> float:
    """The largest magnitude in a payload tensor of floats."""
    stored = repo.payload[name]
    chunks = repo.chunks(stored, DTYPES[stored.dtype])
    return max((float(np.abs(floats(data, stored.dtype)).max(initial=0)) for _, data in chunks), default=0.0)


def _largest_level(repo: Subject, id: str) -> float:
    book = repo.manifest["codebooks"][id]
    if book.get("tensor") is not None:
        return _largest(repo, book["tensor"])
    return max(abs(float(value)) for value in book["values"])


def _growth(repo: Subject, id: str) -> float:
    """How much the largest magnitude of a block can grow under T^-1."""
    transform = repo.manifest["transforms"][id]
    if transform["kind"] in ("identity", "permutation"):
        return 1.0
    if transform["kind"] == "dense":  # Qᵗ y: the largest column sum of magnitudes
        q = read_floats(repo, repo.payload[transform["matrix"]])
        return float(np.abs(q).sum(axis=0).max())
    return math.sqrt(transform["size"])  # orthogonal: no element exceeds the block's norm


def _groups(stages: list[Stage]) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of groups of whole tile rows of a weight."""
    step = math.lcm(*(stage.tile[0] for stage in stages))
    step *= max(1, GROUP // (step * stages[0].cols))
    for first in range(0, stages[0].rows, step):
        yield first, min(step, stages[0].rows - first)


def _decoded(repo: Subject, stages: list[Stage]) -> Iterator[tuple[int, oracle.Decoded]]:
    """A weight as the oracle decodes it, some rows [rows, cols] at a time, each with its first row; in threads."""

    def decode(first: int, count: int) -> oracle.Decoded:
        return oracle.decode_weight(*_cut(repo, stages, first, count), stages[0].weight)

    with ThreadPoolExecutor(THREADS) as pool:
        coming: deque[tuple[int, Future[oracle.Decoded]]] = deque()
        for first, count in _groups(stages):
            coming.append((first, pool.submit(decode, first, count)))
            if len(coming) > THREADS:
                ready, decoded = coming.popleft()
                yield ready, decoded.result()
        for ready, decoded in coming:
            yield ready, decoded.result()


def _cut(repo: Subject, stages: list[Stage], first: int, count: int) -> tuple[dict[str, Any], oracle.Payload]:
    """`count` rows of a weight from `first` on as a weight of its own, whose payload is cut out of the whole."""
    payload: oracle.Payload = {}

    def cut(name: str, per_row: float, whole: bool = False) -> None:
        """Takes a tensor whose outermost dimension has `per_row` items for each row of the weight."""
        stored = repo.payload[name]
        if whole:
            payload[name] = stored.dtype, stored.shape, repo.bytes_of(stored)
            return
        item = math.prod(stored.shape[1:]) * DTYPES[stored.dtype]
        start, items = round(first * per_row), round(count * per_row)
        data = repo.folder.read(stored.file, stored.offset + start * item, items * item)
        payload[name] = stored.dtype, (items, *stored.shape[1:]), data

    name = stages[0].weight
    entry: dict[str, Any] = {**repo.manifest["tensors"][name], "shape": [count, stages[0].cols]}
    books, transforms = repo.manifest["codebooks"], repo.manifest["transforms"]
    for stage in stages:
        cut(stage.codes, stage.cols // stage.tile[1] / stage.tile[0])
        for _, values, outer in stage.factors:
            cut(values, 1)
            if outer is not None:
                cut(outer, 1, whole=repo.payload[outer].shape[0] != stage.rows)
        if books[stage.codebook].get("tensor") is not None:
            cut(books[stage.codebook]["tensor"], 1, whole=books[stage.codebook].get("rows") is None)
        for key in ("matrix", "pairs", "angles", "index"):
            if key in transforms[stage.transform]:
                cut(transforms[stage.transform][key], 1, whole=True)
    if entry.get("column_scale") is not None:
        cut(entry["column_scale"], 1, whole=True)
    return {"tensors": {name: entry}, "codebooks": books, "transforms": transforms}, payload


# The embedded loader [TQ-REPO-6, TQ-REPO-7]


def _loader(repo: Subject) -> tuple[bytes, dict[str, Any] | None] | None:
    """The loader's body and its stamp, None without one; None where the repository embeds none."""
    if repo.file_kinds.get(LOADER) != "file":
        return None
    size = repo.folder.size(LOADER)
    if size > MAX_LOADER:
        raise NotReachedError(f"the embedded loader has {size} bytes, more than this judge reads")
    data = repo.folder.read(LOADER, 0, size)
    start = data.removesuffix(b"\n").rfind(b"\n") + 1
    if not data.startswith(STAMP, start):
        return data, None
    stamp = read_object(data[start + len(STAMP) :])
    return data[:start], {} if stamp.findings else stamp.value


@check(
    "decode.loader_stamp",
    "L3",
    "BIND.LOADER",
    "TQ-REPO-7",
    "Embed the loader again: it was changed after its release.",
    needs=NAMED,
)
def decode_loader_stamp(repo: Subject) -> Iterator[Finding]:
    if (loader := _loader(repo)) is None:
        return
    body, stamp = loader
    digest = hashlib.sha256(body).hexdigest()
    keys = {"format", "version", "body_sha256"}
    if stamp is not None and (stamp.keys() != keys or not all(isinstance(value, str) for value in stamp.values())):
        yield Finding(
            "expected a stamp with exactly the strings format, version and body_sha256", file=LOADER, offset=len(body)
        )
    elif stamp is not None and stamp["body_sha256"] != digest:
        message = f"the stamp says {brief(stamp.get('body_sha256'), 80)}, the loader's body has the digest {digest}"
        yield Finding(message, file=LOADER, offset=len(body))


@check(
    "decode.loader_release", "L3", "BIND.LOADER", "TQ-REPO-7", "Embed the released loader of that version.", needs=NAMED
)
def decode_loader_release(repo: Subject) -> Iterator[Finding]:
    if (loader := _loader(repo)) is None:
        return
    body, stamp = loader
    digests = repo.options.known_loaders.get(str((stamp or {}).get("version")))
    if digests is not None and hashlib.sha256(body).hexdigest() not in digests:
        yield Finding(
            f"the loader says it is version {brief((stamp or {})['version'])}, and is not",
            file=LOADER,
            offset=len(body),
        )
    elif digests is None and not repo.options.run_loader:
        raise NotReachedError(
            f"{LOADER} is no known release, and nobody knows what it does; embed one (python -m tqformat embed REPO), "
            "or have this one run in isolation (--run-loader), or ask for less (--level L2)"
        )


@check(
    "decode.loader_run",
    "L3",
    "DATA.DECODE",
    "TQ-NUM-5",
    "Embed a loader that decodes this repository.",
    needs=(*NAMED, *DECODABLE, "bind.", "decode.finite"),
)
def decode_loader_run(repo: Subject) -> Iterator[Finding]:
    if not repo.options.run_loader:
        return
    if _loader(repo) is None:
        raise NotReachedError(f"the repository embeds no {LOADER}; leave out --run-loader")
    program = repo.folder.read(LOADER, 0, repo.folder.size(LOADER))
    options = repo.options
    stages: dict[str, list[Stage]] = {}
    for stage in repo.stages:
        stages.setdefault(stage.weight, []).append(stage)
    left = dict(repo.manifest["tensors"])
    total = sum(math.prod(entry["shape"]) * DTYPES[entry["dtype"]] for entry in left.values())
    loader = repo.loader
    assert loader
    try:
        with repo.progress("loader", total) as bar:
            loader.start(program)
            if "network" not in loader.event()["given_up"] and not options.allow_network:
                raise NotReachedError(
                    "the network cannot be shut off here; --allow-network-unisolated runs the loader all the same"
                )
            while (event := loader.event())["event"] == "tensor":
                entry = left.pop(str(event.get("name")), None)
                if entry is None:
                    yield Finding(
                        f"the loader names {brief(event.get('name'), 200)}, which is no weight, or names it twice",
                        file=LOADER,
                    )
                    return
                pointer, size = join("tensors", str(event["name"])), math.prod(entry["shape"]) * DTYPES[entry["dtype"]]
                if [event.get(key) for key in ("dtype", "shape", "size")] != [entry["dtype"], entry["shape"], size]:
                    found = f"{event.get('dtype')} {event.get('shape')}"
                    yield Finding(
                        f"expected {entry['dtype']} {entry['shape']} from the loader, found {brief(found)}", pointer
                    )
                    return
                difference = (_passed_through if entry["kind"] == "passthrough" else _compared)(
                    repo, loader, entry, stages.get(str(event["name"]))
                )
                if difference:
                    yield Finding(difference, pointer)
                bar.update(size)
            for name in left:
                yield Finding("the loader leaves this weight out", join("tensors", name))
    except isolate.LoaderError as error:
        yield Finding(str(error), file=LOADER, code=error.code)


def _passed_through(repo: Subject, loader: isolate.Loader, entry: dict[str, Any], _: list[Stage] | None) -> str | None:
    """How the loader's bytes of a passthrough weight differ from the stored ones [TQ-PASS-1]."""
    difference = None
    stored = repo.payload[entry["data"]]
    for offset, data in repo.chunks(stored, DTYPES[stored.dtype]):
        if loader.read(len(data)) != data:
            difference = (
                difference or f"the loader's bytes differ from those stored at byte {offset} of {stored.file} or after"
            )
    return difference


def _compared(repo: Subject, loader: isolate.Loader, entry: dict[str, Any], stages: list[Stage] | None) -> str | None:
    """How the loader's elements of a quantized weight differ from the oracle's by more than [TQ-NUM-5] allows."""
    assert stages
    count, difference = 0, ""
    for first, decoded in _decoded(repo, stages):
        data = loader.read(decoded.exact.size * DTYPES[decoded.dtype])
        doubtful = np.flatnonzero(~surely_correct(data, decoded))
        values = floats(data, decoded.dtype)[doubtful]
        exact, tolerance = decoded.exact.ravel()[doubtful], decoded.tolerance.ravel()[doubtful]
        right = oracle.is_correct(values, oracle.Decoded(decoded.dtype, exact.shape, exact, tolerance))
        wrong = np.flatnonzero(~right)
        if len(wrong) and not count:
            row, column = divmod(int(doubtful[wrong[0]]), decoded.exact.shape[1])
            x, e, value = exact[wrong[0]], tolerance[wrong[0]], values[wrong[0]]
            difference = f"row {first + row}, column {column}: expected {x:.9g} within {e:.3g}, rounded; the loader gives {value:.9g}"
        count += len(wrong)
    return f"{difference} ({count} such elements)" if count else None


def surely_correct(data: bytes, decoded: oracle.Decoded) -> NDArray[np.bool_]:
    """Which elements are exactly the nearest to the oracle's, which [TQ-NUM-5] always allows: a sieve, for speed.

    For BF16 the nearest is found by way of binary32. That moves x by 2^-24 |x| at most, unless binary32 is subnormal there,
    and so by less than the tolerance E, which is at least 2^-20 |x|.
    """
    exact = decoded.exact.ravel()
    words = np.frombuffer(data, WORDS[decoded.dtype])
    with np.errstate(over="ignore"):
        nearest = exact.astype("<f2" if decoded.dtype == "F16" else "<f4").view(
            f"<u{2 if decoded.dtype == 'F16' else 4}"
        )
    if decoded.dtype == "BF16":  # to the upper half, ties to even
        nearest = (nearest + np.uint32(0x7FFF) + ((nearest >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    normal = (np.abs(exact) >= 2.0**-126) | (exact == 0)
    sure: NDArray[np.bool_] = (words == nearest) & normal & ~not_finite(words, decoded.dtype)
    return sure


def known_loaders(text: str) -> dict[str, list[str]]:
    """The table known_loaders.json: version -> digests of the loader's body."""
    table: dict[str, list[str]] = json.loads(text)
    return table
