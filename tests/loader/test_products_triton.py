"""Triton's products against sums in float64: on a GPU, or without one in Triton's interpreter; skipped where there is no Triton."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from torch import Tensor
from torch.nn import functional

from tqformat import packed
from tqformat.load_quantized import unpack
from tqformat.packed import PackedRepo, PackedWeight

pytest.importorskip("triton", reason="Triton is not installed (it comes with torch for CUDA; pip install triton)")
from tqformat import products_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in the interpreter: conftest.py


def make(
    rows: int, cols: int, bits: int, window: int | None = None, tile_rows: int = 1, g: int | None = None, **more: Any
) -> tuple[Any, Tensor]:
    """A stage of random parts, and what it decodes to in float64 [rows, cols]."""
    torch.manual_seed(bits)
    n, window, g = (cols if tile_rows == 1 else tile_rows), window or bits, g or cols
    codes = torch.randint(0, 256, (rows * cols // n, n * bits // 8), dtype=torch.uint8)
    levels = more.get("levels", torch.randn(1 << window).bfloat16().float())
    scales, offsets = torch.rand(rows, cols // g).to(more.get("dtype", torch.float16)), more.get("offsets")
    symbols = unpack(codes, n, bits, window).long()
    if tile_rows > 1:
        symbols = symbols.reshape(rows // tile_rows, cols, tile_rows).transpose(1, 2).reshape(rows, cols)
    u = levels[symbols].double() * scales.double().repeat_interleave(g, 1)
    options: dict[str, Any] = {"shape": (rows, cols), "bits": bits, "window": window, "vector_length": g}
    options |= {"tile": (tile_rows, 1)} if tile_rows > 1 else {}
    if offsets:
        options["offsets"] = torch.randn(rows, cols // g).to(torch.bfloat16)
        u += options["offsets"].double().repeat_interleave(g, 1)
        options["offsets"] = options["offsets"].to(DEVICE)
    return products_triton.stage(codes.to(DEVICE), levels, scales.to(DEVICE), **options), u


def check(stage: Any, u: Tensor, batch: int) -> None:
    """Grade 18 [TQ-FUSE-2], where binary32 throughout should reach 14."""
    z = torch.randn(batch, u.shape[1], generator=torch.Generator().manual_seed(batch))
    y = stage.product(z.to(DEVICE)).cpu()
    assert y.shape == (batch, len(u)) and y.dtype == torch.float32
    bound = z.double().norm(dim=1)[:, None] * u.norm(dim=1)
    assert ((y - z.double() @ u.T).abs() <= 2**-18 * bound).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    "setting", [{}, {"g": 32}, {"g": 8, "offsets": True}, {"offsets": True, "dtype": torch.float32}, {"tile_rows": 96}]
)
def test_scalar_codes(bits: int, setting: dict[str, Any]) -> None:
    stage, u = make(96 if "tile_rows" in setting else 37, 96, bits, **setting)
    check(stage, u, 3)


@pytest.mark.parametrize(
    ("rows", "cols", "bits", "window", "tile_rows", "g"),
    [
        (256, 72, 2, 12, 256, None),
        (576, 40, 2, 12, 288, None),
        (64, 64, 3, 12, 32, 16),
        (128, 24, 4, 16, 128, None),
        (64, 20, 6, 12, 64, None),
        (3, 96, 3, 8, 1, None),
        (5, 64, 1, 16, 1, 32),
    ],
)
def test_trellis_codes(rows: int, cols: int, bits: int, window: int, tile_rows: int, g: int | None) -> None:
    check(*make(rows, cols, bits, window, tile_rows, g), 2)


@pytest.mark.parametrize(("bits", "window"), [(2, 12), (2, 16), (3, 14), (4, 12)])
def test_computed_levels_are_those_of_the_table(bits: int, window: int) -> None:
    levels = products_triton.byte_sum(1 << window)
    stage, u = make(128, 40, bits, window, 128, levels=levels)
    z = torch.randn(1, 40).to(DEVICE)
    assert stage.computed and torch.equal(stage.product(z), replace(stage, computed=False).product(z))
    check(stage, u, 1)
    levels[-1] += 1 / 128
    assert not make(128, 40, bits, window, 128, levels=levels)[0].computed


@pytest.mark.parametrize("batch", [0, 1, 4, 5, 16])
def test_batches(batch: int) -> None:
    check(*make(64, 96, 2, 12, 32), batch)
    check(*make(33, 32, 4), batch)


def test_columns_are_divided_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for programs in (1, 3, 7, 1 << 20):
        monkeypatch.setattr(products_triton, "PROGRAMS", programs)
        check(*make(32, 200, 2, 8, 32), 2)
        check(*make(7, 1056, 1), 2)


def test_what_has_no_kernel() -> None:
    for change in ({"bits": 3, "cols": 40}, {"tile_rows": 16}, {"bits": 8, "window": 16, "tile_rows": 32}):
        stage, _ = make(**{"rows": 64, "cols": 64, "bits": 2} | change)
        assert (stage is None) == ("window" not in change)  # 8 bits in a window of 16 fit, four at a time
    codes, scales = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1)
    plain: dict[str, Any] = {"shape": (8, 64), "bits": 2}
    assert products_triton.stage(codes, torch.randn(4), scales, **plain) is not None
    outer = {"scales": scales.to(torch.uint8), "outer_scales": scales}
    for change in (
        outer,
        {"levels": torch.randn(4, 2)},
        {"levels": torch.randn(8, 4, 1)},
        {"tile": (1, 32)},
        {"tile": (2, 64)},
    ):
        parts = {"codes": codes, "levels": torch.randn(4), "scales": scales} | plain
        assert products_triton.stage(**parts | change) is None


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Packed weights on the CPU take these products; gives whether each stage that was made has a kernel."""
    made: list[bool] = []

    def stage(*parts: Any, **options: Any) -> Any:
        found = products_triton.stage(*parts, **options)
        made.append(found is not None)
        return found

    monkeypatch.setattr(packed, "stage_maker", lambda device: stage)
    yield made


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels for a GPU do not run on the CPU")
@pytest.mark.filterwarnings("ignore:products of packed weights")
def test_packed_weights_take_them(on_triton: list[bool], settings_repo: Path) -> None:
    with PackedRepo(ROOT / "conformance/vectors/v1/valid/codebooks/byte-sum/repo") as repo:
        weight = repo.dequantize("w")
        x = torch.randn(1, 3)
        y = functional.linear(x, weight)
        assert torch.allclose(y, x @ weight.decode().t(), rtol=2**-7, atol=2**-7)
        assert on_triton == [True] and weight.parts.stages and weight.parts.stages[0].computed
    with PackedRepo(settings_repo) as repo:
        for name in repo.manifest.tensors:
            weight = repo.dequantize(name)
            if isinstance(weight, PackedWeight) and weight.dim() == 2 and weight.numel():
                x = torch.randn(2, weight.shape[1])
                wanted = x @ exact(weight).t()
                assert torch.allclose(functional.linear(x, weight), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max())
    assert set(on_triton[1:]) == {True, False}  # some settings have a kernel here, others take torch's path


def exact(weight: PackedWeight) -> Tensor:
    """The weight before it is rounded to its dtype, float32."""
    return weight.like(entry=replace(weight.entry, dtype="F32"), dtype=torch.float32).decode()


@pytest.mark.skipif(DEVICE != "cpu", reason="for a GPU the benchmark itself is at hand")
def test_the_benchmark_runs() -> None:
    options = ["--toy", "--only", "2 bit", "trellis 2 bit, window 16, computed", "--batch", "1"]
    run = run_python(
        "benchmarks/gpu_products.py", *options, env={"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    )
    assert run.returncode == 0 and "times mean nothing" in run.stdout, run.stderr
    assert run.stdout.count("| 2^-") == 2


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from tqformat import products_triton as p

pointers = {"codes": "*i32", "levels": "*fp16", "scales": "*fp16", "z": "*fp32", "parts": "*fp32"}
settings = {"COMPUTED": False, "DP4A": True, "FINE": True, "E": 8, "Q": 16, "M": 4}
for kernel, more in ((p._down, {"BITS": 2, "WINDOW": 12, "C": 8}), (p._down, {"BITS": 2, "WINDOW": 16, "C": 8, "COMPUTED": True}),
                     (p._along, {"BITS": 4, "WINDOW": 4, "R": 8, "FINE": False})):
    constants = settings | more
    places = {name: i for i, name in enumerate(kernel.arg_names)}
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        signature = {i: pointers.get(name, "i32") for name, i in places.items() if name not in constants}
        source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()})
    else:
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in places}
        source = ASTSource(kernel, signature, {(places[name],): value for name, value in constants.items()})
    for capability in (80, 90) if "R" in more else (90,):
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
        print(kernel.__name__, capability, len(binary))
"""


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """No GPU is needed for that."""
    run = run_python("-W", "ignore", "-c", COMPILE, env={"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr
    sizes = [int(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(sizes) == 4 and min(sizes) > 1000
