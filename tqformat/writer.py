"""Write tqformat 1.0 repositories: pack codes, stream tensors into safetensors shards, and publish all or nothing.

A third-party quantizer needs only RepoWriter, whose docstring is a complete example, and pack.
"""

import ctypes
import hashlib
import json
import math
import operator
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from .load_quantized import (
    DTYPES,
    FEATURES,
    MANIFEST,
    Codebook,
    FileName,
    Manifest,
    Name,
    Stage,
    TQFormatError,
    Transform,
    Weight,
    check_codebook,
    check_transform,
    check_weight,
    fits,
    open_repo,
    parse_json,
    require,
    stored_tensors,
    torch_dtype,
    typed,
    unpack,
)

FORMAT_VERSION = "1.0"
CHUNK_SIZE = 4 << 20  # of the digests of a payload file
DTYPE_NAMES = {torch_dtype(name): name for name in DTYPES if name != "F8_E8M0" or hasattr(torch, "float8_e8m0fnu")}
Data = torch.Tensor | np.ndarray[Any, Any]
Key = TypeVar("Key")


def pack(symbols: torch.Tensor, bits: int, window: int | None = None) -> torch.Tensor:
    """Codes uint8 [tiles, tile_bytes] for symbols [tiles, n] [TQ-CODE-4 to 6]. Inverse of load_quantized.unpack.

    With window > bits the symbols must overlap as the trellis demands; ValueError otherwise, and for symbols out of range.
    """
    symbols, window = _tensor(symbols, "symbols"), window or bits
    if symbols.dim() != 2 or symbols.is_floating_point():
        raise ValueError(f"symbols: expected integers [tiles, n], got {symbols.dtype} {list(symbols.shape)}")
    tiles, n = symbols.shape
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


def _tensor(data: Data, where: str = "data") -> torch.Tensor:
    """`data` as a tensor of a dtype that the format knows; SCHEMA.TYPE for anything else."""
    tensor: Any = data
    if isinstance(data, np.ndarray):
        with suppress(TypeError, ValueError):  # torch has no such dtype
            tensor = torch.from_numpy(np.asarray(data, order="C"))
    ok = isinstance(tensor, torch.Tensor) and tensor.dtype in DTYPE_NAMES
    found = f"{type(data).__name__} {getattr(data, 'dtype', '')}"
    require(ok, "SCHEMA.TYPE", where, "a tensor or array of a known dtype", found)
    return tensor.detach()  # type: ignore[no-any-return]


def _pieces(data: Data | Iterable[Data], where: str) -> Iterable[Data]:
    """The chunks that `data` consists of; a tensor or array is one."""
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return [data]
    ok = isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict))
    require(ok, "SCHEMA.TYPE", where, "a tensor, an array or an iterable of them", type(data).__name__)
    return data


def _dims(shape: Iterable[int], where: str) -> list[int]:
    try:
        return [operator.index(n) for n in shape]
    except TypeError:
        raise TQFormatError("SCHEMA.TYPE", where, f"expected a list of integers, got {shape!r}") from None


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TQFormatError("SCHEMA.TYPE", where, f"expected what JSON can say ({error})") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system that names no file, as that of a full disk, is about `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a tensor, row-major [TQ-PAY-7]."""
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


Tensors = dict[str, tuple[str, tuple[int, ...]]]  # storage name -> dtype and shape


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[dtype]


def lay_out(groups: Iterable[Tensors]) -> Tensors:
    """The tensors of all groups in the order of a file, each aligned to its element size [TQ-PAY-8, TQ-PAY-9].

    Within a group wide dtypes come first. A tensor whose length would misalign what follows goes to the end of the file,
    where wide dtypes come first, too.
    """

    def width(item: tuple[str, tuple[str, tuple[int, ...]]]) -> int:
        return DTYPES[item[1][0]]

    order = [item for group in groups for item in sorted(group.items(), key=width, reverse=True)]
    unit = max(map(width, order), default=1)
    last = {name: tensor for name, tensor in order if nbytes(*tensor) % unit}
    inside = {name: tensor for name, tensor in order if name not in last}
    return inside | dict(sorted(last.items(), key=width, reverse=True))


def write_safetensors(
    path: Path,
    tensors: Tensors,
    data: Callable[[str], Iterable[memoryview | bytes]],
    chunk_size: int | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Streams a safetensors file, the tensors in their order, `data` giving their bytes by name.

    Returns the size and the digests, as a manifest lists them [TQ-REPO-4, TQ-REPO-8]. Data begin at a multiple of 64.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    first = {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(first | header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    whole, chunk, chunks, size = hashlib.sha256(), hashlib.sha256(), [], 0
    with naming(path), open(path, "wb") as file:

        def put(block: memoryview | bytes) -> int:
            nonlocal chunk, size
            view = memoryview(block)
            whole.update(view)
            while chunk_size and len(view):
                piece = view[: chunk_size - size % chunk_size]
                chunk.update(piece)
                size, view = size + len(piece), view[len(piece) :]
                if size % chunk_size == 0:
                    chunks.append(chunk.hexdigest())
                    chunk = hashlib.sha256()
            size += len(view)
            return file.write(block)

        put(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            written = sum(put(block) for block in data(name))
            if written != end - begin:
                raise ValueError(f"{name}: expected {end - begin} bytes, got {written}")
        file.flush()
        os.fsync(file.fileno())
    result = {"size": size, "sha256": whole.hexdigest()}
    if chunk_size:
        result |= {"chunk_size": chunk_size, "chunks": chunks + ([chunk.hexdigest()] if size % chunk_size else [])}
    return result


def shard_names(stem: str, count: int) -> list[str]:
    """File names of `count` shards [TQ-SHARD-1]."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def split_shards(sizes: dict[Key, int], limit: int) -> list[list[Key]]:
    """Names in order, cut into groups of at most `limit` bytes (more only where a single item has more)."""
    groups: list[list[Key]] = [[]]
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
        "offsets": any(s.offsets is not None for s, _, _ in stages),
        "outer_scales": any(s.outer_scales is not None or s.outer_offsets is not None for s, _, _ in stages),
        "fine_scales": any(g < m.transforms[s.transform].size for s, (_, g, _, _), _ in stages),
    }
    in_use |= {k: any(t.kind == k for t in m.transforms.values()) for k in ("dense", "givens", "permutation")}
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
    try:
        libc: Any = ctypes.CDLL(None, use_errno=True)
    except TypeError:  # Windows
        libc = None
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


NUMBERS = ("scales", "outer_scales", "offsets", "outer_offsets")  # of a stage


def _finite(tensor: torch.Tensor, dtype: str) -> bool:
    """Whether the numbers are finite that `tensor`, of the dtype or its bytes, holds [TQ-NUM-1, TQ-NUM-8]."""
    if dtype == "F8_E8M0":
        return not bool((tensor.view(torch.uint8) == 255).any())
    return bool(tensor.view(torch_dtype(dtype)).float().isfinite().all())


def _checked_codes(chunks: Iterable[Data], s: Stage, book: Codebook, cols: int, where: str) -> Iterator[Data]:
    """The chunks, once padding bits are seen to be zero, and symbols below `entries` [TQ-CODE-5, TQ-BOOK-4]."""
    window, _, tr, tc = s.layout(cols)
    n = tr * tc // book.dimension
    size = -(-n * s.bits // 8)
    for chunk in chunks:
        codes = _tensor(chunk, where)
        may_be_wrong = n * s.bits % 8 or book.entries < 1 << window
        if may_be_wrong and codes.dtype == torch.uint8 and codes.numel() and codes.numel() % size == 0:
            for tiles in torch.split(codes.reshape(-1, size), max(1, (1 << 20) // n)):
                try:
                    largest = int(unpack(tiles, n, s.bits, window).max())
                except TQFormatError as error:
                    raise error.inside(where.removesuffix("codes")) from None
                require(largest < book.entries, "PACK.CODE_RANGE", where, f"symbols below {book.entries}", largest)
        yield chunk


class RepoWriter:
    """Builds a repository beside `path` and renames it into place in finish(); a crash leaves the old state or the new one.

    A complete quantizer: 16 even levels, one scale per row, no rotation.

        import torch
        from tqformat import RepoWriter, embed, pack

        weights = {"model.embed_tokens.weight": torch.randn(64, 32), "model.norm.weight": torch.ones(32)}
        head = {"base_model": {"id": "org/model"}, "quantization": {"method": "even levels", "bits": 4}}
        with RepoWriter("my-model-4bit", loader_kind="text-generation", generator="mine 0.1", **head) as writer:
            writer.add_transform("none", "identity", 1)
            writer.add_codebook("even", torch.linspace(-1, 1, 16))                    # [entries], or [entries, p]
            for name, weight in weights.items():
                if weight.dim() == 1:
                    writer.add_passthrough(name, weight)
                    continue
                scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-9)           # [rows, 1]
                symbols = ((weight / scales + 1) * 7.5).round().int()                 # [rows, cols], from 0 to 15
                stage = {"bits": 4, "codebook": "even", "transform": "none", "codes": pack(symbols, 4), "scales": scales}
                writer.add_quantized(name, weight.shape, "BF16", [stage])
            writer.add_file(b'{"model_type": "llama"}', "support", "config.json")     # or the path of a file
            writer.add_file(embed.stamped_loader(), "code", "load_quantized.py")
            writer.finish()

    Beside the keys shown, a stage may have `window`, `vector_length` (scales are [rows, cols/vector_length]), `tile`,
    `offsets`, which are added to scale * level, and `outer_scales` and `outer_offsets`, which multiply 8-bit ones;
    add_quantized takes several stages and a `column_scale`. SPEC.md, sections 4 and 9, says what they mean.

    Leaving the `with` block without finish() is an error. Wrong arguments raise TQFormatError or another ValueError. Weights
    are not decoded: that none overflows [TQ-NUM-6] is the caller's care, and `python -m conformance check` tells.

    Tensors go to a spool in `.<name>.partial` as they are added. With a `resume_key`, a text that identifies the job, a
    later writer with the same key finds them there again: `done` names the weights that need not be added once more.
    Tables and files are simply added again. Weights are stored in the order in which they were added, unless finish() is
    given another; but for that, the result does not depend on the order of the calls.
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
        chunk_size: int | None = CHUNK_SIZE,
        overwrite: bool = False,
        resume_key: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        require(isinstance(path, (str, os.PathLike)), "SCHEMA.TYPE", "path", "a path", repr(path))
        self.path = Path(os.path.realpath(path))
        if self.path.exists() and not overwrite:
            raise FileExistsError(f"{self.path} exists; choose another place, or overwrite it explicitly")
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
        self._empty = self._manifest()
        _json([self._head, typed(dict[str, Any] | None, extra, "extra")], "base_model, quantization, extra")
        for key, needed in (("base_model", ("id",)), ("quantization", ("method", "bits"))):
            for name in needed:
                ok = self._head[key].get(name) is not None  # type: ignore[attr-defined]
                require(ok, "SCHEMA.MISSING_FIELD", f"{key}.{name}", "this key to be given")
        ok = type(max_shard_bytes) is int and max_shard_bytes > 0
        require(ok, "SCHEMA.VALUE", "max_shard_bytes", "a number of bytes", repr(max_shard_bytes))
        ok = chunk_size is None or (type(chunk_size) is int and chunk_size >= 4096)  # [TQ-REPO-8]
        require(ok, "SCHEMA.VALUE", "chunk_size", "4096 bytes or more, or None for no chunks", repr(chunk_size))
        typed(str | None, resume_key, "resume_key")
        self._extra, self._max_shard_bytes, self._chunk_size = extra, max_shard_bytes, chunk_size
        self._overwrite, self._resumable = overwrite, resume_key is not None
        self._tables: dict[str, dict[str, Any]] = {"transforms": {}, "codebooks": {}, "tensors": {}}
        self._typed: dict[tuple[str, str], Any] = {}  # the transforms and codebooks among them, as the reader has them
        self._digests: dict[tuple[str, str], str] = {}  # of the data of transforms and codebooks
        self._lock_fd = -1
        self._parts: dict[str, list[Any]] = {}  # storage name -> [dtype, shape, offset in the spool]
        self._owned: dict[tuple[str, str], list[str]] = {}  # table and id -> its storage names
        self._tied: dict[str, str] = {}
        self._sources: dict[str, tuple[str, Path | bytes]] = {}
        self._finished = False
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
            self._owned[record["table"], record["id"]] = list(record["parts"])
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
        try:
            self._close()
        except OSError:
            if kind is None:  # otherwise the first error tells more, such as a full disk
                raise
        finally:
            if not self._resumable:
                shutil.rmtree(self._partial, ignore_errors=True)
            self._unlock()
        if kind is None and not self._finished:
            kept = f"what was added stays in {self._partial} for a writer with the same resume_key"
            kept = kept if self._resumable else "nothing was kept"
            raise RuntimeError(f"{self.path} was not written, {kept}: call finish() at the end of the with block")

    def _close(self) -> None:
        if not self._spool.closed:
            with self._spool, self._journal:
                self.commit()

    def _add(
        self, table: str, id: str, entry: dict[str, Any], parts: dict[str, tuple[str, tuple[int, ...], Iterable[Data]]]
    ) -> None:
        """Spools the parts, storage name -> (dtype, shape, chunks), and records the entry once all of them are there."""
        if id in self._tables[table]:
            if table == "tensors":
                raise ValueError(f"the weight {id!r} was added before; `done` names those that a resumed writer has")
            data = b"".join(raw_bytes(_tensor(chunk, id)) for _, _, chunks in parts.values() for chunk in chunks)
            if self._tables[table][id] != entry or self._digests[table, id] != hashlib.sha256(data).hexdigest():
                raise ValueError(f"{table}[{id!r}] was added before with another content")
            return
        record: dict[str, Any] = {"table": table, "id": id, "entry": entry, "parts": {}}
        numbers = {stage[key] for stage in entry.get("stages", ()) for key in NUMBERS if stage.get(key)}
        numbers |= {entry["column_scale"]} if entry.get("column_scale") else set()
        start, digest = self._end, hashlib.sha256()
        for name, (dtype, shape, chunks) in parts.items():
            if name in self._parts or name in record["parts"]:
                raise ValueError(f"the storage name {name!r} is taken")
            record["parts"][name] = [dtype, list(shape), self._end]
            for chunk in chunks:
                tensor = _tensor(chunk, name)
                raw = DTYPE_NAMES[tensor.dtype] == "U8" and (name not in numbers or DTYPES[dtype] == 1)
                if DTYPE_NAMES[tensor.dtype] != dtype and not raw:
                    raise ValueError(f"{name}: expected {dtype} data, got {tensor.dtype}")
                ok = name not in numbers or _finite(tensor, dtype)
                require(ok, "DATA.NON_FINITE", name, "finite numbers")
                if table != "tensors":
                    digest.update(raw_bytes(tensor))
                with naming(self._partial):
                    self._end += self._spool.write(raw_bytes(tensor))
            wanted = math.prod(shape) * DTYPES[dtype]
            if self._end - record["parts"][name][2] != wanted:
                self._end, found = start, self._end - record["parts"][name][2]
                self._spool.truncate(start)
                raise ValueError(f"{name}: expected {wanted} bytes for {dtype} {list(shape)}, got {found}")
        record |= {"end": self._end, "sha256": digest.hexdigest()}
        line = _json(record, f"{table}[{id!r}]") + "\n"
        self._tables[table][id], self._digests[table, id] = entry, record["sha256"]
        self._parts |= record["parts"]
        self._owned[table, id] = list(record["parts"])
        self._pending.append(line)
        if time.monotonic() - self._committed > self.COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes what was added so far survive a crash: the data first, then the journal that speaks of it."""
        with naming(self._partial):
            self._spool.flush()
            os.fsync(self._spool.fileno())
            self._journal.write("".join(self._pending).encode())
            self._journal.flush()
            os.fsync(self._journal.fileno())
        self._pending, self._committed = [], time.monotonic()

    def add_transform(self, id: str, kind: str, size: int, **keys: Any) -> None:
        """Adds a transform [SPEC section 8]: keys factors, signs, seed, or (tensors) matrix, pairs and angles, index; extra."""
        where = f"transforms[{id!r}]"
        typed(Name, id, where)
        entry: dict[str, Any] = {"kind": kind, "size": size}
        parts: dict[str, Any] = {}
        for key, value in keys.items():
            if key in ("matrix", "pairs", "angles", "index") and value is not None:
                data = _tensor(value, f"{where}.{key}")
                entry[key] = f"{id}.{key}"
                parts[entry[key]] = (DTYPE_NAMES[data.dtype], tuple(data.shape), [data])
            elif value is not None:
                entry[key] = value
        check_transform(typed(Transform, entry, where), where)
        for name, dtypes, shape, at in stored_tensors(self._manifest(transforms={id: entry})):
            found, dims, (data,) = parts[name]
            ok = found in dtypes and fits(dims, shape)
            require(ok, "BIND.TENSOR", at, f"{' or '.join(dtypes)} {list(shape)}", f"{found} {list(dims)}")
            if data.is_floating_point():
                require(bool(data.isfinite().all()), "DATA.NON_FINITE", at, "finite numbers")
                continue
            ok = bool((data.cpu().reshape(-1, size).sort(1).values == torch.arange(size)).all())  # in each round
            code = "DATA.PAIRS" if kind == "givens" else "DATA.PERMUTATION"
            require(ok, code, at, f"every integer from 0 to {size - 1} once")
        self._add("transforms", id, entry, parts)

    def add_codebook(
        self,
        id: str,
        values: Data | Sequence[float],
        *,
        origin: dict[str, Any] | None = None,
        stored: bool | None = None,
    ) -> None:
        """Adds a codebook, [entries], [entries, p] or, one per row, [rows, entries, p]; F16, BF16 or F32 if stored, else inline.

        `stored` defaults to what the format requires: large codebooks and codebooks per row go to the payload.
        """
        where = f"codebooks[{id!r}]"
        typed(Name, id, where)
        try:
            numbers = torch.tensor(values, dtype=torch.float64) if isinstance(values, (list, tuple)) else values
        except (TypeError, ValueError):
            raise TQFormatError("SCHEMA.TYPE", f"{where}.values", "expected numbers, as many in each row") from None
        levels = _tensor(numbers, f"{where}.values")  # type: ignore[arg-type]
        ok = 1 <= levels.dim() <= 3
        require(
            ok, "SCHEMA.VALUE", f"{where}.values", "[entries], [entries, p] or [rows, entries, p]", list(levels.shape)
        )
        levels = levels if levels.dtype in (torch.float16, torch.bfloat16) else levels.float()
        require(bool(levels.isfinite().all()), "DATA.NON_FINITE", f"{where}.values", "finite numbers")
        levels = levels[:, None] if levels.dim() == 1 else levels
        entry: dict[str, Any] = {"entries": levels.shape[-2], "dimension": levels.shape[-1]}
        parts: dict[str, Any] = {}
        if levels.dim() == 3:
            entry["rows"] = levels.shape[0]
        if stored or levels.dim() == 3 or levels.numel() > 4096:
            entry["tensor"] = f"{id}.levels"
            parts[entry["tensor"]] = (DTYPE_NAMES[levels.dtype], tuple(levels.shape), [levels])
        else:
            entry["values"] = levels.double().flatten().tolist()
        entry |= {"origin": origin} if origin else {}
        check_codebook(typed(Codebook, entry, where), where)
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

        `codes` is uint8 [tiles, tile_bytes], `scales` and `offsets` are [rows, cols/G]; each may be an iterable of chunks along
        the first dimension, and `scale_dtype` and `offset_dtype` then name the dtypes (F8_E8M0 may come as uint8, too). All
        codes of a stage are taken before its scales, and these before its offsets. `outer_scales` and `outer_offsets` are
        tensors [rows or 1, n], where n divides cols/G. `extra` is recorded once everything has been taken, so an encoder may
        still fill it in while it yields chunks.
        """
        where = f"tensors[{name!r}]"
        typed(Name, name, where)
        entry: dict[str, Any] = {"kind": "quantized", "shape": _dims(shape, f"{where}.shape"), "dtype": dtype}
        entry |= {"effective_bits": 0, "stages": []}
        ok = isinstance(stages, (list, tuple)) and all(isinstance(stage, dict) for stage in stages)
        require(ok, "SCHEMA.TYPE", f"{where}.stages", "a list of dictionaries", None if ok else repr(stages))
        data: dict[str, tuple[str, Iterable[Data]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}  # of the first chunks
        for i, stage in enumerate(stages):
            suffix = f".{i}" if len(stages) > 1 else ""
            given = {"codes": "U8", "scales": stage.get("scale_dtype"), "offsets": stage.get("offset_dtype")}
            other = ("codes", *NUMBERS, "scale_dtype", "offset_dtype")
            record = {k: v for k, v in stage.items() if k not in other and v is not None}
            for key in ("codes", *NUMBERS):
                at = f"{where}.stages[{i}].{key}"
                needed = key in ("codes", "scales")
                require(stage.get(key) is not None or not needed, "SCHEMA.MISSING_FIELD", at, "this key to be given")
                if stage.get(key) is None:
                    continue
                chunks, found = _pieces(stage[key], at), given.get(key)
                record[key] = f"{name}.{key}{suffix}"
                if isinstance(chunks, list) and chunks:
                    tensor = _tensor(chunks[0], at)
                    found, shapes[record[key]] = found or DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
                ok = key in given or (isinstance(chunks, list) and len(chunks) == 1)
                require(ok, "SCHEMA.TYPE", at, "a tensor or array, not chunks")
                data[record[key]] = (str(found), chunks)
            entry["stages"].append(record)
        if column_scale is not None:
            entry["column_scale"] = f"{name}.column_scale"
            found = DTYPE_NAMES[_tensor(column_scale, f"{where}.column_scale").dtype]
            data[entry["column_scale"]] = (found, [column_scale])
        if extra:
            entry["extra"] = extra
        weight = typed(Weight, entry, where)
        manifest = self._manifest_of(name, weight)
        check_weight(weight, where, manifest)
        bits = sum(stage.bits / manifest.codebooks[stage.codebook].dimension for stage in weight.stages or ())
        entry["effective_bits"] = int(bits) if bits == int(bits) else bits
        parts: dict[str, Any] = {}
        coded = {stage.codes: stage for stage in weight.stages or ()}
        for key, dtypes, part_shape, at in stored_tensors(manifest):
            if key not in data:
                continue
            found, chunks = data[key]
            if key in coded:
                book, cols = manifest.codebooks[coded[key].codebook], weight.shape[-1]
                chunks = _checked_codes(chunks, coded[key], book, cols, at)
            expected = " or ".join(dtypes)
            require(found in dtypes, "BIND.TENSOR", at, f"{expected} (scale_dtype or offset_dtype says which)", found)
            if ".outer_" in at:
                require(fits(shapes[key], part_shape), "BIND.TENSOR", at, f"{list(part_shape)}", list(shapes[key]))
                part_shape = shapes[key]
            parts[key] = (found, part_shape, chunks)
        self._add("tensors", name, entry, parts)

    def add_passthrough(
        self, name: str, data: Data | Iterable[Data], *, shape: Iterable[int] | None = None, dtype: str | None = None
    ) -> None:
        """Adds a tensor as it is; an iterable of chunks (of the dtype, or raw uint8) needs `shape` and `dtype`."""
        where = f"tensors[{name!r}]"
        typed(Name, name, where)
        chunks = _pieces(data, f"{where}.data")
        if isinstance(data, (torch.Tensor, np.ndarray)):
            tensor = _tensor(data, f"{where}.data")
            shape = tensor.shape if shape is None else shape
            dtype, chunks = dtype or DTYPE_NAMES[tensor.dtype], [tensor]
        if shape is None or dtype is None:
            raise ValueError(f"{where}: shape and dtype are needed with chunks")
        entry: dict[str, Any] = {
            "kind": "passthrough",
            "shape": _dims(shape, f"{where}.shape"),
            "dtype": dtype,
            "data": name,
        }
        weight = typed(Weight, entry, where)
        check_weight(weight, where, self._manifest_of(name, weight))
        self._add("tensors", name, entry, {name: (dtype, tuple(entry["shape"]), chunks)})

    def tie(self, alias: str, source: str) -> None:
        """Records that the weight `alias` is the weight `source` [TQ-TIE-1]."""
        for name in (alias, source):
            typed(Name, name, f"tied_weights[{name!r}]")
        self._tied[alias] = source

    def add_file(self, source: str | os.PathLike[str] | bytes, role: str, name: str | None = None) -> None:
        """Adds a file, role support, code or document [TQ-REPO-3]; `name` defaults to the source's."""
        path = None if isinstance(source, bytes) else source
        ok = path is None or isinstance(path, (str, os.PathLike))
        require(ok, "SCHEMA.TYPE", "source", "bytes, or the path of a file", repr(source))
        name = Path(path or "").name if name is None else name
        typed(FileName, name, f"files[{name!r}]")
        roles = ("support", "code", "document")
        require(role in roles, "SCHEMA.VALUE", f"files[{name!r}].role", f"one of {', '.join(roles)}", repr(role))
        ok = path is None or Path(path).is_file()
        require(ok, "BIND.MISSING_FILE", f"files[{name!r}]", "the path of a file", path)
        for other in self._sources:
            if other != name and other.lower() == name.lower():
                raise TQFormatError("PATH.COLLISION", f"files[{name!r}]", f"differs from {other!r} in case alone")
        self._sources[name] = (role, source if path is None else Path(path))  # type: ignore[assignment]

    def _manifest(self, **tables: dict[str, Any]) -> Manifest:
        empty: dict[str, dict[str, Any]] = {
            key: {} for key in ("files", "transforms", "codebooks", "tensors", "accounting")
        }
        manifest: Manifest = typed(Manifest, {**self._head, **empty, **tables}, "")
        return manifest

    def _manifest_of(self, name: str, weight: Weight) -> Manifest:
        """A manifest of one weight and what it names."""
        tables: dict[str, dict[str, Any]] = {"transforms": {}, "codebooks": {}}
        for table, key, kind in (("transforms", "transform", Transform), ("codebooks", "codebook", Codebook)):
            for id in {getattr(stage, key) for stage in weight.stages or ()} & self._tables[table].keys():
                if (table, id) not in self._typed:
                    self._typed[table, id] = typed(kind, self._tables[table][id], f"{table}[{id!r}]")
                tables[table][id] = self._typed[table, id]
        return replace(self._empty, tensors={name: weight}, **tables)  # type: ignore[arg-type]

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

    def finish(self, order: Sequence[str] | None = None) -> Path:
        """Writes shards, files and manifest, checks them with the reader, and renames the directory into place.

        `order` names all weights in the order in which the model uses them [TQ-PAY-9], which is otherwise that of the calls.
        What a reader may leave to validators ([TQ-ERR-3]: provenance, signs and their seed, levels and their origin) is
        the caller's word; `python -m conformance check` judges it.
        """
        if self._finished:
            raise RuntimeError(f"{self.path}: finish() was called before")
        names = list(self._tables["tensors"]) if order is None else list(order)
        wrong = sorted(set(names) ^ self.done)
        ok = not wrong and len(names) == len(self.done)
        require(ok, "SCHEMA.REFERENCE", "order", "every weight that was added, once", ", ".join(wrong))
        self._close()
        built = self._partial / "release"
        shutil.rmtree(built, ignore_errors=True)
        built.mkdir()
        tables = {key: dict(sorted(table.items())) for key, table in self._tables.items()}
        tables["tensors"] = {name: tables["tensors"][name] for name in names}
        used = [stage for weight in tables["tensors"].values() for stage in weight.get("stages", ())]
        for key, column in (("transforms", "transform"), ("codebooks", "codebook")):
            unused = tables[key].keys() - {stage[column] for stage in used}
            if unused:
                raise ValueError(f"{key} that no stage names: {', '.join(sorted(unused))} [TQ-MAN-9]")
        files: dict[str, dict[str, Any]] = {}
        parts = {part: (dtype, tuple(shape)) for part, (dtype, shape, _) in self._parts.items()}
        owners = [(key, id) for key, table in tables.items() for id in table if self._owned[key, id]]
        sizes = {owner: sum(nbytes(*parts[part]) for part in self._owned[owner]) for owner in owners}
        shards = split_shards(sizes, self._max_shard_bytes)
        for file, group in zip(shard_names("turboquant_weights", len(shards)), shards, strict=True):
            inside = lay_out([{part: parts[part] for part in self._owned[owner]} for owner in group])
            written = write_safetensors(built / file, inside, self._chunks, self._chunk_size)
            files[file] = {"role": "payload", **written}
        for name, (role, source) in sorted(self._sources.items()):
            content = source if isinstance(source, bytes) else source.read_bytes()
            files[name] = {"role": role, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            _write_synced(built / name, content)
        read = self._manifest(**tables)
        features, weights = features_in_use(read), list(read.tensors.values())
        manifest = {**self._head, "features": features, "files": files, **tables}
        manifest |= {"tied_weights": dict(sorted(self._tied.items()))} if self._tied else {}
        manifest |= {"accounting": accounting(weights, sum(sizes.values()))} | (
            {"extra": self._extra} if self._extra else {}
        )
        _write_synced(built / MANIFEST, manifest_text(manifest).encode())
        open_repo(built, verify=False).close()
        publish(built, self.path, self._overwrite)
        self._finished = True
        shutil.rmtree(self._partial)
        self._unlock()
        return self.path


def _write_synced(path: Path, content: bytes) -> None:
    with naming(path), open(path, "wb") as file:
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
    replace_files(path, manifest, {name: content for name, (_, content) in sources.items()})


def replace_files(path: Path, manifest: dict[str, Any], contents: dict[str, bytes]) -> None:
    """Puts files and a manifest into a finished repository: all are written beside it first, the manifest comes last."""
    Manifest.from_dict(manifest)
    new = {**contents, MANIFEST: manifest_text(manifest).encode()}
    try:
        for name, content in new.items():
            _write_synced(path / f".{name}.new", content)
        for name in new:
            os.replace(path / f".{name}.new", path / name)
    finally:
        for name in new:
            (path / f".{name}.new").unlink(missing_ok=True)
    _sync_directory(path)


def export_safetensors(
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
        names = {name: m.tensors[m.tied_weights.get(name, name)] for name in [*m.tensors, *sorted(m.tied_weights)]}
        floats = {"F16", "BF16", "F32", "F64"}
        kinds = {n: DTYPE_NAMES[dtype] if dtype and w.dtype in floats else w.dtype for n, w in names.items()}
        tensors: Tensors = {name: (kinds[name], w.shape) for name, w in names.items()}
        sizes = {name: nbytes(*tensor) for name, tensor in tensors.items()}

        def data(name: str) -> Iterator[memoryview]:
            tensor = repo.dequantize(name, device, torch_dtype(kinds[name]))
            if kinds[name] != names[name].dtype and not bool(tensor.isfinite().all()):  # what was not may stay so
                ok = torch.equal(tensor.isfinite(), repo.dequantize(name, device).isfinite())
                require(ok, "DATA.NON_FINITE", name, f"weights within {kinds[name]}; choose another type")
            yield raw_bytes(tensor)

        groups = split_shards(sizes, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for shard, group in zip(shard_names("model", len(groups)), groups, strict=True):
            inside = lay_out({name: tensors[name]} for name in group)
            write_safetensors(built / shard, inside, data, metadata={"format": "pt"})  # transformers 4.46 fails without
            weight_map |= dict.fromkeys(group, shard)
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_synced(built / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
        for name, file in m.files.items():
            if file.role == "support" and (repo.path / name).exists():
                content = repo.check_file(name).read_bytes()
                if name == "config.json" and (dtype is not None or b"quantization_config" in content):
                    config = json.loads(content)
                    config = config if dtype is None else _with_dtype(config, str(dtype).removeprefix("torch."))
                    config.pop("quantization_config", None)  # what is written is not quantized
                    content = json.dumps(config, indent=2).encode()
                _write_synced(built / name, content)


def _with_dtype(config: Any, dtype: str) -> Any:
    """A model's configuration, and those of its parts, with another dtype of the weights."""
    if isinstance(config, dict):
        keys = ("dtype", "torch_dtype")
        return {k: dtype if k in keys and isinstance(v, str) else _with_dtype(v, dtype) for k, v in config.items()}
    return config


__all__ = ["RepoWriter", "TQFormatError", "accounting", "add_files", "export_safetensors", "features_in_use", "pack"]
