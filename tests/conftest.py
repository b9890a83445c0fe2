"""Shared helpers: repositories with random codes for every setting, and repositories made from model checkpoints."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIG, Make
from safetensors.torch import save_file

from tqformat import RepoWriter, pack
from tqformat.load_quantized import MANIFEST, torch_dtype

ROOT = Path(__file__).parents[1]
# The tensors are small, and threads that wait for each other on a busy machine are slow; so it is in processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
HEAD: dict[str, Any] = {
    "base_model": {"id": "org/base"},
    "quantization": {"method": "test", "bits": 4},
    "generator": "tests 1",
}
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton, where it is installed, reads this when it is imported
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def benchmark(name: str) -> Any:
    """The module benchmarks/NAME.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def new_writer(path: Path, loader_kind: str = "text-generation", **options: Any) -> RepoWriter:
    return RepoWriter(path, **{**HEAD, "loader_kind": loader_kind, **options})


def random_symbols(
    rng: np.random.Generator, tiles: int, n: int, bits: int, window: int, entries: int | None = None
) -> torch.Tensor:
    """Symbols int32 [tiles, n]; with window > bits those of a random stream."""
    if window == bits:
        return torch.from_numpy(rng.integers(0, entries or 1 << bits, (tiles, n), dtype=np.int32))
    stream = rng.integers(0, 2, (tiles, n * bits))
    place = (np.arange(n)[:, None] * bits + np.arange(window)) % (n * bits)  # [n, window] [TQ-CODE-6]
    return torch.from_numpy((stream[:, place] << np.arange(window)).sum(-1).astype(np.int32))


def random_stage(rng: np.random.Generator, shape: Iterable[int], p: int = 1, **stage: Any) -> dict[str, Any]:
    """A stage for add_quantized with random codes and scales; `p` is the codebook's dimension."""
    *leading, cols = shape
    rows, bits = int(np.prod(leading, dtype=np.int64)), stage["bits"]
    tr, tc = stage.get("tile") or (1, cols)
    symbols = random_symbols(
        rng, rows * cols // (tr * tc), tr * tc // p, bits, stage.get("window") or bits, stage.pop("entries", None)
    )
    scales = rng.uniform(0.01, 0.02, (rows, cols // (stage.get("vector_length") or cols)))
    dtype = stage.pop("scale_dtype", torch.float32)
    numbers = {"scales": torch.tensor(scales).to(dtype)} | random_numbers(rng, stage, scales.shape)
    return {**stage, "codes": pack(symbols, bits, stage.get("window")), **numbers}


def random_numbers(rng: np.random.Generator, stage: dict[str, Any], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """8-bit scales and offsets [rows, cols/G] where the stage names a dtype for them (and takes the name away)."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("scale", "offset"):
        name = stage.pop(f"{kind}s", None)
        if name == "F32":
            found[f"{kind}s"] = torch.from_numpy(rng.normal(size=shape)).float()
        elif name is not None:
            low, high = {"U8": (0, 256), "I8": (0, 256), "F8_E4M3": (0, 127), "F8_E8M0": (110, 140)}[name]
            data = torch.from_numpy(rng.integers(low, high, shape, dtype=np.uint8))
            found[f"{kind}s"] = data if name == "F8_E8M0" else data.view(torch_dtype(name))
            found[f"outer_{kind}s"] = torch.from_numpy(rng.normal(size=stage.pop(f"outer_{kind}s"))).float() / 64
            stage[f"{kind}_dtype"] = name
    return found


def random_signs(rng: np.random.Generator, size: int) -> str:
    data = bytearray(rng.bytes(-(-size // 8)))
    if size % 8:
        data[-1] &= (1 << size % 8) - 1
    return data.hex()


def every_setting(writer: RepoWriter, seed: int = 0) -> None:
    """Adds one weight for each decode setting, and passthrough tensors of several dtypes."""
    rng = np.random.default_rng(seed)
    levels = [-1.51, -0.4528, 0.4528, 1.51]
    add = writer.add_quantized

    writer.add_transform("i", "identity", 1)
    writer.add_transform("h", "hadamard", 24, factors=[2, 12], signs=random_signs(rng, 24))
    writer.add_transform("q", "dense", 8, matrix=torch.linalg.qr(torch.from_numpy(rng.normal(size=(8, 8))).float())[0])
    pairs = np.stack([rng.permutation(8).reshape(4, 2) for _ in range(3)]).astype(np.int32)
    writer.add_transform("g", "givens", 8, pairs=pairs, angles=rng.normal(size=(3, 4)).astype(np.float32))
    writer.add_transform("p", "permutation", 24, index=rng.permutation(24).astype(np.int32))
    writer.add_codebook("c", levels)
    writer.add_codebook("vector", torch.from_numpy(rng.normal(size=(16, 4))).half(), stored=True)
    writer.add_codebook("row", torch.from_numpy(rng.normal(size=(6, 4, 1))).float())
    writer.add_codebook("trellis", torch.from_numpy(rng.normal(size=64)).float())
    writer.add_codebook("ternary", [-1.0, 0.0, 1.0])
    writer.add_codebook("brain", torch.from_numpy(rng.normal(size=4)).bfloat16(), stored=True)

    def stage(shape: list[int], transform: str, codebook: str, bits: int = 2, **keys: Any) -> dict[str, Any]:
        return random_stage(rng, shape, transform=transform, codebook=codebook, bits=bits, **keys)

    add("plain", [6, 48], "BF16", [stage([6, 48], "i", "c", scale_dtype=torch.bfloat16)])
    add("hadamard", [6, 48], "F16", [stage([6, 48], "h", "c", vector_length=24, scale_dtype=torch.float16)])
    add("dense", [6, 48], "F32", [stage([6, 48], "q", "c")])
    add("givens", [6, 48], "F32", [stage([6, 48], "g", "c", vector_length=16)])
    add("vector", [6, 48], "F32", [stage([6, 48], "h", "vector", bits=4, p=4)])
    add("row", [2, 3, 48], "F32", [stage([2, 3, 48], "i", "row")])
    add("trellis", [6, 48], "F32", [stage([6, 48], "h", "trellis", window=6, tile=[2, 16])])
    add("ternary", [3, 5], "F32", [stage([3, 5], "i", "ternary", entries=3)])
    stages = [stage([6, 48], "h", "c"), stage([6, 48], "q", "c", tile=[3, 24])]
    add("stages", [6, 48], "BF16", stages, column_scale=torch.from_numpy(rng.uniform(0.5, 2, 48)).half())
    add("conv", [2, 3, 2, 2, 24], "F32", [stage([2, 3, 2, 2, 24], "h", "c")])
    add("empty", [0, 24], "F32", [stage([0, 24], "h", "c")])
    offsets = {"vector_length": 8, "offsets": "F32", "scale_dtype": torch.bfloat16}
    add("offsets", [6, 48], "F32", [stage([6, 48], "i", "brain", **offsets)])
    fine = {"vector_length": 8, "scales": "U8", "outer_scales": (6, 2), "offsets": "I8", "outer_offsets": (1, 3)}
    add("fine", [6, 48], "BF16", [stage([6, 48], "h", "c", **fine)])
    floats = {"vector_length": 12, "scales": "F8_E8M0", "outer_scales": (1, 1)}
    add("exponents", [6, 48], "F32", [stage([6, 48], "p", "c", **floats)])
    floats = {"vector_length": 24, "scales": "F8_E4M3", "outer_scales": (6, 1), "offsets": "F32"}
    add("floats", [2, 3, 48], "F16", [stage([2, 3, 48], "p", "c", **floats)])
    writer.add_passthrough("norm", torch.from_numpy(rng.normal(size=48)).bfloat16())
    writer.add_passthrough("count", torch.tensor(7))
    writer.add_passthrough("mask", torch.tensor([[True, False, True]]))
    writer.add_passthrough("none", torch.empty(0, 3))
    writer.tie("plain.alias", "plain")


def quantize_simply(writer: RepoWriter, name: str, weight: torch.Tensor, dtype: str, bits: int = 4) -> None:
    """Rounds a weight to evenly spaced levels, one scale per row; needs the codebook `c<bits>` and the transform `i`."""
    matrix = weight.reshape(-1, weight.shape[-1]).float()
    scales = matrix.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    top = (1 << bits) - 1
    symbols = ((matrix / scales / 2.5 + 1) / 2 * top).round().clamp(0, top).int()
    codes = {"bits": bits, "codebook": f"c{bits}", "transform": "i", "codes": pack(symbols, bits), "scales": scales}
    writer.add_quantized(name, weight.shape, dtype, [codes])


def repo_from_checkpoint(
    checkpoint: Path,
    out: Path,
    loader_kind: str,
    extra: dict[str, torch.Tensor] | None = None,
    drop: Iterable[str] = (),
    ties: dict[str, str] | None = None,
    **options: Any,
) -> Path:
    """Quantizes every matrix of a saved checkpoint at 4 bit, keeps the rest, and adds its configuration files."""
    from safetensors.torch import load_file

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    with new_writer(out, loader_kind, **options) as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c4", torch.linspace(-2.5, 2.5, 16))
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            tensors |= load_file(file)
        for name, tensor in {**tensors, **(extra or {})}.items():
            if name in (drop or ()) or name in (ties or {}):
                continue
            if tensor.dim() >= 2 and tensor.dtype in names:
                quantize_simply(writer, name, tensor, names[tensor.dtype])
            else:
                writer.add_passthrough(name, tensor)
        for alias, source in (ties or {}).items():
            writer.tie(alias, source)
        for file in sorted(checkpoint.glob("*.json")):
            if not file.name.endswith(".index.json"):
                writer.add_file(file, "support")
        return writer.finish()


def edit_manifest(repo: Path, change: Any) -> None:
    manifest = json.loads((repo / MANIFEST).read_text("utf-8"))
    change(manifest)
    (repo / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def run_python(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 120, check: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Runs a fresh interpreter, offline; other settings of this process are inherited."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        cwd=cwd,
        timeout=timeout,
        check=check,
    )


@pytest.fixture
def settings_repo(tmp_path: Path) -> Path:
    """A repository with one weight for each decode setting."""
    with new_writer(tmp_path / "settings") as writer:
        every_setting(writer)
        return writer.finish()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test talks to the Hub; the stand-in Hub of test_hub.py runs against a subprocess."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def interrupted(function: Any, call: int) -> Any:
    """`function`, but the call of this number is a Ctrl-C."""
    calls = itertools.count(1)

    def interrupt(*args: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    return interrupt


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a checkpoint: `make(tensors)`, or `make({file: tensors}, ...)` for shards."""

    def make(tensors: dict[str, Any], name: str = "model", config: dict[str, Any] | None = CONFIG) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        files = tensors if any(isinstance(v, dict) for v in tensors.values()) else {"model.safetensors": tensors}
        for file, content in files.items():
            save_file(content, path / file, metadata={"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make
