"""Values of other formats, carried through the writer and the loader exactly: the appendix of SPEC.md, executed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import new_writer

from reference_quantizer.foreign.gguf_blocks import TYPES, read_blocks
from reference_quantizer.foreign.parts import Stage
from tqformat import TQFormatError, open_repo, pack

gguf = pytest.importorskip("gguf")

BITS = {  # per weight, without tables: what the appendix states
    "Q4_0": 4.5, "Q5_0": 5.5, "Q8_0": 8.5, "IQ4_NL": 4.5, "Q4_1": 5, "Q5_1": 6, "MXFP4": 4.25, "NVFP4": 4.5,
    "Q2_K": 3.125, "Q4_K": 4.625, "Q5_K": 5.625, "Q3_K": 3.5625, "Q6_K": 6.5625, "IQ4_XS": 4.3125,
    "TQ1_0": 2.0625, "TQ2_0": 2.0625, "IQ2_XXS": 2.1875, "IQ2_XS": 2.5625, "IQ3_XXS": 3.3125, "IQ3_S": 3.5625,
    "IQ1_S": 1.8125, "IQ1_M": 2.0625,
}  # fmt: skip


def random_blocks(kind: str, rows: int, blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes [rows, bytes of a row] whose scales are finite, and not so large that a value overflows."""
    _, sizes, _ = TYPES[kind]
    data = rng.integers(0, 256, (rows * blocks, sum(sizes)), dtype=np.uint8)
    ends = np.cumsum(sizes)
    halves = {"Q4_1": (0, 1), "Q5_1": (0, 1), "Q2_K": (2, 3), "Q4_K": (0, 1), "Q5_K": (0, 1)}
    for field in halves.get(kind, (sizes.index(2),) if 2 in sizes else ()):
        first = ends[field] - sizes[field]
        finite = rng.integers(0, 0x7C00, len(data)).astype("<u2") | rng.integers(0, 2, len(data)).astype("<u2") << 15
        finite[:2] = 0x0001, 0x7BFF  # the least and the largest number
        data[:, first : first + 2] = finite[:, None].view(np.uint8)
    if kind == "IQ1_M":  # the highest four bits of the half are in the last byte
        data[:, -1] &= 0xBF
    elif kind == "MXFP4":
        data[:, 0] = rng.integers(0, 250, len(data))
    elif kind == "NVFP4":
        data[:, :4] = rng.integers(0, 0x80, (len(data), 4))
    return data.reshape(rows, -1)


def stage_of(found: Stage, cols: int) -> dict[str, Any]:
    """The stage that add_quantized takes, for the codebook "c" and the transform "i"."""
    bits = max(1, (len(found.levels) - 1).bit_length())
    stage: dict[str, Any] = {"bits": bits, "codebook": "c", "transform": "i"}
    stage |= {"codes": pack(torch.from_numpy(found.symbols.astype(np.int32)), bits)}
    stage |= {"vector_length": cols // found.scales.shape[1], "scales": found.scales, "scale_dtype": found.scale_dtype}
    outer = {"outer_scales": found.outer_scales, "offsets": found.offsets, "outer_offsets": found.outer_offsets}
    return stage | {key: part for key, part in outer.items() if part is not None}


def carried(path: Path, stages: list[dict[str, Any]], levels: Any, shape: tuple[int, int], index: Any = None) -> Path:
    """The repository of one F32 weight "w"."""
    with new_writer(path) as writer:
        kind = ("identity", 1) if index is None else ("permutation", shape[1])
        writer.add_transform("i", *kind, index=index)
        writer.add_codebook("c", levels)
        writer.add_quantized("w", shape, "F32", stages)
        return writer.finish()


def decoded(path: Path) -> np.ndarray:
    with open_repo(path) as repo:
        return repo.dequantize("w").numpy()


def stored_bits(path: Path) -> float:
    """Bits per weight of the parts that belong to "w", outer scales that are one number left out."""
    with open_repo(path) as repo:
        parts = [s for key, s in repo.spans.items() if key.startswith("w.") and s.shape != (1, 1)]
        return 8 * sum(s.end - s.begin for s in parts) / np.prod(repo.manifest.tensors["w"].shape)


@pytest.mark.parametrize("kind", TYPES)
def test_gguf(kind: str, tmp_path: Path) -> None:
    rows, blocks = 6, 5
    data = random_blocks(kind, rows, blocks, np.random.default_rng(sum(kind.encode())))
    with np.errstate(over="ignore"):
        want = gguf.quants.dequantize(data.reshape(-1), gguf.GGMLQuantizationType[kind]).reshape(rows, -1)
    assert np.isfinite(want).all() and len(np.unique(want)) > 50
    found = read_blocks(kind, data)
    assert want.shape[1] == blocks * TYPES[kind][0]
    path = carried(tmp_path / "repo", [stage_of(found, want.shape[1])], found.levels, want.shape)
    assert np.array_equal(decoded(path), want)
    assert stored_bits(path) == BITS[kind]


def test_every_type_that_gguf_decodes_is_tried_or_known_to_be_impossible() -> None:
    known = {kind.name for kind in gguf.quants._type_traits}
    assert known - TYPES.keys() == {"BF16", "F32", "F16", "IQ2_S"} & known and len(TYPES) == 22 == len(BITS)
    for kind, (weights, sizes, _) in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (weights, sum(sizes))


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.LIBRARY.*IQ2_S: expected one of"):
        read_blocks("IQ2_S", np.zeros((2, 82), np.uint8))
    with pytest.raises(TQFormatError, match=r"CONTAINER\.SHAPE.*18-byte blocks, got 19 bytes"):
        read_blocks("Q4_0", np.zeros((2, 19), np.uint8))


@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(tmp_path: Path, ordered: bool) -> None:
    """W[r, c] = scale[r, g_idx[c]] * (code[r, c] - zero[r, g_idx[c]]); with activation order g_idx is not sorted."""
    rng, rows, cols, g = np.random.default_rng(1), 12, 64, 16
    codes = rng.integers(0, 16, (rows, cols))
    zeros, scales = (
        rng.integers(1, 17, (rows, cols // g)),
        rng.uniform(0.001, 0.1, (rows, cols // g)).astype(np.float16),
    )
    g_idx = np.arange(cols) // g
    g_idx = rng.permutation(g_idx) if ordered else g_idx
    s = scales.astype(np.float32)[:, g_idx]
    want = s * (codes - zeros[:, g_idx]).astype(np.float32)
    index = np.argsort(g_idx, kind="stable")  # y[i] is the column index[i]: columns of a group stand together
    stage = {"bits": 4, "codebook": "c", "transform": "i", "vector_length": g, "scales": scales}
    stage |= {"codes": pack(torch.from_numpy(codes[:, index].astype(np.int32)), 4)}
    stage |= {"offsets": -scales.astype(np.float32) * zeros.astype(np.float32)}
    path = carried(tmp_path / "r", [stage], np.arange(16.0), (rows, cols), index.astype(np.int32) if ordered else None)
    assert np.array_equal(decoded(path), want)
    with open_repo(path) as repo:
        assert ("permutation" in repo.manifest.features) == ("fine_scales" in repo.manifest.features) == ordered


def test_awq(tmp_path: Path) -> None:
    """W = (code - zero) * scale: the zeros are U8 offsets, and what multiplies them is the negated scale of the group."""
    rng, rows, cols, g = np.random.default_rng(2), 8, 256, 128
    codes, zeros = rng.integers(0, 16, (rows, cols)), rng.integers(0, 16, (rows, cols // g)).astype(np.uint8)
    scales = rng.normal(size=(rows, cols // g)).astype(np.float16)
    want = (codes - np.repeat(zeros.astype(int), g, 1)).astype(np.float32) * np.repeat(scales.astype(np.float32), g, 1)
    stage = {"bits": 4, "codebook": "c", "transform": "i", "vector_length": g, "scales": scales}
    stage |= {"codes": pack(torch.from_numpy(codes.astype(np.int32)), 4), "offsets": zeros, "outer_offsets": -scales}
    path = carried(tmp_path / "repo", [stage], np.arange(16.0), (rows, cols))
    assert np.array_equal(decoded(path), want)
    assert stored_bits(path) == 4 + 16 / g + 8 / g + 16 / g


def test_nf4(tmp_path: Path) -> None:
    """W = absmax of 64 weights * level; the levels are quantiles of the normal distribution, stored in binary32."""
    rng = np.random.default_rng(3)
    normal = torch.distributions.Normal(0.0, 1.0)
    up, down = normal.icdf(torch.linspace(0.5, 0.9677, 9)), normal.icdf(torch.linspace(0.5, 0.9677, 8))
    levels = torch.cat([-down.flip(0), up[1:]]) / up[-1]
    codes, absmax = rng.integers(0, 16, (6, 128)), rng.uniform(0, 1, (6, 2)).astype(np.float32)
    want = levels.numpy()[codes] * np.repeat(absmax, 64, 1)
    stage = {"bits": 4, "codebook": "c", "transform": "i", "vector_length": 64, "scales": absmax}
    path = carried(
        tmp_path / "repo", [{**stage, "codes": pack(torch.from_numpy(codes.astype(np.int32)), 4)}], levels, (6, 128)
    )
    assert np.array_equal(decoded(path), want) and stored_bits(path) == 4.5
