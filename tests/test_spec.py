"""SPEC.md: its code runs, its numbering holds, and the reader agrees with its reference functions."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, random_signs

from reference_quantizer.evaluation.metrics import EDGES
from reference_quantizer.evaluation.windows import sliding_windows
from tqformat.load_quantized import TQFormatError, hadamard_factor, inverse_givens, inverse_hadamard, lookup, unpack

TEXT = (ROOT / "SPEC.md").read_text("utf-8")
BLOCKS = [(m.start(), m.group(1)) for m in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)]
RULE = r"TQ-[A-Z]+-\d+"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """The namespace that all blocks of SPEC.md leave when they run in order; their assertions are part of the test."""
    assert len(BLOCKS) >= 8
    namespace: dict[str, Any] = {}
    for start, block in BLOCKS:
        line = TEXT.count("\n", 0, start) + 1
        exec(compile("\n" * line + block, "SPEC.md", "exec"), namespace)
    return namespace


def test_every_block_runs(spec: dict[str, Any]) -> None:
    assert {"unpack", "lloyd_max_sphere", "hadamard_factor", "seed_signs", "decode_stage"} <= spec.keys()
    assert len(BLOCKS) == TEXT.count("```python") == TEXT.count("```") / 2  # no block escapes the pattern above


def test_rule_numbers_are_unique_and_consecutive() -> None:
    rules = re.findall(rf"^- \*\*\[({RULE})\]\*\*", TEXT, re.MULTILINE)
    assert len(rules) == len(set(rules)) > 50
    assert len(rules) == len(re.findall(rf"\*\*\[{RULE}\]\*\*", TEXT))  # no definition escapes the pattern above
    areas: dict[str, list[int]] = {}
    for rule in rules:
        area, number = rule.rsplit("-", 1)
        areas.setdefault(area, []).append(int(number))
    for area, numbers in areas.items():
        assert numbers == list(range(1, len(numbers) + 1)), area


@pytest.mark.parametrize("file", ["SPEC.md", *sorted(f"tqformat/{p.name}" for p in (ROOT / "tqformat").glob("*.py"))])
def test_every_rule_that_is_mentioned_exists(file: str) -> None:
    defined = set(re.findall(rf"^- \*\*\[({RULE})\]\*\*", TEXT, re.MULTILINE))
    assert set(re.findall(RULE, (ROOT / file).read_text("utf-8"))) <= defined


def test_contents_link_to_every_section() -> None:
    sections = re.findall(r"^## (\d+) (.*)$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in sections] == list(range(1, len(sections) + 1))
    for number, title in sections:
        anchor = f"{number}-{title}".lower().replace(" ", "-")
        assert re.search(rf"\[{number} [^]]+\]\(#{re.escape(anchor)}\)", TEXT), title


@pytest.mark.parametrize("bits", range(1, 17))
def test_unpack_agrees(spec: dict[str, Any], bits: int) -> None:
    rng = np.random.default_rng(bits)
    checked = 0
    for window in range(bits, 17):
        for n in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 33):
            if n * bits < window:  # [TQ-CODE-2]
                continue
            nbytes = -(-n * bits // 8)
            codes = rng.integers(0, 256, (3, nbytes), dtype=np.uint8)
            codes[:, -1] &= 255 >> (-n * bits % 8)  # [TQ-CODE-5]
            expected = [spec["unpack"](bytes(tile), n, bits, window) for tile in codes]
            assert unpack(torch.from_numpy(codes), n, bits, window).tolist() == expected, (n, window)
            checked += 1
    assert checked >= 11


@pytest.mark.parametrize(("tokens", "length", "stride"), [(2, 8, 4), (17, 8, 8), (100, 8, 3), (101, 2, 1), (9, 8, 7)])
def test_evaluation_windows_agree(spec: dict[str, Any], tokens: int, length: int, stride: int) -> None:
    for limit in (None, 1, 3):
        windows = sliding_windows(tokens, length, stride, limit)
        assert [(w.scored, w.predicted) for w in windows] == spec["evaluation_windows"](tokens, length, stride, limit)


def test_bins_of_histograms_agree(spec: dict[str, Any]) -> None:
    assert EDGES.tolist() == [spec["bin_begin"](i) for i in range(129)]


def test_unpack_rejects_every_padding_bit() -> None:
    for bits, n in ((1, 3), (3, 3), (5, 5), (7, 9), (11, 1)):
        used = n * bits % 8
        for bit in range(used, 8):
            codes = torch.zeros(2, -(-n * bits // 8), dtype=torch.uint8)
            codes[1, -1] = 1 << bit
            with pytest.raises(TQFormatError) as caught:
                unpack(codes, n, bits, bits)
            assert caught.value.code == "PACK.PADDING"


def test_hadamard_factors_agree_for_every_order_up_to_300(spec: dict[str, Any]) -> None:
    from tqformat.load_quantized import _order_kind

    found = []
    for f in range(2, 301):
        try:
            expected = spec["hadamard_factor"](f)
        except ValueError:
            assert not _order_kind(f), f
            continue
        assert np.array_equal(hadamard_factor(f).numpy(), expected), f
        found.append(f)
    assert {2, 4, 12, 20, 28, 36, 76, 256, 300} <= set(found) and 92 not in found


@pytest.mark.parametrize("f", [504, 2020, 2048])  # Paley I; Paley II near the limit; Sylvester
def test_hadamard_factors_agree_for_large_orders(spec: dict[str, Any], f: int) -> None:
    h = hadamard_factor(f)
    assert torch.equal(h @ h.t(), f * torch.eye(f))
    expected = spec["hadamard_factor"](f) if f < 2048 else None
    assert expected is None or np.array_equal(h.numpy(), expected)


@pytest.mark.parametrize(
    "factors", [(2,), (4,), (12,), (20,), (28,), (64,), (128,), (2, 12), (12, 2), (20, 12), (4, 3 * 4, 2)]
)
def test_inverse_hadamard_and_signs_agree(spec: dict[str, Any], factors: tuple[int, ...]) -> None:
    size = int(np.prod(factors))
    h = np.ones((1, 1))
    for f in factors:
        h = np.kron(h, spec["hadamard_factor"](f))
    for signs in (random_signs(np.random.default_rng(size), size), spec["seed_signs"](size, size)):
        s = np.array([1 - 2 * (bytes.fromhex(signs)[j // 8] >> j % 8 & 1) for j in range(size)])  # [TQ-TRAN-5]
        inverse = inverse_hadamard(factors, signs, torch.device("cpu"))(torch.eye(size)).numpy()
        assert np.abs(inverse - (s[:, None] * h.T / np.sqrt(size)).T).max() < 1e-6  # row k is T^-1 of unit vector k
        assert np.array_equal(np.sign(inverse), np.sign((s[:, None] * h.T).T))


def test_inverse_givens_undoes_the_rounds_in_order() -> None:
    rng = np.random.default_rng(3)
    pairs = np.stack([rng.permutation(6).reshape(3, 2) for _ in range(4)])
    angles, v = rng.normal(size=(4, 3)), rng.normal(size=6)
    y = v.copy()
    for round_pairs, round_angles in zip(pairs, angles, strict=True):  # T of [TQ-TRAN-8], literally
        for (i, j), a in zip(round_pairs, round_angles, strict=True):
            y[i], y[j] = np.cos(a) * y[i] - np.sin(a) * y[j], np.sin(a) * y[i] + np.cos(a) * y[j]
    inverse = inverse_givens(torch.from_numpy(pairs), torch.from_numpy(angles))
    assert np.allclose(inverse(torch.from_numpy(y).float()[None])[0].numpy(), v, atol=1e-6)
    assert not np.allclose(y, v, atol=0.1)


def test_lookup_in_vector_codebooks_of_each_row() -> None:
    rng = np.random.default_rng(4)
    levels = rng.normal(size=(6, 4, 2))
    symbols = torch.from_numpy(rng.integers(0, 4, (6, 5), dtype=np.int32))
    expected = np.stack([levels[r][symbols[r]].reshape(-1) for r in range(6)])
    table = torch.from_numpy(levels).float().flatten(0, 1)
    assert np.array_equal(lookup(symbols + 4 * torch.arange(6)[:, None], table), expected.flatten().astype(np.float32))
