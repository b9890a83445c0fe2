"""Write tqformat 1.0 repositories: pack codes, stream tensors into safetensors shards, and publish all or nothing.

A third-party quantizer needs only RepoWriter:

    with RepoWriter("out", base_model={"id": "org/model"}, loader_kind="text-generation",
                    quantization={"method": "mine", "bits": 2}, generator="mine 0.1") as writer:
        writer.add_transform("h", "hadamard", 1024, factors=[1024], signs=hex_signs)
        writer.add_codebook("c", levels)                                     # [entries] or [entries, p]
        writer.add_quantized("a.weight", [4096, 1024], "BF16", [
            {"bits": 2, "codebook": "c", "transform": "h", "codes": pack(symbols, 2), "scales": scales}])
        writer.add_passthrough("norm.weight", norm)
        writer.add_file("base/config.json", "support")
        writer.finish()
"""

import ctypes
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from .load_quantized import (
    DTYPES,
    FEATURES,
    LOADER_KINDS,
    MANIFEST,
    Codebook,
    FileName,
    Manifest,
    TQFormatError,
    Transform,
    Weight,
    check_codebook,
    check_transform,
    check_weight,
    open_repo,
    parse_json,
    stored_tensors,
    torch_dtype,
    typed,
    unpack,
)

FORMAT_VERSION = "1.0"
DTYPE_NAMES = {torch_dtype(name): name for name in DTYPES}
Data = torch.Tensor | np.ndarray[Any, Any]


def pack(symbols: torch.Tensor, bits: int, window: int | None = None) -> torch.Tensor:
    """Codes uint8 [tiles, tile_bytes] for symbols [tiles, n] [TQ-CODE-4 to 6]. Inverse of load_quantized.unpack.

    With window > bits the symbols must overlap as the trellis demands; ValueError otherwise, and for symbols out of range.
    """
    window, (tiles, n) = window or bits, symbols.shape
    if symbols.numel() and not 0 <= int(symbols.min()) <= int(symbols.max()) < 1 << window:
        raise ValueError(f"expected symbols from 0 to {(1 << window) - 1}")
    groups = -(-n // 8)  # eight symbols take `bits` whole bytes
    own = torch.zeros(tiles, groups * 8, dtype=torch.int32, device=symbols.device)
    own[:, :n] = symbols & (1 << bits) - 1
    octets = torch.zeros(tiles, groups, bits + 2, dtype=torch.int32, device=symbols.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        for k in range(-(-(shift + bits) // 8)):
            octets[:, :, byte + k] |= own[:, j::8] << shift >> 8 * k & 255
    codes = octets[:, :, :bits].to(torch.uint8).reshape(tiles, groups * bits)[:, : -(-n * bits // 8)].contiguous()
    if window > bits and not torch.equal(unpack(codes, n, bits, window), symbols.to(torch.int32)):
        raise ValueError(f"these symbols are no trellis of {bits} bits and window {window}: neighbours must share bits")
    return codes


def _tensor(data: Data) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data)) if isinstance(data, np.ndarray) else data.detach()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row-major [TQ-PAY-7]."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], data: Callable[[str], Iterable[memoryview | bytes]]
) -> tuple[int, str]:
    """Streams a safetensors file; `tensors` gives dtype and shape by name, `data` the bytes. Returns size and SHA-256.

    The order is that of the safetensors library (wide dtypes first, then names), which keeps every tensor aligned.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:

        def put(block: memoryview | bytes) -> int:
            digest.update(block)
            return file.write(block)

        size += put(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            written = sum(put(block) for block in data(name))
            if written != end - begin:
                raise ValueError(f"{name}: expected {end - begin} bytes, got {written}")
            size += written
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def shard_names(stem: str, count: int) -> list[str]:
    """File names of `count` shards [TQ-SHARD-1]."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def split_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (more only where a single item has more)."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups


def accounting(tensors: Iterable[Weight], stored_bytes: int) -> dict[str, Any]:
    """The totals of [TQ-ACC-1] for weights whose payload data takes `stored_bytes`."""
    totals = {f"{kind}_{what}": 0 for kind in ("quantized", "passthrough") for what in ("tensors", "scalars")}
    original = 0
    for weight in tensors:
        totals[f"{weight.kind}_tensors"] += 1
        totals[f"{weight.kind}_scalars"] += math.prod(weight.shape)
        original += math.prod(weight.shape) * DTYPES[weight.dtype]
    ratio = round(original / stored_bytes, 3) if stored_bytes else 0
    return {"original_bytes": original, "stored_bytes": stored_bytes, "ratio": ratio, **totals}


def features_in_use(m: Manifest) -> list[str]:
    """The features that a manifest must list [TQ-VER-1]."""
    stages = [(s, s.layout(w.shape[-1]), w) for w in m.tensors.values() for s in w.stages or ()]
    in_use = {
        "trellis": any(window > s.bits for s, (window, _, _, _), _ in stages),
        "vector_codebook": any(c.dimension > 1 for c in m.codebooks.values()),
        "row_codebook": any(c.rows is not None for c in m.codebooks.values()),
        "stages": any(len(w.stages or ()) > 1 for w in m.tensors.values()),
        "column_scale": any(w.column_scale is not None for w in m.tensors.values()),
        "tiles": any((tr, tc) != (1, w.shape[-1]) for _, (_, _, tr, tc), w in stages),
        "dense": any(t.kind == "dense" for t in m.transforms.values()),
        "givens": any(t.kind == "givens" for t in m.transforms.values()),
    }
    return [feature for feature in FEATURES if in_use[feature]]


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON for people: one line for each entry of a table."""

    def one_line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, value in manifest.items():
        if key in ("files", "transforms", "codebooks", "tensors", "tied_weights") and value:
            rows = ",\n".join(f"  {one_line(k)}: {one_line(v)}" for k, v in value.items())
            lines.append(f" {one_line(key)}: {{\n{rows}\n }}")
        else:
            lines.append(f" {one_line(key)}: {one_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def publish(built: Path, target: Path, overwrite: bool) -> None:
    """Moves the directory `built` to `target` in one step; an old target is swapped out and removed."""
    _sync_directory(built)
    if overwrite and target.exists():
        _exchange(built, target)
        shutil.rmtree(built)
    else:
        os.rename(built, target)
    _sync_directory(target.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swaps two directories, atomically where the system can (Linux renameat2, macOS renamex_np)."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if hasattr(libc, "renameat2") and libc.renameat2(-100, names[0], -100, names[1], 2) == 0:
        return
    if hasattr(libc, "renamex_np") and libc.renamex_np(*names, 2) == 0:
        return
    aside = b.with_name(f".{b.name}.old")  # a crash between these two lines leaves the old state under this name
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _sync_directory(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class RepoWriter:
    """Builds a repository beside `path` and renames it into place in finish(); a crash leaves the old state or the new one.

    Tensors go to a spool in `.<name>.partial` as they are added. With a `resume_key`, a text that identifies the job, a
    later writer with the same key finds them there again: `done` names the weights that need not be added once more.
    Tables and files are simply added again. The result does not depend on the order of the calls.
    """

    COMMIT_SECONDS = 2.0

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base_model: dict[str, Any],
        loader_kind: str,
        quantization: dict[str, Any],
        generator: str,
        pipeline_tag: str | None = None,
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        resume_key: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{self.path} exists; choose another place, or overwrite it explicitly")
        if loader_kind not in LOADER_KINDS:
            raise ValueError(f"loader_kind: expected one of {', '.join(LOADER_KINDS)}, got {loader_kind!r}")
        self._head = {
            "format": "tqformat",
            "format_version": FORMAT_VERSION,
            "features": [],
            "generator": generator,
            "base_model": base_model,
            "loader_kind": loader_kind,
            "pipeline_tag": pipeline_tag or loader_kind,
            "quantization": quantization,
        }
        self._extra, self._max_shard_bytes, self._overwrite, self._resumable = (
            extra,
            max_shard_bytes,
            overwrite,
            resume_key is not None,
        )
        self._tables: dict[str, dict[str, Any]] = {"transforms": {}, "codebooks": {}, "tensors": {}}
        self._digests: dict[tuple[str, str], str] = {}  # of the data of transforms and codebooks
        self._lock_fd = -1
        self._parts: dict[str, list[Any]] = {}  # storage name -> [dtype, shape, offset in the spool]
        self._tied: dict[str, str] = {}
        self._sources: dict[str, tuple[str, Path | bytes]] = {}
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._lock()
        self._open_spool(json.dumps({"tqformat": FORMAT_VERSION, "key": resume_key}))

    def _lock(self) -> None:
        """Holds the partial directory until the writer closes, so that two writers of one target cannot mix their spools."""
        self._partial.mkdir(parents=True, exist_ok=True)
        if fcntl is not None:
            self._lock_fd = os.open(self._partial, os.O_RDONLY)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._unlock()
                raise BlockingIOError(f"another process is writing {self.path} (it holds {self._partial})") from None

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _open_spool(self, first_line: str) -> None:
        journal, spool = self._partial / "journal.jsonl", self._partial / "spool"
        lines = journal.read_text("utf-8", "replace").split("\n")[:-1] if self._resumable and journal.exists() else []
        if not lines or lines[0] != first_line:
            for old in self._partial.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            journal.write_text(first_line + "\n", "utf-8")
            lines = [first_line]
        end = 0
        for line in lines[1:]:  # a half-written last line was cut off above: it does not end with a newline
            record = json.loads(line)
            self._tables[record["table"]][record["id"]] = record["entry"]
            self._digests[record["table"], record["id"]] = record["sha256"]
            self._parts |= record["parts"]
            end = record["end"]
        self._spool, self._journal = open(spool, "ab"), open(journal, "ab")  # noqa: SIM115 (closed in _close)
        if self._spool.tell() < end:
            raise OSError(f"{spool} ends early; remove {self._partial} and start again")
        self._spool.truncate(end)
        self._journal.truncate(sum(len(line.encode()) + 1 for line in lines))
        self._pending: list[str] = []
        self._end, self._committed = end, time.monotonic()

    @property
    def done(self) -> set[str]:
        """The names of the weights that are in the spool."""
        return set(self._tables["tensors"])

    @property
    def scratch(self) -> Path:
        """A directory for files of the job that a resumed writer finds again; it is removed in finish()."""
        return self._partial

    def __enter__(self) -> "RepoWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if not self._resumable:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._unlock()

    def _close(self) -> None:
        if not self._spool.closed:
            self.commit()
            self._spool.close()
            self._journal.close()

    def _add(
        self, table: str, id: str, entry: dict[str, Any], parts: dict[str, tuple[str, tuple[int, ...], Iterable[Data]]]
    ) -> None:
        """Spools the parts, storage name -> (dtype, shape, chunks), and records the entry once all of them are there."""
        if id in self._tables[table]:
            if table == "tensors":
                raise ValueError(f"the weight {id!r} was added before; `done` names those that a resumed writer has")
            data = b"".join(raw_bytes(_tensor(chunk)) for _, _, chunks in parts.values() for chunk in chunks)
            if self._tables[table][id] != entry or self._digests[table, id] != hashlib.sha256(data).hexdigest():
                raise ValueError(f"{table}[{id!r}] was added before with another content")
            return
        record: dict[str, Any] = {"table": table, "id": id, "entry": entry, "parts": {}}
        nonnegative = {stage["scales"] for stage in entry.get("stages", ())}
        start, digest = self._end, hashlib.sha256()
        for name, (dtype, shape, chunks) in parts.items():
            if name in self._parts or name in record["parts"]:
                raise ValueError(f"the storage name {name!r} is taken")
            record["parts"][name] = [dtype, list(shape), self._end]
            for chunk in chunks:
                if DTYPE_NAMES[_tensor(chunk).dtype] not in (dtype, "U8"):
                    raise ValueError(f"{name}: expected {dtype} data, got {_tensor(chunk).dtype}")
                if name in nonnegative and not bool((_tensor(chunk).isfinite() & (_tensor(chunk) >= 0)).all()):
                    raise ValueError(f"{name}: scales must be finite and not negative [TQ-NUM-1]")
                if table != "tensors":
                    digest.update(raw_bytes(_tensor(chunk)))
                self._end += self._spool.write(raw_bytes(_tensor(chunk)))
            wanted = math.prod(shape) * DTYPES[dtype]
            if self._end - record["parts"][name][2] != wanted:
                self._end, found = start, self._end - record["parts"][name][2]
                self._spool.truncate(start)
                raise ValueError(f"{name}: expected {wanted} bytes for {dtype} {list(shape)}, got {found}")
        record |= {"end": self._end, "sha256": digest.hexdigest()}
        self._tables[table][id], self._digests[table, id] = entry, record["sha256"]
        self._parts |= record["parts"]
        self._pending.append(json.dumps(record, ensure_ascii=False) + "\n")
        if time.monotonic() - self._committed > self.COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes what was added so far survive a crash: the data first, then the journal that speaks of it."""
        self._spool.flush()
        os.fsync(self._spool.fileno())
        self._journal.write("".join(self._pending).encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending, self._committed = [], time.monotonic()

    def add_transform(self, id: str, kind: str, size: int, **keys: Any) -> None:
        """Adds a transform [SPEC section 8]: keys factors, signs, seed, or matrix, or pairs and angles (as tensors), extra."""
        entry: dict[str, Any] = {"kind": kind, "size": size}
        parts: dict[str, Any] = {}
        for key, value in keys.items():
            if key in ("matrix", "pairs", "angles") and value is not None:
                data = _tensor(value)
                entry[key] = f"{id}.{key}"
                parts[entry[key]] = (DTYPE_NAMES[data.dtype], tuple(data.shape), [data])
            elif value is not None:
                entry[key] = value
        check_transform(typed(Transform, entry, f"transforms[{id!r}]"), f"transforms[{id!r}]")
        self._add("transforms", id, entry, parts)

    def add_codebook(
        self, id: str, values: Data | list[float], *, origin: dict[str, Any] | None = None, stored: bool | None = None
    ) -> None:
        """Adds a codebook, [entries], [entries, p] or, one per row, [rows, entries, p]; F16 or F32 if stored, else inline.

        `stored` defaults to what the format requires: large codebooks and codebooks per row go to the payload.
        """
        levels = _tensor(values) if not isinstance(values, list) else torch.tensor(values, dtype=torch.float64)
        levels = levels[:, None] if levels.dim() == 1 else levels
        entry: dict[str, Any] = {"entries": levels.shape[-2], "dimension": levels.shape[-1]}
        parts: dict[str, Any] = {}
        if levels.dim() == 3:
            entry["rows"] = levels.shape[0]
        if stored or levels.dim() == 3 or levels.numel() > 4096:
            levels = levels if levels.dtype == torch.float16 else levels.float()
            entry["tensor"] = f"{id}.levels"
            parts[entry["tensor"]] = (DTYPE_NAMES[levels.dtype], tuple(levels.shape), [levels])
        else:
            entry["values"] = levels.float().double().flatten().tolist()
        entry |= {"origin": origin} if origin else {}
        check_codebook(typed(Codebook, entry, f"codebooks[{id!r}]"), f"codebooks[{id!r}]")
        self._add("codebooks", id, entry, parts)

    def add_quantized(
        self,
        name: str,
        shape: Iterable[int],
        dtype: str,
        stages: list[dict[str, Any]],
        column_scale: Data | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Adds a quantized weight. Each stage has the keys of SPEC section 4, with data instead of storage names.

        `codes` is uint8 [tiles, tile_bytes] and `scales` [rows, cols/G]; either may be an iterable of chunks along the first
        dimension, and `scale_dtype` then names the dtype of the scales. All codes of a stage are taken before its scales.
        `extra` is recorded once everything has been taken, so an encoder may still fill it in while it yields chunks.
        """
        entry: dict[str, Any] = {
            "kind": "quantized",
            "shape": list(shape),
            "dtype": dtype,
            "effective_bits": 0,
            "stages": [],
        }
        data: dict[str, tuple[str, Iterable[Data]]] = {}
        for i, stage in enumerate(stages):
            suffix = f".{i}" if len(stages) > 1 else ""
            record = {k: v for k, v in stage.items() if k not in ("codes", "scales", "scale_dtype") and v is not None}
            for key in ("codes", "scales"):
                chunks = [stage[key]] if isinstance(stage[key], (torch.Tensor, np.ndarray)) else stage[key]
                first = (
                    DTYPE_NAMES[_tensor(chunks[0]).dtype]
                    if isinstance(chunks, list) and chunks
                    else stage.get("scale_dtype")
                )
                record[key] = f"{name}.{key}{suffix}"
                data[record[key]] = ("U8" if key == "codes" else str(first), chunks)
            entry["stages"].append(record)
            book = self._tables["codebooks"].get(record["codebook"], {"dimension": 1})
            bits = record["bits"] / book["dimension"]
            entry["effective_bits"] += int(bits) if bits == int(bits) else bits
        if column_scale is not None:
            entry["column_scale"] = f"{name}.column_scale"
            data[entry["column_scale"]] = (DTYPE_NAMES[_tensor(column_scale).dtype], [column_scale])
        if extra:
            entry["extra"] = extra
        weight = typed(Weight, entry, f"tensors[{name!r}]")
        named = {
            table: {
                stage[key]: self._tables[table][stage[key]]
                for stage in entry["stages"]
                if stage[key] in self._tables[table]
            }
            for table, key in (("transforms", "transform"), ("codebooks", "codebook"))
        }
        check_weight(weight, f"tensors[{name!r}]", self._manifest(**named))
        parts: dict[str, Any] = {}
        for key, dtypes, part_shape, where in stored_tensors(
            self._manifest(codebooks=named["codebooks"], tensors={name: entry})
        ):
            if key not in data:
                continue
            found, chunks = data[key]
            if found not in dtypes:
                raise ValueError(f"{where}: expected {' or '.join(dtypes)}, got {found}")
            parts[key] = (found, part_shape, chunks)
        self._add("tensors", name, entry, parts)

    def add_passthrough(
        self, name: str, data: Data | Iterable[Data], *, shape: Iterable[int] | None = None, dtype: str | None = None
    ) -> None:
        """Adds a tensor as it is; an iterable of chunks (of the dtype, or raw uint8) needs `shape` and `dtype`."""
        chunks: Iterable[Data]
        if isinstance(data, (torch.Tensor, np.ndarray)):
            tensor = _tensor(data)
            shape, dtype, chunks = shape or tensor.shape, dtype or DTYPE_NAMES[tensor.dtype], [tensor]
        else:
            chunks = data
        if shape is None or dtype is None:
            raise ValueError(f"{name}: shape and dtype are needed with chunks")
        dims = tuple(shape)
        entry = {"kind": "passthrough", "shape": list(dims), "dtype": dtype, "data": name}
        self._add("tensors", name, entry, {name: (dtype, dims, chunks)})

    def tie(self, alias: str, source: str) -> None:
        """Records that the weight `alias` is the weight `source` [TQ-TIE-1]."""
        self._tied[alias] = source

    def add_file(self, source: str | os.PathLike[str] | bytes, role: str, name: str | None = None) -> None:
        """Adds a file, role support, code or document [TQ-REPO-3]; `name` defaults to the source's."""
        name = name or Path(os.fsdecode(source) if not isinstance(source, bytes) else "").name
        typed(FileName, name, f"files[{name!r}]")
        for other in self._sources:
            if other != name and other.lower() == name.lower():
                raise TQFormatError("PATH.COLLISION", f"files[{name!r}]", f"differs from {other!r} in case alone")
        self._sources[name] = (role, source if isinstance(source, bytes) else Path(source))

    def _manifest(self, **tables: dict[str, Any]) -> Manifest:
        empty: dict[str, dict[str, Any]] = {
            key: {} for key in ("files", "transforms", "codebooks", "tensors", "accounting")
        }
        manifest: Manifest = typed(Manifest, {**self._head, **empty, **tables}, "")
        return manifest

    def _chunks(self, name: str) -> Iterator[bytes]:
        dtype, shape, offset = self._parts[name]
        left = math.prod(shape) * DTYPES[dtype]
        with open(self._partial / "spool", "rb") as spool:
            spool.seek(offset)
            while left:
                block = spool.read(min(left, 1 << 22))
                if not block:
                    raise OSError(f"{spool.name} ends early; remove {self._partial} and start again")
                left -= len(block)
                yield block

    def finish(self) -> Path:
        """Writes shards, files and manifest, checks them with the reader, and renames the directory into place.

        What a reader may leave to validators ([TQ-ERR-3]: provenance, signs and their seed, levels and their origin) is
        the caller's word; `python -m conformance check` judges it.
        """
        self._close()
        built = self._partial / "release"
        shutil.rmtree(built, ignore_errors=True)
        built.mkdir()
        tables = {key: dict(sorted(table.items())) for key, table in self._tables.items()}
        used = [stage for weight in tables["tensors"].values() for stage in weight.get("stages", ())]
        for key, column in (("transforms", "transform"), ("codebooks", "codebook")):
            unused = tables[key].keys() - {stage[column] for stage in used}
            if unused:
                raise ValueError(f"{key} that no stage names: {', '.join(sorted(unused))} [TQ-MAN-9]")
        parts = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in sorted(self._parts.items())}
        sizes = {name: math.prod(shape) * DTYPES[dtype] for name, (dtype, shape) in parts.items()}
        files: dict[str, dict[str, Any]] = {}
        groups = split_shards(sizes, self._max_shard_bytes)
        for file, group in zip(shard_names("turboquant_weights", len(groups)), groups, strict=True):
            size, digest = write_safetensors(built / file, {name: parts[name] for name in group}, self._chunks)
            files[file] = {"role": "payload", "size": size, "sha256": digest}
        for name, (role, source) in sorted(self._sources.items()):
            content = source if isinstance(source, bytes) else source.read_bytes()
            files[name] = {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write_synced(built / name, content)
        features = features_in_use(self._manifest(**tables))
        weights = [typed(Weight, entry, name) for name, entry in tables["tensors"].items()]
        manifest = {**self._head, "features": features, "files": files, **tables}
        manifest |= {"tied_weights": dict(sorted(self._tied.items()))} if self._tied else {}
        manifest |= {"accounting": accounting(weights, sum(sizes.values()))} | (
            {"extra": self._extra} if self._extra else {}
        )
        _write_synced(built / MANIFEST, manifest_text(manifest).encode())
        open_repo(built, verify=False).close()
        publish(built, self.path, self._overwrite)
        shutil.rmtree(self._partial)
        self._unlock()
        return self.path


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def add_files(repo: str | os.PathLike[str], sources: dict[str, tuple[str, bytes]]) -> None:
    """Adds or replaces files of a finished repository, name -> (role, content); the manifest is replaced last, at once."""
    path = Path(repo)
    manifest = parse_json((path / MANIFEST).read_bytes(), MANIFEST)
    Manifest.from_dict(manifest)
    for name, (role, content) in sources.items():
        manifest["files"][name] = {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    Manifest.from_dict(manifest)
    for name, (_, content) in sources.items():
        _write_synced(path / f".{name}.new", content)
    _write_synced(path / f".{MANIFEST}.new", manifest_text(manifest).encode())
    for name in (*sources, MANIFEST):
        os.replace(path / f".{name}.new", path / name)
    _sync_directory(path)


def dequantize_repo(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    verify: bool = True,
) -> Path:
    """Writes a plain safetensors checkpoint that any tool reads, tied weights under all their names; streams weight by weight."""
    target = Path(os.path.realpath(out))
    if target.exists() or Path(os.path.realpath(path)) in target.parents:
        raise FileExistsError(f"{target} exists or lies in the repository; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    built = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".plain", dir=target.parent))
    try:
        _write_plain(path, built, device, dtype, max_shard_bytes, verify)
        built.chmod(0o755)
        publish(built, target, overwrite=False)
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return target


def _write_plain(
    path: str | os.PathLike[str],
    built: Path,
    device: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    verify: bool,
) -> None:
    with open_repo(path, verify) as repo:
        m = repo.manifest
        names = {name: m.tensors[m.tied_weights.get(name, name)] for name in sorted([*m.tensors, *m.tied_weights])}
        floats = {"F16", "BF16", "F32", "F64"}
        kinds = {n: DTYPE_NAMES[dtype] if dtype and w.dtype in floats else w.dtype for n, w in names.items()}
        sizes = {name: math.prod(w.shape) * DTYPES[kinds[name]] for name, w in names.items()}

        def data(name: str) -> Iterator[memoryview]:
            yield raw_bytes(repo.dequantize(name, device, torch_dtype(kinds[name])))

        groups = split_shards(sizes, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for shard, group in zip(shard_names("model", len(groups)), groups, strict=True):
            write_safetensors(built / shard, {name: (kinds[name], names[name].shape) for name in group}, data)
            weight_map |= dict.fromkeys(group, shard)
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_synced(built / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
        for name, file in m.files.items():
            if file.role == "support" and (repo.path / name).exists():
                content = repo.check_file(name).read_bytes()
                if name == "config.json" and dtype is not None:
                    config = _with_dtype(json.loads(content), str(dtype).removeprefix("torch."))
                    content = json.dumps(config, indent=2).encode()
                _write_synced(built / name, content)


def _with_dtype(config: Any, dtype: str) -> Any:
    """A model's configuration, and those of its parts, with another dtype of the weights."""
    if isinstance(config, dict):
        keys = ("dtype", "torch_dtype")
        return {k: dtype if k in keys and isinstance(v, str) else _with_dtype(v, dtype) for k, v in config.items()}
    return config


__all__ = ["RepoWriter", "TQFormatError", "accounting", "add_files", "dequantize_repo", "features_in_use", "pack"]
