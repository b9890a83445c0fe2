"""The repository under judgement: what is read from it once, and shared by the checks.

Each property trusts only what the checks named in its docstring have found without fault.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import tqdm

from conformance import isolate, jsonio
from conformance.container import Header, Stored, read_header
from conformance.findings import MANIFEST, Finding, NotReachedError, join
from conformance.folder import CHUNK, Folder
from conformance.shape import shape_findings

MAX_MANIFEST = 64 * 2**20


@dataclass(frozen=True)
class Options:
    """What the user allows."""

    run_loader: bool = False
    allow_network: bool = False
    loader_memory: int = 8 * 2**30  # bytes of address space
    loader_seconds: int = 3600
    known_loaders: dict[str, list[str]] = field(default_factory=dict)  # version -> digests of the loader's body
    progress: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage of a quantized weight with its defaults filled in and its ids resolved; the names are those of SPEC.md."""

    weight: str
    index: int
    shape: tuple[int, ...]  # the weight's
    bits: int
    window: int
    vector_length: int
    tile: tuple[int, int]
    entries: int
    dimension: int
    codebook: str
    transform: str
    size: int  # of the transform
    codes: str
    scales: str
    outer_scales: str | None
    offsets: str | None
    outer_offsets: str | None

    @property
    def pointer(self) -> str:
        return join("tensors", self.weight, "stages", self.index)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    # [TQ-CODE-2, TQ-CODE-4]
    @property
    def symbols(self) -> int:
        """Symbols of a tile, n."""
        return self.tile[0] * self.tile[1] // self.dimension

    @property
    def tiles(self) -> int:
        return self.rows * self.cols // (self.tile[0] * self.tile[1])

    @property
    def tile_bytes(self) -> int:
        return -(-self.symbols * self.bits // 8)

    @property
    def factors(self) -> list[tuple[str, str, str | None]]:
        """The scales, and the offsets if any: (key, storage name, storage name of the outer ones) [TQ-NUM-8, TQ-NUM-9]."""
        offsets = [] if self.offsets is None else [("offsets", self.offsets, self.outer_offsets)]
        return [("scales", self.scales, self.outer_scales), *offsets]


@dataclass(frozen=True)
class Reference:
    """A storage name in the manifest, with the dtypes and the shape that it must have; None is any dimension."""

    name: str
    pointer: str
    rule: str
    role: str
    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...]


FLOATS = ("F16", "BF16", "F32")
BYTES = ("U8", "I8", "F8_E4M3", "F8_E8M0")  # of scales and offsets that outer ones multiply [TQ-NUM-1]


class Subject:
    """The repository in `folder`."""

    def __init__(self, folder: Folder, options: Options | None = None) -> None:
        self.folder = folder
        self.options = options or Options()
        self.loader: isolate.Loader | None = None

    @contextmanager
    def loader_waiting(self) -> Iterator[None]:
        """If the loader may be run, its process starts now, beside the checks that come first: importing torch takes long."""
        o = self.options
        if not o.run_loader:
            yield
            return
        limits = (o.loader_memory, o.loader_seconds, o.allow_network)
        with isolate.waiting(self.folder.path, *limits) as self.loader:
            yield

    @cached_property
    def parsed(self) -> jsonio.Parsed:
        """The manifest's JSON; needs `path.manifest` and `json.size`."""
        return jsonio.read_object(self.folder.read(MANIFEST, 0, self.folder.size(MANIFEST)))

    @property
    def manifest(self) -> dict[str, Any]:
        """Needs `json`; its content needs `schema.shape`."""
        assert self.parsed.value is not None
        return self.parsed.value

    @cached_property
    def shape(self) -> list[Finding]:
        """What the schema has against the manifest."""
        return shape_findings(self.manifest)

    @cached_property
    def file_names(self) -> list[str]:
        """The listed files; needs `path.name`."""
        return list(self.manifest["files"])

    @cached_property
    def file_kinds(self) -> dict[str, str]:
        """What each listed file is in the directory; needs `path.name`."""
        return {name: self.folder.kind(name) for name in self.file_names}

    @cached_property
    def payload_files(self) -> list[str]:
        """The listed payload files."""
        return [name for name, file in self.manifest["files"].items() if file["role"] == "payload"]

    @cached_property
    def digests(self) -> dict[str, tuple[str, list[str]]]:
        """Each listed file that is there -> its SHA-256, and those of its chunks [TQ-REPO-8]; needs `path`, `schema`."""
        sizes = {name: self.folder.size(name) for name, kind in self.file_kinds.items() if kind == "file"}
        with self.progress("digests", sum(sizes.values())) as bar:
            return {name: self._digests_of(name, size, bar) for name, size in sizes.items()}

    def _digests_of(self, name: str, size: int, bar: tqdm.tqdm[Any]) -> tuple[str, list[str]]:
        length = self.manifest["files"][name].get("chunk_size")
        whole, chunks = hashlib.sha256(), []
        chunk, left = hashlib.sha256(), length
        for data in self.folder.chunks(name, 0, size, CHUNK):
            whole.update(data)
            rest = memoryview(data if length else b"")
            while rest:
                chunk.update(rest[:left])
                rest, left = rest[left:], left - len(rest[:left])
                if not left:
                    chunks.append(chunk.hexdigest())
                    chunk, left = hashlib.sha256(), length
            bar.update(len(data))
        return whole.hexdigest(), chunks if left == length else [*chunks, chunk.hexdigest()]

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Payload file -> its header; needs `path` and `container.absent`."""
        headers = {}
        for name in self.payload_files:
            size = self.folder.size(name)
            # [TQ-REPO-4] the size comes before the content
            if size != self.manifest["files"][name]["size"]:
                raise NotReachedError(f"BIND.SIZE: {name} is not the file that the manifest describes")
            headers[name] = read_header(name, size, partial(self.folder.read, name))
        return headers

    @cached_property
    def payload(self) -> dict[str, Stored]:
        """Storage name -> where it is; needs `container`."""
        return {name: stored for header in self.headers.values() for name, stored in header.tensors.items()}

    @cached_property
    def quantized(self) -> dict[str, dict[str, Any]]:
        return {name: entry for name, entry in self.manifest["tensors"].items() if entry["kind"] == "quantized"}

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages whose ids exist, of the weights with columns; needs `schema.shape`."""
        return [stage for name, entry in self.quantized.items() for stage in self._stages_of(name, entry)]

    def _stages_of(self, name: str, entry: dict[str, Any]) -> Iterator[Stage]:
        codebooks, transforms = self.manifest["codebooks"], self.manifest["transforms"]
        shape = tuple(entry["shape"])
        for index, stage in enumerate(entry["stages"]):
            book, transform = codebooks.get(stage["codebook"]), transforms.get(stage["transform"])
            if book is None or transform is None or shape[-1] == 0:
                continue
            # [TQ-MAN-2] defaults
            bits, window, length, tile = (
                stage["bits"],
                stage.get("window"),
                stage.get("vector_length"),
                stage.get("tile"),
            )
            yield Stage(
                *(name, index, shape, bits),
                window=bits if window is None else window,
                vector_length=shape[-1] if length is None else length,
                tile=(1, shape[-1]) if tile is None else (tile[0], tile[1]),
                entries=book["entries"],
                dimension=book["dimension"],
                codebook=stage["codebook"],
                transform=stage["transform"],
                size=transform["size"],
                codes=stage["codes"],
                scales=stage["scales"],
                outer_scales=stage.get("outer_scales"),
                offsets=stage.get("offsets"),
                outer_offsets=stage.get("outer_offsets"),
            )

    @cached_property
    def references(self) -> list[Reference]:
        """Every storage name in the manifest; needs `schema`."""
        return [*self._table_references(), *self._weight_references()]

    def _table_references(self) -> Iterator[Reference]:
        for id, book in self.manifest["codebooks"].items():
            if book.get("tensor") is not None:
                rows = () if book.get("rows") is None else (book["rows"],)
                shape = (*rows, book["entries"], book["dimension"])
                pointer = join("codebooks", id, "tensor")
                yield Reference(book["tensor"], pointer, "TQ-BOOK-3", "levels", FLOATS, shape)
        for id, transform in self.manifest["transforms"].items():
            size = transform["size"]
            if transform["kind"] == "dense":
                pointer = join("transforms", id, "matrix")
                yield Reference(transform["matrix"], pointer, "TQ-TRAN-7", "matrix", FLOATS, (size, size))
            elif transform["kind"] == "givens":
                pointer = join("transforms", id, "pairs")
                yield Reference(transform["pairs"], pointer, "TQ-TRAN-8", "pairs", ("I32",), (None, size // 2, 2))
                pointer = join("transforms", id, "angles")
                yield Reference(transform["angles"], pointer, "TQ-TRAN-8", "angles", ("F32",), (None, size // 2))
            elif transform["kind"] == "permutation":
                pointer = join("transforms", id, "index")
                yield Reference(transform["index"], pointer, "TQ-TRAN-9", "index", ("I32",), (size,))

    def _weight_references(self) -> Iterator[Reference]:
        for stage in self.stages:
            shape: tuple[int, ...] = (stage.tiles, stage.tile_bytes)
            yield Reference(stage.codes, stage.pointer + "/codes", "TQ-CODE-4", "codes", ("U8",), shape)
            shape = (stage.rows, stage.cols // stage.vector_length)
            for key, name, outer in stage.factors:
                rule = "TQ-NUM-1" if key == "scales" else "TQ-NUM-9"
                dtypes = FLOATS if outer is None else BYTES
                yield Reference(name, f"{stage.pointer}/{key}", rule, key, dtypes, shape)
                if outer is not None:
                    pointer = f"{stage.pointer}/outer_{key}"
                    yield Reference(outer, pointer, "TQ-NUM-8", f"outer_{key}", FLOATS, (None, None))
        for name, entry in self.manifest["tensors"].items():
            if entry["kind"] == "passthrough":
                pointer, shape = join("tensors", name, "data"), tuple(entry["shape"])
                yield Reference(entry["data"], pointer, "TQ-PASS-1", "data", (entry["dtype"],), shape)
            elif entry.get("column_scale") is not None:
                pointer, shape = join("tensors", name, "column_scale"), (entry["shape"][-1],)
                yield Reference(entry["column_scale"], pointer, "TQ-NUM-2", "column_scale", FLOATS, shape)

    def chunks(self, stored: Stored, unit: int, chunk: int = CHUNK) -> Iterator[tuple[int, bytes]]:
        """The bytes of a payload tensor in whole units of `unit` bytes, about `chunk` at a time, each with its file offset."""
        chunk = max(1, chunk // unit) * unit
        offset = stored.offset
        for data in self.folder.chunks(stored.file, stored.offset, stored.size, chunk):
            yield offset, data
            offset += len(data)

    def bytes_of(self, stored: Stored) -> bytes:
        """All bytes of a small payload tensor."""
        return self.folder.read(stored.file, stored.offset, stored.size)

    def progress(self, label: str, total: int, unit: str = "B") -> tqdm.tqdm[Any]:
        """A bar over `total` bytes, or what `unit` says, if the user watches."""
        hidden = not self.options.progress
        return tqdm.tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False, disable=hidden)
