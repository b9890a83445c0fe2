"""The writer: packing, every setting, the same bytes for the same input, and a crash at any point."""

import errno
import hashlib
import inspect
import io
import json
import os
import random
import re
import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HEAD, edit_manifest, every_setting, new_writer, random_stage, random_symbols, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import oracle
from conformance.__main__ import main as conformance_main
from tqformat import RepoWriter, TQFormatError, add_files, export_safetensors, load_state_dict, open_repo, pack
from tqformat.load_quantized import DTYPES, MANIFEST, torch_dtype, unpack
from tqformat.writer import accounting, features_in_use, shard_names, split_shards

# ------------------------------------------------------------------------------------------------ pack


@st.composite
def streams(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    bits = draw(st.integers(1, 16))
    window = draw(st.integers(bits, 16))
    n = draw(st.integers(-(-window // bits), 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_symbols(rng, draw(st.integers(0, 4)), n, bits, window), bits, window


@settings(max_examples=300, deadline=None, derandomize=True)
@given(streams())
def test_unpack_undoes_pack(stream: tuple[torch.Tensor, int, int]) -> None:
    symbols, bits, window = stream
    n = symbols.shape[1]
    codes = pack(symbols, bits, window)
    assert codes.dtype == torch.uint8 and codes.shape == (len(symbols), -(-n * bits // 8)) and codes.is_contiguous()
    assert torch.equal(unpack(codes, n, bits, window), symbols)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(streams(), st.data())
def test_pack_undoes_unpack(stream: tuple[torch.Tensor, int, int], data: st.DataObject) -> None:
    symbols, bits, window = stream
    n = symbols.shape[1]
    codes = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (3, -(-n * bits // 8)), dtype=np.uint8))
    codes[:, -1] &= 255 >> (-n * bits % 8)
    assert torch.equal(pack(unpack(codes, n, bits, window), bits, window), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_pack_takes_any_integer_dtype(dtype: torch.dtype) -> None:
    for bits in (1, 3, 7):
        symbols = torch.arange(20).reshape(2, 10) % (1 << bits)
        assert torch.equal(pack(symbols.to(dtype), bits), pack(symbols.int(), bits))


def test_pack_rejects_symbols_out_of_range() -> None:
    for bits, bad in ((1, 2), (3, 8), (8, 256), (16, 65536), (4, -1)):
        symbols = torch.zeros(2, 5, dtype=torch.int64)
        symbols[1, 4] = bad
        with pytest.raises(ValueError, match="symbols"):
            pack(symbols, bits)


def test_pack_rejects_what_is_no_trellis() -> None:
    symbols = random_symbols(np.random.default_rng(0), 2, 12, 2, 6)
    assert pack(symbols, 2, 6).shape == (2, 3)
    for place in ((0, 0), (1, 11)):
        broken = symbols.clone()
        broken[place] ^= 1 << 5  # a bit that the neighbour shares
        with pytest.raises(ValueError, match="trellis"):
            pack(broken, 2, 6)


# ------------------------------------------------------------------------------------------------ helpers


def test_shard_names_and_groups() -> None:
    assert shard_names("turboquant_weights", 1) == ["turboquant_weights.safetensors"]
    assert shard_names("x", 2) == ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"]
    assert split_shards({}, 5) == [[]]
    assert split_shards({"a": 3, "b": 2, "c": 9, "d": 0, "e": 1}, 5) == [["a", "b"], ["c"], ["d", "e"]]


def test_accounting_adds_up(settings_repo: Path) -> None:
    with open_repo(settings_repo) as repo:
        m = repo.manifest
        stored = sum(span.end - span.begin for span in repo.spans.values())
        assert m.accounting == accounting(m.tensors.values(), stored)
        assert sorted(features_in_use(m)) == sorted(m.features) == sorted(
            ["trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles", "offsets", "outer_scales",
             "fine_scales", "dense", "givens", "permutation"]
        )  # fmt: skip
        quantized = [w for w in m.tensors.values() if w.kind == "quantized"]
        assert m.accounting["quantized_tensors"] == len(quantized) == 15
        assert m.accounting["original_bytes"] == sum(
            int(np.prod(w.shape)) * DTYPES[w.dtype] for w in m.tensors.values()
        )
        assert m.tensors["vector"].effective_bits == 1 and m.tensors["stages"].effective_bits == 4


# ------------------------------------------------------------------------------------------------ round trips


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def check_with_oracle(path: Path) -> int:
    truth, values = oracle.decode_repo(path), load_state_dict(path)
    for name, entry in truth.items():
        if entry.data is None:
            assert oracle.is_correct(values[name].double().numpy(), entry).all(), name
        else:
            assert values[name].reshape(-1).view(torch.uint8).numpy().tobytes() == entry.data
    return len(truth)


@pytest.mark.parametrize("limit", [1, 700, 5_000_000_000])
def test_every_setting_round_trips(tmp_path: Path, limit: int) -> None:
    with new_writer(tmp_path / "repo", max_shard_bytes=limit) as writer:
        every_setting(writer)
        path = writer.finish()
    assert path == tmp_path / "repo" and list(tmp_path.iterdir()) == [path]
    assert check_with_oracle(path) == 19
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) == 1 if limit > 10**6 else shards == shard_names("turboquant_weights", len(shards))
    assert limit > 1 or len(shards) == 25  # 6 entries of tables that store something, 19 weights
    owners: dict[str, set[str]] = {}
    for shard in shards:
        for part in header(path / shard):
            if not part.endswith(".levels"):  # a codebook and a weight may share a name
                owners.setdefault(part.split(".")[0], set()).add(shard)
    assert all(len(files) == 1 for files in owners.values())  # [TQ-SHARD-2]


def test_what_was_written_is_what_was_given(tmp_path: Path) -> None:
    """The packed symbols, scales and levels come back exactly: with `identity`, values are levels times scales."""
    rng = np.random.default_rng(1)
    symbols = torch.from_numpy(rng.integers(0, 8, (7, 30), dtype=np.int32))
    levels, scales = torch.linspace(-2, 2, 8), torch.from_numpy(rng.uniform(0, 3, (7, 3))).bfloat16()
    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", levels)
        stage = {"bits": 3, "codebook": "c", "transform": "i", "vector_length": 10, "codes": pack(symbols, 3)}
        writer.add_quantized("w", (7, 30), "F32", [{**stage, "scales": scales}])
        path = writer.finish()
    want = (levels[symbols].reshape(7, 3, 10) * scales.float()[:, :, None]).reshape(7, 30)
    assert torch.equal(load_state_dict(path)["w"], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    if dtype == "F8_E8M0" and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no F8_E8M0")
    data = np.random.default_rng(2).integers(0, 2 if dtype == "BOOL" else 256, 24 * DTYPES[dtype], dtype=np.uint8)
    tensor = torch.from_numpy(data).view(torch_dtype(dtype)).reshape(2, 3, 4)
    with new_writer(tmp_path / "repo") as writer:
        writer.add_passthrough("whole", tensor)
        writer.add_passthrough("raw", iter([data[:5], data[5:]]), shape=[2, 3, 4], dtype=dtype)
        writer.add_passthrough("scalar", tensor[0, 0, 0])
        path = writer.finish()
    values = load_state_dict(path)
    for name, want in (("whole", tensor), ("raw", tensor), ("scalar", tensor[0, 0, 0])):
        assert values[name].dtype == want.dtype and values[name].shape == want.shape
        assert values[name].reshape(-1).view(torch.uint8).tolist() == want.reshape(-1).view(torch.uint8).tolist()


def test_chunks_equal_whole_tensors(tmp_path: Path) -> None:
    stage = random_stage(np.random.default_rng(3), [9, 16], bits=3, codebook="c", transform="i", vector_length=8)

    def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from tensor.split(2)

    paths = []
    for i, chunked in enumerate((False, True)):
        with new_writer(tmp_path / str(i)) as writer:
            writer.add_transform("i", "identity", 1)
            writer.add_codebook("c", torch.linspace(-1, 1, 8))
            parts = {key: pieces(stage[key]) if chunked else stage[key] for key in ("codes", "scales")}
            writer.add_quantized("w", [9, 16], "BF16", [{**stage, **parts, "scale_dtype": "F32" if chunked else None}])
            norm = torch.arange(10.0)
            writer.add_passthrough("n", pieces(norm) if chunked else norm, shape=[10], dtype="F32")
            paths.append(writer.finish())
    assert contents(paths[0]) == contents(paths[1])


def test_codes_are_taken_before_scales(tmp_path: Path) -> None:
    """An encoder may yield codes and keep the scales it finds on the way."""
    found: list[torch.Tensor] = []

    def codes() -> Iterator[torch.Tensor]:
        for k in range(4):
            found.append(torch.full((2, 1), float(k)))
            yield torch.full((2, 1), k, dtype=torch.uint8)

    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [0.0, 1.0])
        stage = {"bits": 1, "codebook": "c", "transform": "i", "codes": codes(), "scales": found, "scale_dtype": "F32"}
        writer.add_quantized("w", [8, 8], "F32", [{**stage, "scales": (s for s in found)}])
        path = writer.finish()
    assert load_state_dict(path)["w"][:, 0].tolist() == [0, 0, 1, 1, 0, 0, 3, 3]


def odd_and_even(writer: RepoWriter) -> None:
    """Weights whose parts have lengths that are multiples of 4, and others; one of them is wanted last, and added first."""
    rng = np.random.default_rng(11)
    writer.add_transform("h", "hadamard", 8, factors=[8], signs="00")
    writer.add_codebook("c", torch.linspace(-1, 1, 8))
    writer.add_codebook("odd", torch.linspace(-1, 1, 7).half(), stored=True)
    stage = {"bits": 3, "codebook": "c", "transform": "h", "scale_dtype": torch.float16}
    even = {**stage, "vector_length": 4, "scales": "I8", "outer_scales": (8, 1)}
    writer.add_quantized("last", [8, 32], "F32", [random_stage(rng, [8, 32], **even)])
    writer.add_quantized("first", [8, 32], "F32", [random_stage(rng, [8, 32], **stage)])
    writer.add_quantized(
        "odd", [3, 8], "F32", [random_stage(rng, [3, 8], **{**stage, "codebook": "odd", "entries": 7})]
    )
    writer.add_passthrough("bias", torch.ones(5).half())
    writer.add_passthrough("norm", torch.ones(6))


@pytest.mark.parametrize("limit", [400, 5_000_000_000])
def test_the_layout_of_a_file(tmp_path: Path, limit: int) -> None:
    """Aligned, the parts of a weight together, weights in the order that the model uses [TQ-PAY-8, TQ-PAY-9]."""
    order = ["first", "bias", "odd", "norm", "last"]
    with new_writer(tmp_path / "repo", max_shard_bytes=limit) as writer:
        odd_and_even(writer)
        with pytest.raises(TQFormatError, match=r"order: expected every weight .* got last"):
            writer.finish(order[:-1])
        with pytest.raises(TQFormatError, match="order: expected every weight that was added, once"):
            writer.finish([*order, "norm"])
        path = writer.finish(order)
    assert check_with_oracle(path) == 5
    assert list(json.loads((path / MANIFEST).read_text())["tensors"]) == order
    for file in path.glob("*.safetensors"):
        begin = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert begin % 64 == 0
        for name, entry in header(file).items():
            assert (begin + entry["data_offsets"][0]) % DTYPES[entry["dtype"]] == 0, name
    if limit > 400:
        want = ["first.scales", "first.codes", "norm", "last.outer_scales", "last.codes", "last.scales"]
        want += ["odd.levels", "bias", "odd.scales", "odd.codes"]  # 14, 10, 6 and 9 bytes
        assert list(header(path / "turboquant_weights.safetensors")) == want


@pytest.mark.parametrize("chunk_size", [4096, 5000, 1 << 22, None])
def test_chunks_are_digests_of_the_file(tmp_path: Path, chunk_size: int | None) -> None:
    with new_writer(tmp_path / "repo", chunk_size=chunk_size) as writer:
        writer.add_passthrough("a", torch.arange(3000.0))
        writer.add_passthrough("b", (torch.arange(k, k + 100.0) for k in range(37)), shape=[3700], dtype="F32")
        writer.add_passthrough("c", torch.empty(0))
        path = writer.finish()
    (file,) = path.glob("*.safetensors")
    data, listed = file.read_bytes(), json.loads((path / MANIFEST).read_text())["files"][file.name]
    digests = (
        [hashlib.sha256(data[k : k + chunk_size]).hexdigest() for k in range(0, len(data), chunk_size)]
        if chunk_size
        else None
    )
    assert listed["sha256"] == hashlib.sha256(data).hexdigest() and listed["size"] == len(data)
    assert (listed.get("chunk_size"), listed.get("chunks")) == (chunk_size, digests)
    assert load_state_dict(path)["a"].tolist() == list(range(3000))


def test_a_file_that_ends_with_a_chunk_has_no_empty_one(tmp_path: Path) -> None:
    with new_writer(tmp_path / "repo", chunk_size=4096) as writer:
        writer.add_passthrough("a", torch.zeros(8192 - 128, dtype=torch.uint8))  # behind a header of 128 bytes
        path = writer.finish()
    listed = json.loads((path / MANIFEST).read_text())["files"]["turboquant_weights.safetensors"]
    assert listed["size"] == 8192 and len(listed["chunks"]) == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_small_scales_and_offsets_come_back_exactly(tmp_path: Path, chunked: bool) -> None:
    """W = (scale * outer) * level + offset * outer, computed in NumPy; F8_E8M0 may come as bytes [TQ-NUM-8, TQ-NUM-9]."""
    rng = np.random.default_rng(12)
    symbols = torch.from_numpy(rng.integers(0, 16, (6, 24), dtype=np.int32))
    exponents = rng.integers(120, 130, (6, 6), dtype=np.uint8)
    offsets = rng.integers(-128, 128, (6, 6)).astype(np.int8)
    outer, lower = rng.normal(size=(6, 2)).astype(np.float32), rng.normal(size=(1, 3)).astype(np.float16)

    def part(array: Any) -> Any:
        return iter(torch.from_numpy(array).split(4)) if chunked else array

    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 24)  # "fine_scales": G is 4
        writer.add_codebook("c", torch.arange(16.0))
        stage = {"bits": 4, "codebook": "c", "transform": "i", "vector_length": 4, "codes": pack(symbols, 4)}
        stage |= {"scales": part(exponents), "scale_dtype": "F8_E8M0", "outer_scales": outer}
        stage |= {"offsets": part(offsets), "offset_dtype": "I8", "outer_offsets": lower}
        writer.add_quantized("w", [6, 24], "F32", [stage])
        path = writer.finish()
    scales = np.exp2(exponents.astype(np.float32) - 127) * np.repeat(outer, 3, 1)
    added = offsets.astype(np.float32) * np.repeat(lower.astype(np.float32), 2, 1)
    want = symbols.numpy().astype(np.float32) * np.repeat(scales, 4, 1) + np.repeat(added, 4, 1)
    with open_repo(path) as repo:
        assert repo.manifest.features == ("offsets", "outer_scales", "fine_scales")
        assert np.array_equal(repo.dequantize("w").numpy(), want)
        assert repo.spans["w.scales"].dtype == "F8_E8M0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codebooks_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    levels = torch.linspace(-1.3, 1.7, 4).to(dtype)
    with new_writer(tmp_path / "repo") as writer:
        writer.add_transform("p", "permutation", 4, index=np.array([2, 0, 3, 1], np.int32))
        writer.add_codebook("c", levels, stored=True)
        stage = {"bits": 2, "codebook": "c", "transform": "p", "codes": pack(torch.arange(4)[None].int(), 2)}
        writer.add_quantized("w", [1, 4], "F32", [{**stage, "scales": torch.ones(1, 1)}])
        path = writer.finish()
    with open_repo(path) as repo:
        assert repo.dequantize("w")[0].tolist() == [levels[k].item() for k in (1, 3, 0, 2)]  # y[i] is at index[i]
        assert torch_dtype(repo.spans["c.levels"].dtype) == dtype


# ------------------------------------------------------------------------------------------------ determinism


def calls(seed: int) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls of every_setting, recorded."""
    recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **keys: recorded.append((name, args, keys))

    every_setting(Recorder(), seed)  # type: ignore[arg-type]
    return recorded


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    results = []
    for i in range(3):
        everything = [
            *calls(0),
            ("add_file", (b"{}", "support", "config.json"), {}),
            ("add_file", (b"x", "document", "A"), {}),
        ]
        if i:  # tables before the weights that use them, otherwise any order
            random.Random(i).shuffle(everything)
            everything.sort(key=lambda call: call[0] not in ("add_codebook", "add_transform"))
        with new_writer(tmp_path / str(i), max_shard_bytes=900) as writer:
            for name, args, keys in everything:
                getattr(writer, name)(*args, **keys)
            order = sorted(writer.done, key=lambda name: (len(name), name))
            results.append(contents(writer.finish(order)))
    assert results[0] == results[1] == results[2] and len(results[0]) > 5


# ------------------------------------------------------------------------------------------------ resuming


def names(recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> set[str]:
    return {args[0] for name, args, _ in recorded if name in ("add_quantized", "add_passthrough")}


def apply(writer: RepoWriter, recorded: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
    for name, args, keys in recorded:
        getattr(writer, name)(*args, **keys)


@contextmanager
def stopped(path: Path, key: str = "job") -> Iterator[RepoWriter]:
    """The writer of a job that somebody interrupts before finish()."""
    with suppress(KeyboardInterrupt), new_writer(path, resume_key=key) as writer:
        yield writer
        raise KeyboardInterrupt


def test_resume(tmp_path: Path) -> None:
    recorded = calls(0)
    with new_writer(tmp_path / "whole") as writer:
        apply(writer, recorded)
        whole = contents(writer.finish())

    with stopped(tmp_path / "repo") as writer:
        assert writer.done == set()
        apply(writer, recorded[:16])
        done = writer.done
    assert done == names(recorded[:16]) and len(done) == 5 and not (tmp_path / "repo").exists()

    with new_writer(tmp_path / "repo", resume_key="job") as writer:
        assert writer.done == done
        rest = [call for call in recorded if call[1][0] not in done]
        apply(writer, rest)
        assert contents(writer.finish()) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo", "whole"]


def test_a_resumed_writer_takes_tables_again_but_no_weight_twice(tmp_path: Path) -> None:
    with stopped(tmp_path / "repo") as writer:
        apply(writer, calls(0))
    with new_writer(tmp_path / "repo", resume_key="job") as writer:
        size = (tmp_path / ".repo.partial" / "spool").stat().st_size
        weights = ("add_quantized", "add_passthrough")
        apply(writer, [call for call in calls(0) if call[0] not in weights])
        with pytest.raises(ValueError, match="was added before"):
            apply(writer, [call for call in calls(0) if call[0] in weights])
        assert (tmp_path / ".repo.partial" / "spool").stat().st_size == size
        assert check_with_oracle(writer.finish()) == 19


@pytest.mark.parametrize("second", ["another job", None])
def test_another_job_starts_anew(tmp_path: Path, second: str | None) -> None:
    with stopped(tmp_path / "repo") as writer:
        writer.add_passthrough("old", torch.ones(3))
    with new_writer(tmp_path / "repo", resume_key=second) as writer:
        assert writer.done == set()
        writer.add_passthrough("new", torch.ones(3))
        assert load_state_dict(writer.finish()).keys() == {"new"}


def test_leaving_without_finish_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"nothing was kept: call finish\(\)"),
        new_writer(tmp_path / "repo") as writer,
    ):
        writer.add_passthrough("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(RuntimeError, match=r"resume_key: call finish\(\)"),
        new_writer(tmp_path / "repo", resume_key="job") as writer,
    ):
        writer.add_passthrough("a", torch.ones(3))
    with new_writer(tmp_path / "repo", resume_key="job") as writer:
        assert writer.done == {"a"}
        writer.finish()
        with pytest.raises(RuntimeError, match="before"):
            writer.finish()
    assert load_state_dict(tmp_path / "repo")["a"].tolist() == [1.0] * 3


def test_nothing_is_left_without_a_resume_key(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), new_writer(tmp_path / "repo") as writer:
        writer.add_passthrough("a", torch.ones(3))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 20, 40])
def test_a_half_written_journal_line_is_ignored(tmp_path: Path, cut: int) -> None:
    with stopped(tmp_path / "repo") as writer:
        writer.add_passthrough("first", torch.arange(5.0))
        writer.add_passthrough("zweite Gewichtsmatrix \u00e4\u00f6\u00fc\U0001f600" * 3, torch.arange(7.0))
    journal = tmp_path / ".repo.partial" / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert len(lines) == 4
    with stopped(tmp_path / "repo") as writer:
        assert writer.done == {"first"}
        writer.add_passthrough("second", torch.arange(9.0))
    with new_writer(tmp_path / "repo", resume_key="job") as writer:
        assert writer.done == {"first", "second"}
        state = load_state_dict(writer.finish())
    assert torch.equal(state["first"], torch.arange(5.0)) and torch.equal(state["second"], torch.arange(9.0))


def test_a_journal_cut_anywhere_is_no_obstacle(tmp_path: Path) -> None:
    with stopped(tmp_path / "repo") as writer:
        for k in range(3):
            writer.add_passthrough(f"w\u20ac{k}", torch.full((4,), float(k)))
    journal = tmp_path / ".repo.partial" / "journal.jsonl"
    whole, spool = journal.read_bytes(), (tmp_path / ".repo.partial" / "spool").read_bytes()
    for length in (*range(0, len(whole), 7), len(whole)):
        (tmp_path / ".repo.partial").mkdir(exist_ok=True)
        journal.write_bytes(whole[:length])
        (tmp_path / ".repo.partial" / "spool").write_bytes(spool)
        with stopped(tmp_path / "repo") as writer:
            assert len(writer.done) == max(0, whole[:length].count(b"\n") - 1)


def test_a_lost_spool_is_never_taken_for_zeros(tmp_path: Path) -> None:
    with stopped(tmp_path / "repo") as writer:
        writer.add_passthrough("a", torch.ones(1000))
    (tmp_path / ".repo.partial" / "spool").write_bytes(b"")
    try:
        with stopped(tmp_path / "repo") as writer:
            assert writer.done == set()
    except OSError as error:
        assert "start again" in str(error)


# ------------------------------------------------------------------------------------------------ the example


def test_the_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`help(tqformat.RepoWriter)` shows a quantizer that runs as it stands."""
    text = f"{inspect.getdoc(RepoWriter)}\n"
    blocks = [block for block in re.findall(r"(?:^ {4,}.*\n|^ *\n)+", text, re.MULTILINE) if "RepoWriter(" in block]
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(blocks[0]), scope)
    with open_repo("my-model-4bit") as repo:
        assert repo.manifest.base_model == {"id": "org/model"} and "load_quantized.py" in repo.manifest.files
        for name, weight in scope["weights"].items():
            error = (repo.dequantize(name).float() - weight).abs() / weight.abs().amax(-1, keepdim=True)
            assert error.max() < 1 / 15 + 2**-7, name  # half a step between the levels, and BF16's rounding
    assert conformance_main(["check", "my-model-4bit", "--level", "L2"]) == 0


# ------------------------------------------------------------------------------------------------ full disks


class FullDisk(io.BufferedWriter):
    """A file on a disk that has room for 100 bytes more."""

    room = 100

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        self.flush()
        return super().write(data)

    def flush(self) -> None:
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().flush()


def test_a_full_disk_names_the_target(tmp_path: Path) -> None:
    """Not the source of the weights; and what fails on the way out does not hide it."""
    with pytest.raises(OSError, match="No space left on device") as caught, new_writer(tmp_path / "repo") as w:
        w._spool = FullDisk(io.FileIO(w._partial / "spool", "a"))
        w.add_passthrough("a", torch.ones(5))
        w.add_passthrough("b", torch.ones(500))
    assert caught.value.filename == str(tmp_path / ".repo.partial") and caught.traceback[-1].name == "flush"
    assert "add_passthrough" in [entry.name for entry in caught.traceback] and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ crashes

DRIVER = """
import os, shutil, signal, sys
import torch
from tqformat import RepoWriter, writer

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def strike(when, owner, name, count=1):
    original, left = getattr(owner, name), [count]
    def wrapped(*args, **keys):
        left[0] -= 1
        if left[0] == 0 and when == "before":
            die()
        result = original(*args, **keys)
        if left[0] == 0:
            die()
        return result
    setattr(owner, name, wrapped)

def job(point, target, overwrite):
    RepoWriter.COMMIT_SECONDS = 0
    head = {"base_model": {"id": "m"}, "quantization": {"method": "m", "bits": 1}, "generator": "g"}
    options = {"max_shard_bytes": 100, "resume_key": "k", "overwrite": overwrite}
    with RepoWriter(target, loader_kind="text-generation", **head, **options) as w:
        if point.startswith("add"):
            strike(point[3:-1], RepoWriter, "commit", int(point[-1]))
        def chunks():
            yield torch.ones(10)
            w._spool.flush()
            die()
        for k in range(5):
            if f"w{k}" not in w.done:
                data = chunks() if point == "chunk" and k == 3 else torch.full((20,), float(k) + 1)
                w.add_passthrough(f"w{k}", data, shape=[20], dtype="F32")
        w.add_file(b"{}", "support", "config.json")
        if point.startswith("shard"):
            strike("after", writer, "write_safetensors", int(point[-1]))
        elif point == "manifest":
            strike("after", writer, "_write_synced", 2)
        elif point == "publish":
            strike("before", writer, "publish")
        elif point == "rename":
            strike("after", os, "rename")
        elif point == "exchange":
            strike("after", writer, "_exchange")
        elif point == "sweep":
            strike("before", writer.shutil, "rmtree", 2)
        w.finish()

def child(*arguments):
    sys.stderr.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        job(*arguments)
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)

root = sys.argv[1]
for name in sorted(os.listdir(root)):
    point, overwrite = name.split("-")
    place = os.path.join(root, name)
    target = os.path.join(place, "repo")
    killed = child(point, target, overwrite == "True")
    shutil.copytree(place, os.path.join(root, name + "-killed"))
    again = child("", target, overwrite == "True") if overwrite == "True" or not os.path.exists(target) else None
    print(name, killed, again)
"""
POINTS = [
    "addbefore1",
    "addafter1",
    "addbefore3",
    "addafter4",
    "chunk",
    "shard1",
    "shard3",
    "manifest",
    "publish",
    "sweep",
    "none",
]
KILLS = [f"{p}-{o}" for o in (False, True) for p in [*POINTS, "exchange" if o else "rename"]]


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Every kill of the list, each in its own process and directory; the exit codes of it and of its rerun."""
    root = tmp_path_factory.mktemp("kills")
    for kill in KILLS:
        (root / kill).mkdir()
        if kill.endswith("True"):
            with new_writer(root / kill / "repo") as writer:
                writer.add_passthrough("old", torch.zeros(3))
                writer.finish()
    done = run_python("-c", DRIVER, str(root), cwd=root)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return root, {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forked")
@pytest.mark.parametrize("kill", KILLS)
def test_kill(kills: tuple[Path, dict[str, list[str]]], kill: str) -> None:
    """After kill -9 the target is absent (or the old one), or complete; a rerun completes it and sweeps up."""
    root, codes = kills
    point, overwrite = kill.split("-")
    complete = {f"w{k}": [k + 1.0] * 20 for k in range(5)}

    def state(place: str) -> dict[str, list[float]] | None:
        target = root / place / "repo"
        return {name: t.tolist() for name, t in load_state_dict(target).items()} if target.exists() else None

    first, second = codes[kill]
    assert first == ("0" if point == "none" else str(-signal.SIGKILL)) and second in ("0", "None")
    before = {"old": [0.0] * 3} if overwrite == "True" else None
    assert state(f"{kill}-killed") == (complete if point in ("rename", "exchange", "sweep", "none") else before)
    assert {p.name for p in (root / f"{kill}-killed").iterdir()} <= {"repo", ".repo.partial", ".repo.lock"}
    assert state(kill) == complete
    if second == "0":
        assert [p.name for p in (root / kill).iterdir()] == ["repo"]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RepoWriter]:
    with suppress(RuntimeError), new_writer(tmp_path / "repo") as w:  # most of the tests do not get to finish()
        w.add_transform("i", "identity", 1)
        w.add_codebook("c", [-1.0, 1.0])
        yield w


def good() -> dict[str, Any]:
    return {
        "bits": 1,
        "codebook": "c",
        "transform": "i",
        "codes": torch.zeros(4, 1, dtype=torch.uint8),
        "scales": torch.ones(4, 1),
    }


OUTER = {"outer_scales": torch.ones(4, 1)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "codes of another dtype": ({"codes": torch.zeros(4, 1)}, "codes"),
    "too few codes": ({"codes": torch.zeros(3, 1, dtype=torch.uint8)}, "expected 4 bytes"),
    "too many codes": ({"codes": torch.zeros(4, 2, dtype=torch.uint8)}, "expected 4 bytes"),
    "a padding bit": ({"tile": [1, 4], "codes": torch.full((8, 1), 16).byte()}, r"PACK.PADDING.*stages\[0\].codes"),
    "scales in double": ({"scales": torch.ones(4, 1).double()}, "F16 or BF16 or F32"),
    "integer scales": ({"scales": torch.ones(4, 1).int()}, "F16 or BF16 or F32"),
    "too few scales": ({"scales": torch.ones(3, 1)}, "expected 16 bytes"),
    "chunks of scales without a dtype": ({"scales": iter([torch.ones(4, 1)])}, "None"),
    "scales that are not finite": ({"scales": torch.full((4, 1), float("inf"))}, "DATA.NON_FINITE"),
    "offsets that are not finite": ({"offsets": torch.full((4, 1), float("nan"))}, "DATA.NON_FINITE"),
    "8-bit scales alone": ({"scales": torch.ones(4, 1).byte()}, "expected F16 or BF16 or F32"),
    "8-bit scales of two dtypes": ({"scales": torch.ones(4, 1).char(), "scale_dtype": "U8", **OUTER}, "expected U8 data"),
    "an exponent that is not finite": ({"scales": torch.full((4, 1), 255).byte(), "scale_dtype": "F8_E8M0", **OUTER}, "NON_FINITE"),
    "a float that is not finite": ({"scales": torch.full((4, 1), 127).byte(), "scale_dtype": "F8_E4M3", **OUTER}, "NON_FINITE"),
    "outer scales of float scales": (OUTER, "expected U8 or I8 or F8_E4M3 or F8_E8M0"),
    "too many outer scales": ({"scales": torch.ones(4, 1).byte(), "outer_scales": torch.ones(4, 2)}, "BIND.TENSOR"),
    "too few outer scales": ({"scales": torch.ones(4, 1).byte(), "outer_scales": torch.ones(2, 1)}, "BIND.TENSOR"),
    "outer offsets alone": ({"outer_offsets": torch.ones(4, 1)}, "SCHEMA.MISSING_FIELD"),
    "chunks of outer scales": ({"scales": torch.ones(4, 1).byte(), "outer_scales": iter([torch.ones(4, 1)])}, "not chunks"),
    "unknown codebook": ({"codebook": "d"}, "SCHEMA.REFERENCE"),
    "unknown transform": ({"transform": "d"}, "SCHEMA.REFERENCE"),
    "unknown key": ({"colour": "red"}, "SCHEMA.UNKNOWN_FIELD"),
    "no bits": ({"bits": 0}, "SCHEMA.VALUE"),
    "too many bits": ({"bits": 9}, "SCHEMA.VALUE"),
    "window below bits": ({"bits": 2, "window": 1}, "SCHEMA.VALUE"),
    "codebook too small for the window": ({"window": 2}, "SCHEMA.VALUE"),
    "vector_length that does not divide": ({"vector_length": 3}, "SCHEMA.VALUE"),
    "tile that does not divide": ({"tile": [3, 8]}, "SCHEMA.VALUE"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_stages_are_refused_and_leave_no_trace(writer: RepoWriter, kind: str) -> None:
    change, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        writer.add_quantized("w", [4, 8], "F32", [{**good(), **change}])
    assert writer.done == set()
    writer.add_quantized("w", [4, 8], "F32", [good()])
    assert torch.equal(load_state_dict(writer.finish())["w"], -torch.ones(4, 8))


def test_a_symbol_without_an_entry_is_refused(writer: RepoWriter) -> None:
    writer.add_codebook("ternary", [-1.0, 0.0, 1.0])
    codes = pack(torch.tensor([[0, 1, 2, 0], [2, 2, 2, 3]]), 2)
    stage = {"bits": 2, "codebook": "ternary", "transform": "i", "codes": codes, "scales": torch.ones(2, 1)}
    with pytest.raises(TQFormatError, match=r"PACK.CODE_RANGE.*stages\[0\].codes: expected symbols below 3, got 3"):
        writer.add_quantized("w", [2, 4], "F32", [stage])
    assert writer.done == set()


@pytest.mark.parametrize(
    ("shape", "dtype"), [([8], "F32"), ([4, 8], "I32"), ([4, 8], "F64"), ([4, -8], "F32"), ([4, 0], "F32")]
)
def test_bad_weights_are_refused(writer: RepoWriter, shape: list[int], dtype: str) -> None:
    with pytest.raises(TQFormatError, match="SCHEMA"):
        writer.add_quantized("w", shape, dtype, [good()])


WRONG: dict[str, Any] = {  # what a caller may get wrong -> the place that the error names
    "writer: base_model.id": ("", {"base_model": {}}),
    "writer: base_model": ("", {"base_model": "org/model"}),
    "writer: quantization.method": ("", {"quantization": {"bits": 4}}),
    "writer: quantization.bits": ("", {"quantization": {"method": "mine"}}),
    "writer: quantization, extra": ("", {"quantization": {"method": "mine", "bits": 4, "extra": {"x": np.float32(1)}}}),
    "writer: loader_kind": ("", {"loader_kind": ["text-generation"]}),
    "writer: generator": ("", {"generator": None}),
    "writer: extra": ("", {"extra": [1]}),
    "writer: max_shard_bytes": ("", {"max_shard_bytes": "5G"}),
    "writer: chunk_size": ("", {"chunk_size": 4095}),
    "writer: resume_key": ("", {"resume_key": {"a": 1}}),
    "writer: path": ("", {"path": None}),
    "transforms['t'].size": ("add_transform", ("t", "identity", "1")),
    "transforms['t'].kind": ("add_transform", ("t", "fourier", 1)),
    "transforms['t'].colour": ("add_transform", ("t", "identity", 1), {"colour": torch.ones(1)}),
    "transforms['t'].matrix": ("add_transform", ("t", "dense", 2), {"matrix": [[1, 0], [0, 1]]}),
    "transforms['t'].matrix: shape": ("add_transform", ("t", "dense", 2), {"matrix": torch.ones(3, 3)}),
    "transforms['t'].pairs": ("add_transform", ("t", "givens", 2), {"pairs": torch.ones(1, 1, 2), "angles": torch.ones(1, 1)}),
    "transforms['t'].index": ("add_transform", ("t", "permutation", 2), {"index": torch.ones(2).int()}),
    "transforms['t'].index: dtype": ("add_transform", ("t", "permutation", 2), {"index": torch.arange(2)}),
    "transforms['t'].matrix: nan": ("add_transform", ("t", "dense", 2), {"matrix": torch.full((2, 2), float("nan"))}),
    "transforms['t'].pairs: twice": ("add_transform", ("t", "givens", 2), {"pairs": torch.zeros(1, 1, 2).int(), "angles": torch.ones(1, 1)}),
    "transforms['../t']": ("add_transform", ("../t", "identity", 1)),
    "transforms[[]]": ("add_transform", ([], "identity", 1)),
    "codebooks['b'].values: text": ("add_codebook", ("b", ["a", "b"])),
    "codebooks['b'].values: ragged": ("add_codebook", ("b", [[1.0], [1.0, 2.0]])),
    "codebooks['b'].values: rank": ("add_codebook", ("b", torch.tensor(1.0))),
    "codebooks['b'].values: nan": ("add_codebook", ("b", [1.0, float("nan")])),
    "codebooks['b'].values: beyond F32": ("add_codebook", ("b", [1.0, 1e300]), {"stored": True}),
    "codebooks['b'].values: None": ("add_codebook", ("b", None)),
    "codebooks['b'].values: complex": ("add_codebook", ("b", torch.ones(2, dtype=torch.complex64))),
    "codebooks['b'].origin": ("add_codebook", ("b", [1.0]), {"origin": "paper"}),
    "tensors['w'].stages: dict": ("add_quantized", ("w", [4, 8], "F32", good())),
    "tensors['w'].stages: text": ("add_quantized", ("w", [4, 8], "F32", ["codes"])),
    "tensors['w'].stages: None": ("add_quantized", ("w", [4, 8], "F32", None)),
    "tensors['w'].stages[0].codes": ("add_quantized", ("w", [4, 8], "F32", [{"bits": 1}])),
    "tensors['w'].stages[0].bits": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "bits": "1"}])),
    "tensors['w'].stages[0].bits: none": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "bits": None}])),
    "tensors['w'].stages[0].codebook": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "codebook": [1]}])),
    "tensors['w'].stages[0].colour": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "colour": torch.ones(1)}])),
    "tensors['w'].stages[0].scales": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "scales": "ones"}])),
    "tensors['w'].stages[0].codes: list": ("add_quantized", ("w", [4, 8], "F32", [{**good(), "codes": [0, 0, 0, 0]}])),
    "tensors['w'].column_scale": ("add_quantized", ("w", [4, 8], "F32", [good()], [1.0] * 8)),
    "tensors['w'].shape": ("add_quantized", ("w", 32, "F32", [good()])),
    "tensors['w'].shape: floats": ("add_quantized", ("w", [4.0, 8.0], "F32", [good()])),
    "tensors['w'].dtype": ("add_quantized", ("w", [4, 8], torch.float32, [good()])),
    "tensors['w'].dtype: name": ("add_quantized", ("w", [4, 8], "float32", [good()])),
    "tensors[7]": ("add_quantized", (7, [4, 8], "F32", [good()])),
    "tensors['p'].data": ("add_passthrough", ("p", None)),
    "tensors['p'].data: text": ("add_passthrough", ("p", "ones"), {"shape": [1], "dtype": "F32"}),
    "tensors['p'].dtype": ("add_passthrough", ("p", iter([])), {"shape": [1], "dtype": "float"}),
    "tensors['p'].shape": ("add_passthrough", ("p", iter([])), {"shape": "ab", "dtype": "F32"}),
    "tied_weights[None]": ("tie", (None, "w")),
    "tied_weights[['w']]": ("tie", ("alias", ["w"])),
    "files['config.json']": ("add_file", (Path("nowhere") / "config.json", "support")),
    "files['x'].role": ("add_file", (b"", "payload", "x")),
    "files['x'].role: list": ("add_file", (b"", ["support"], "x")),
    "files['']": ("add_file", (b"", "support")),
    "files[5]": ("add_file", (b"", "support", 5)),
    "source": ("add_file", (5, "support", "x")),
}  # fmt: skip


@pytest.mark.parametrize("place", WRONG)
def test_wrong_arguments_are_told_with_their_place(writer: RepoWriter, tmp_path: Path, place: str) -> None:
    method, arguments, *keys = WRONG[place]
    with pytest.raises(ValueError) as caught:
        if method:
            getattr(writer, method)(*arguments, **(keys[0] if keys else {}))
        else:
            new_writer(**{"path": tmp_path / "other", **arguments})
    where = place.removeprefix("writer: ").split(": ")[0]
    assert isinstance(caught.value, TQFormatError) and where in caught.value.where, caught.value
    assert "(?" not in str(caught.value) and "expected" in caught.value.message  # no regular expression
    assert writer.done == set() and not (tmp_path / ".other.partial").exists()
    writer.add_quantized("w", [4, 8], "F32", [good()])
    assert torch.equal(load_state_dict(writer.finish())["w"], -torch.ones(4, 8))


def test_wrong_symbols() -> None:
    for symbols in (torch.ones(2, 3), torch.ones(3, dtype=torch.int32), [[1]]):
        with pytest.raises(ValueError, match="symbols"):
            pack(symbols, 2)  # type: ignore[arg-type]
    assert torch.equal(pack(np.ones((2, 3), dtype=np.int32), 2), pack(torch.ones(2, 3).int(), 2))  # type: ignore[arg-type]


def test_an_array_without_dimensions_keeps_none(writer: RepoWriter) -> None:
    writer.add_passthrough("p", np.array(7))
    writer.add_quantized("w", [4, 8], "F32", [good()])
    state = load_state_dict(writer.finish())
    assert state["p"].shape == () and state["p"].item() == 7


def test_duplicates_are_refused(writer: RepoWriter) -> None:
    writer.add_quantized("w", [4, 8], "F32", [good()])
    with pytest.raises(ValueError, match="added before"):
        writer.add_quantized("w", [4, 8], "BF16", [good()])
    with pytest.raises(ValueError, match="added before"):
        writer.add_passthrough("w", torch.ones(2))
    with pytest.raises(ValueError, match="taken"):
        writer.add_passthrough("w.codes", torch.ones(2))
    with pytest.raises(ValueError, match="added before"):
        writer.add_codebook("c", [-1.0, 2.0])
    with pytest.raises(ValueError, match="added before"):
        writer.add_transform("i", "identity", 2)


def test_wrong_passthrough_data_is_refused(writer: RepoWriter) -> None:
    with pytest.raises(ValueError, match="expected 12 bytes"):
        writer.add_passthrough("a", torch.ones(2), shape=[3])
    with pytest.raises(ValueError, match="expected F16 data"):
        writer.add_passthrough("b", torch.ones(2), dtype="F16")
    with pytest.raises(ValueError, match="needed with chunks"):
        writer.add_passthrough("c", iter([torch.ones(2)]))
    assert writer.done == set()


def test_a_failing_source_leaves_no_trace(writer: RepoWriter) -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield torch.ones(2)
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        writer.add_passthrough("a", broken(), shape=[4], dtype="F32")
    writer.add_passthrough("a", torch.arange(4.0))
    writer.add_passthrough("b", torch.arange(5.0))
    writer.add_quantized("w", [4, 8], "F32", [good()])
    state = load_state_dict(writer.finish())
    assert state["a"].tolist() == [0, 1, 2, 3] and state["b"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("table", ["codebooks", "transforms"])
def test_an_unused_table_entry_is_refused(writer: RepoWriter, tmp_path: Path, table: str) -> None:
    writer.add_quantized("w", [4, 8], "F32", [good()])
    if table == "codebooks":
        writer.add_codebook("spare", [1.0])
    else:
        writer.add_transform("spare", "identity", 4)
    with pytest.raises(ValueError, match=f"{table} that no stage names: spare"):
        writer.finish()
    assert not (tmp_path / "repo").exists()


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "precious").touch()
    with pytest.raises(FileExistsError, match="overwrite"):
        new_writer(tmp_path / "repo")
    assert [path.name for path in tmp_path.rglob("*")] == ["repo", "precious"]
    with pytest.raises(ValueError, match="loader_kind"):
        new_writer(tmp_path / "other", loader_kind="poetry")


def test_an_existing_target_is_replaced_without_a_system_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def windows(name: None, **_: Any) -> None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr("ctypes.CDLL", windows)
    for value in (1.0, 2.0):
        with new_writer(tmp_path / "repo", overwrite=True) as writer:
            writer.add_passthrough("w", torch.tensor([value]))
            writer.finish()
    assert load_state_dict(tmp_path / "repo")["w"].item() == 2.0 and [p.name for p in tmp_path.iterdir()] == ["repo"]


@pytest.mark.parametrize("name", ["quant_manifest.json", "README.md", "a b.json", "../x.json", ".hidden", "a/b"])
def test_file_names_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises((TQFormatError, ValueError)), new_writer(tmp_path / "repo") as w:
        w.add_passthrough("a", torch.ones(2))
        w.add_file(b"x", "support", name)
        w.finish()
    assert not (tmp_path / "repo").exists() and not (tmp_path / "x.json").exists()


def test_a_tie_without_its_weight_is_refused(writer: RepoWriter, tmp_path: Path) -> None:
    writer.add_quantized("w", [4, 8], "F32", [good()])
    writer.tie("alias", "nothing")
    with pytest.raises(TQFormatError, match=r"BIND\.TIED"):
        writer.finish()
    assert not (tmp_path / "repo").exists()


def test_an_invalid_transform_is_refused_at_the_latest_by_finish(tmp_path: Path) -> None:
    for k, keys in enumerate(({"factors": [4], "signs": "00"}, {"factors": [8], "signs": "0"}, {"factors": [8]})):
        with pytest.raises(TQFormatError, match="SCHEMA"), new_writer(tmp_path / str(k)) as w:
            w.add_transform("i", "hadamard", 8, **keys)
            w.add_codebook("c", [-1.0, 1.0])
            w.add_quantized("w", [4, 8], "F32", [good()])
            w.finish()
        assert not (tmp_path / str(k)).exists()


# ------------------------------------------------------------------------------------------------ add_files, export_safetensors


def test_add_files(settings_repo: Path) -> None:
    weights = contents(settings_repo)["turboquant_weights.safetensors"]
    add_files(settings_repo, {"config.json": ("support", b"{}"), "load_quantized.py": ("code", b"pass")})
    add_files(settings_repo, {"config.json": ("support", b'{"a": 1}')})
    now = contents(settings_repo)
    assert now.keys() == {MANIFEST, "turboquant_weights.safetensors", "config.json", "load_quantized.py"}
    assert (now["config.json"], now["load_quantized.py"], now["turboquant_weights.safetensors"]) == (
        b'{"a": 1}',
        b"pass",
        weights,
    )
    with open_repo(settings_repo) as repo:
        repo.check_roles("support", "code")
        assert repo.manifest.files["load_quantized.py"].role == "code"


def test_add_files_refuses_bad_names_and_roles(settings_repo: Path) -> None:
    before = contents(settings_repo)
    for name, role in (("README.md", "document"), ("a b", "support"), ("a.json", "friend"), (MANIFEST, "support")):
        with pytest.raises((TQFormatError, ValueError, OSError)):
            add_files(settings_repo, {name: (role, b"x")})
        assert {k: v for k, v in contents(settings_repo).items() if not k.startswith(".")} == before
    open_repo(settings_repo).close()


@pytest.mark.parametrize("limit", [5_000_000_000, 1000])
def test_export_safetensors(settings_repo: Path, tmp_path: Path, limit: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    add_files(settings_repo, {"config.json": ("support", b"{}"), "LICENSE": ("document", b"x")})
    out = export_safetensors(settings_repo, tmp_path / "plain", max_shard_bytes=limit)
    want, state = load_state_dict(settings_repo), {}
    files = sorted(out.glob("*.safetensors"))
    for file in files:
        state |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # which older tools will not do without
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert (len(files) > 2) == (limit == 1000)
    if limit == 1000:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == want.keys() and set(index["weight_map"].values()) == {
            f.name for f in files
        }
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert {p.name for p in out.iterdir()} - {f.name for f in files} - {"model.safetensors.index.json"} == {
        "config.json"
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(FileExistsError):
        export_safetensors(settings_repo, out)


def test_export_safetensors_to_another_dtype(settings_repo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = export_safetensors(settings_repo, tmp_path / "plain", dtype=torch.float16)
    state, want = load_file(out / "model.safetensors"), load_state_dict(settings_repo)
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor.half() if tensor.is_floating_point() else tensor), name


def test_export_safetensors_to_a_dtype_that_is_too_narrow(tmp_path: Path) -> None:
    for value, name in ((70000.0, "large"), (float("inf"), "infinite")):
        with new_writer(tmp_path / name) as writer:
            writer.add_passthrough("w", torch.tensor([1.0, value]))
            writer.finish()
    with pytest.raises(TQFormatError, match=r"DATA.NON_FINITE\] w: expected weights within F16; choose another type"):
        export_safetensors(tmp_path / "large", tmp_path / "plain", dtype=torch.float16)
    assert not (tmp_path / "plain").exists()
    export_safetensors(tmp_path / "infinite", tmp_path / "plain", dtype=torch.float16)  # it was so before


def test_export_safetensors_of_a_damaged_one_leaves_no_target(settings_repo: Path, tmp_path: Path) -> None:
    edit_manifest(settings_repo, lambda m: m["files"]["turboquant_weights.safetensors"].update(chunks=["0" * 64]))
    with pytest.raises(TQFormatError, match=r"BIND\.DIGEST"):
        export_safetensors(settings_repo, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_head_is_kept(tmp_path: Path) -> None:
    with new_writer(tmp_path / "repo", extra={"note": "\u00e4"}, pipeline_tag="text-ranking") as w:
        w.add_passthrough("a", torch.ones(2))
        with open_repo(w.finish()) as repo:
            m = repo.manifest
    assert (m.base_model, m.generator, m.quantization) == (HEAD["base_model"], HEAD["generator"], HEAD["quantization"])
    assert (m.extra, m.pipeline_tag, m.format_version, m.features) == ({"note": "\u00e4"}, "text-ranking", "1.0", ())
