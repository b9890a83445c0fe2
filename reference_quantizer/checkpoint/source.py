"""Reading a checkpoint: which safetensors files make it up, what they hold, and their bytes, a chunk at a time.

Files are read with seek and read into one buffer, never mapped: a checkpoint larger than memory is fine.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reference_quantizer.libraries import hub_errors, need, reason
from tqformat.load_quantized import DTYPES as ITEMSIZE
from tqformat.load_quantized import MANIFEST, TQFormatError, read_header, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # bytes read at once where no rows are wanted
CHUNK_SCALARS = 2**18  # scalars of the row chunks that are quantized: 1 MiB for each float32 work array

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = [
    *("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.py", "README.md"),
    *("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*"),
]
HUB_IGNORED = ["*/*", "consolidated*"]  # the latter: see weight_files
PROVENANCE = "gguf_import.json"  # in a checkpoint that gguf_source has written: which file it was made from
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz", "*.ckpt")


@dataclass(frozen=True)
class Info:
    """One tensor of a checkpoint: bytes `begin` to `end` of `file`, which is empty in an inventory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str = ""
    begin: int = 0
    end: int = 0

    @property
    def scalars(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.scalars * ITEMSIZE[self.dtype]

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Source:
    """A checkpoint directory, or an inventory of one (`path` is then the JSON file and there are no bytes)."""

    path: Path
    tensors: dict[str, Info]  # in the order of files and of bytes in them
    identity: list[list[Any]] = field(default_factory=list)  # file name, size, mtime and header digest of each file
    config: dict[str, Any] | None = None  # config.json
    notes: tuple[str, ...] = ()
    id: str | None = None  # Hub id, where known
    revision: str | None = None
    provenance: dict[str, Any] | None = None  # of a checkpoint that was imported from another format

    @property
    def is_inventory(self) -> bool:
        return not self.identity


# ------------------------------------------------------------------------------------------------ opening


def open_source(src: str, revision: str | None = None) -> Source:
    """The checkpoint `src`: a directory, a Hub id (fetched), or an inventory file {name: {shape, dtype}}."""
    path = Path(src)
    if path.is_file():
        return read_inventory(path)
    hub_id = None
    if not path.is_dir():
        if not HUB_ID.fullmatch(src):
            raise TQFormatError("BIND.MISSING_FILE", src, "neither a directory, nor an inventory file, nor a Hub id")
        hub_id, path = src, _fetch(src, revision)
    if (path / MANIFEST).exists():
        advice = f"already a tqformat repository; make a checkpoint of it first: python -m tqformat export {src} OUT"
        raise TQFormatError("SCHEMA.VALUE", str(path), advice)
    cached_id, commit = hub_cache_names(path)
    notes: list[str] = []
    if revision and hub_id is None:
        if commit not in (None, revision):
            raise TQFormatError(
                "SCHEMA.VALUE", "--revision", f"the directory is a snapshot of another commit, {commit}"
            )
        notes.append(f"the revision {revision} is recorded; the local directory is read as it is")
    tensors: dict[str, Info] = {}
    identity: list[list[Any]] = []
    names, placed = weight_files(path, notes)
    for name in names:
        spans, facts = _read_file_header(path / name, name)
        identity.append(facts)
        for key in placed.get(name, []):
            if key not in spans:
                raise TQFormatError("BIND.MISSING_TENSOR", f"{name}: {key[:80]!r}", "the index places this tensor here")
        for key, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end, item[0])):
            if key in tensors:
                message = f"the tensor is also in {tensors[key].file}; keep one of the two files"
                raise TQFormatError("CONTAINER.DUPLICATE_NAME", f"{name}: {key[:80]!r}", message)
            tensors[key] = Info(key, tuple(span.shape), span.dtype, name, span.begin, span.end)
    if not tensors:
        raise TQFormatError("BIND.MISSING_TENSOR", str(path), "the safetensors files hold no tensors")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    provenance = read_json(path / PROVENANCE) if (path / PROVENANCE).is_file() else None
    return Source(path, tensors, identity, config, tuple(notes), hub_id or cached_id, commit or revision, provenance)


def weights_sha256(source: Source) -> str:
    """A digest of the checkpoint's content: of the JSON list of [file name, SHA-256] of its weight files and config.json."""
    names = [*(facts[0] for facts in source.identity), *(["config.json"] if source.config is not None else [])]
    digests = [[name, file_sha256(source.path / name)] for name in names]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_inventory(path: Path) -> Source:
    """The tensors that an inventory file names; good for a plan, not for quantizing."""
    tensors = {}
    for name, value in read_json(path).items():
        shape = value.get("shape") if isinstance(value, dict) else None
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
            message = 'expected {name: {"shape": [integers], "dtype": "BF16"}}'
            raise TQFormatError("SCHEMA.TYPE", f"{path.name}: {name[:80]!r}", message)
        if dtype not in ITEMSIZE:
            raise TQFormatError("CONTAINER.DTYPE", f"{path.name}: {name[:80]!r}", f"unknown dtype {str(dtype)[:40]!r}")
        tensors[name] = Info(name, tuple(shape), dtype)
    return Source(path, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint, read as leniently as model libraries do (NaN, long integers)."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TQFormatError("JSON.SYNTAX", path.name, f"not a JSON text: {error}") from None
    if not isinstance(value, dict):
        raise TQFormatError("JSON.SYNTAX", path.name, "expected an object")
    return value


def weight_files(path: Path, notes: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the safetensors files that make up the checkpoint in `path`; what is left out goes to `notes`.

    The second result says which tensors an index places in which file.  With an index, the files are those it names. Without one, every file, but `consolidated*` only where there is nothing else
    (some publishers store the weights a second time in such files, under other names).
    """
    names = sorted(p.name for p in path.glob("*.safetensors") if p.is_file())
    indices = sorted(p.name for p in path.glob("*.safetensors.index.json"))
    if len(indices) > 1 and "model.safetensors.index.json" in indices:
        indices = ["model.safetensors.index.json"]
    if len(indices) > 1:
        raise TQFormatError("BIND.SHARDS", str(path), f"several indices: {', '.join(indices)}; keep one")
    placed: dict[str, list[str]] = {}
    if indices:
        placed = _index_files(path, indices[0])
        chosen = list(placed)
    elif names:
        regular = [n for n in names if not n.startswith("consolidated")]
        chosen = regular or names
        _check_numbering(chosen)
    else:
        found = sorted({p.name for pattern in OTHER_WEIGHTS for p in path.glob(pattern)})
        rest = f"found {', '.join(found[:4])}, which this program does not read" if found else "found no weights at all"
        advice = "; save the model again with safe serialization" if found else ""
        raise TQFormatError("BIND.MISSING_FILE", str(path), f"expected safetensors files, {rest}{advice}")
    ignored = [n for n in names if n not in chosen]
    if ignored:
        notes.append(f"not part of the checkpoint, left out: {', '.join(ignored)}")
    return chosen, placed


def _index_files(path: Path, index: str) -> dict[str, list[str]]:
    """The shards that an index names, each of them present, and the tensors that it places in each."""
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise TQFormatError("SCHEMA.TYPE", index, "expected a weight_map of tensor names to file names")
    placed: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
    for key, name in weight_map.items():
        placed[name].append(key)
    for name in placed:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise TQFormatError("PATH.NAME", f"{index}: {name[:80]!r}", "expected the plain name of a safetensors file")
        if not (path / name).is_file():
            raise TQFormatError("BIND.MISSING_FILE", name, f"{index} names this shard, but it is not there")
    return placed


def _check_numbering(names: list[str]) -> None:
    """Shards numbered k-of-n must be n."""
    groups: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*?)-?(\d+)-of-(\d+)\.safetensors", name):
            groups.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (stem, count), present in groups.items():
        missing = sorted(set(range(1, count + 1)) - present) if 0 not in present else []
        if missing:
            message = f"{len(missing)} of {count} shards are not there, the first is number {missing[0]}"
            raise TQFormatError("BIND.MISSING_FILE", f"{stem}-*-of-*.safetensors", message)


def _read_file_header(path: Path, name: str) -> tuple[dict[str, Any], list[Any]]:
    """The tensors of a safetensors file, and the facts that tell it from a changed one."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        spans = read_header(file, stat.st_size, name)
        end = min((s.begin for s in spans.values()), default=stat.st_size)
        file.seek(0)
        digest = hashlib.sha256(file.read(end)).hexdigest()
    return spans, [name, stat.st_size, stat.st_mtime_ns, digest]


def hub_cache_names(path: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a directory in a Hub cache (models--owner--name/snapshots/commit), else (None, None)."""
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/", 1), parts[-1]
    return None, None


def _fetch(hub_id: str, revision: str | None) -> Path:
    need(hub_id, "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        kinds = {"allow_patterns": HUB_PATTERNS, "ignore_patterns": HUB_IGNORED}
        folder = snapshot_download(hub_id, revision=revision, **kinds)
    except hub_errors() as error:
        message = f"the checkpoint cannot be fetched ({reason(error)}); a local directory will do as well"
        raise TQFormatError("BIND.MISSING_FILE", hub_id, message) from None
    return Path(folder)


# ------------------------------------------------------------------------------------------------ bytes


class Reader:
    """Reads tensors of a source in chunks, into one buffer that it keeps. A context manager."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._files: dict[str, FileIO] = {}
        self._buffer = bytearray()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def byte_chunks(self, info: Info, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The tensor's bytes in order, `size` at a time; each chunk is valid until the next one is asked for."""
        for begin in range(info.begin, info.end, size):
            yield self._read(info.file, begin, min(size, info.end - begin))

    def row_chunks(self, info: Info, scalars: int = CHUNK_SCALARS) -> "Iterator[Tensor]":
        """The tensor as [rows, cols], some rows at a time; each chunk is valid until the next one is asked for.

        A chunk has at most `scalars` elements, but at least one row, and the dtype of the checkpoint.
        """
        import torch

        step = max(1, scalars // info.cols) * info.cols * ITEMSIZE[info.dtype]
        for chunk in self.byte_chunks(info, step):
            yield torch.frombuffer(chunk, dtype=torch_dtype(info.dtype)).reshape(-1, info.cols)

    def _read(self, name: str, begin: int, size: int) -> memoryview:
        if name not in self._files:
            self._files[name] = FileIO(self.source.path / name)
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        file, view, done = self._files[name], memoryview(self._buffer)[:size], 0
        file.seek(begin)
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise TQFormatError("BIND.SIZE", name, f"the file ends at byte {begin + done}, it was longer before")
            done += count
        return view


def same_bytes(source: Source, first: Info, second: Info) -> bool:
    """Whether two tensors are byte for byte the same; stops reading at the first difference."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    with Reader(source) as a, Reader(source) as b:
        return all(np.array_equal(x, y) for x, y in zip(a.byte_chunks(first), b.byte_chunks(second), strict=True))
