"""Low-bit checkpoints of other programs, imported: made here by the formulas of their formats, small, and read back.

Where the program's own package is installed, what it decodes is compared, too; the suite needs none of them.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers import save_quantized, words

from conformance import checks_decode
from conformance.check import judge
from conformance.folder import Folder
from conformance.subject import Options, Subject
from reference_quantizer.__main__ import main
from tqformat import open_repo

ROWS, COLS, G = 16, 64, 16


def imported(path: Path, name: str = "a.weight") -> torch.Tensor:
    """The weight `name` of the repository that `import` makes of a checkpoint; the repository conforms."""
    out = path.with_name(f"{path.name}-out")
    assert main(["import", str(path), str(out), "--quiet"]) == 0
    folder = Folder(out, False)
    known = checks_decode.known_loaders(Path(checks_decode.__file__).with_name("known_loaders.json").read_text())
    judgement = judge(Subject(folder, Options(known_loaders=known)))
    folder.close()
    assert judgement.passed == "L3", judgement.violations
    assert json.loads((out / "config.json").read_text())["quantization_config"] == {"quant_method": "tqformat"}
    with open_repo(out) as repo:
        facts = repo.manifest.base_model["extra"]["imported_from"]
        assert facts["quantization_config"]["quant_method"] == facts["format"]
        return repo.dequantize(name)


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    assert found.dtype == want.dtype and found.shape == want.shape
    assert torch.equal(found, want), (found.float() - want.float()).abs().max()


def numbers(seed: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, cols], zeros and scales [rows, groups]."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (ROWS, COLS), generator=rng)
    zeros = torch.randint(1, 1 << bits, (ROWS, COLS // G), generator=rng)
    return codes, zeros, torch.rand(ROWS, COLS // G, generator=rng) * 0.1 + 0.001


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["sym", "asym", "ordered"])
def test_gptq(tmp_path: Path, version: str, bits: int, kind: str) -> None:
    codes, zeros, scales = numbers(bits, bits)
    half, group = scales.half(), torch.arange(COLS) // G
    if kind == "sym":
        zeros[:] = 1 << bits - 1
    if kind == "ordered":
        group = group[torch.randperm(COLS, generator=torch.Generator().manual_seed(1))]
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {"a.qweight": words(codes, bits).t(), "a.qzeros": words(stored.t(), bits), "a.scales": half.t()}
    tensors |= {"a.g_idx": group.int(), "a.bias": torch.ones(ROWS).half(), "norm.weight": torch.ones(COLS).half()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": G, "checkpoint_format": version}
    want = half[:, group] * (codes - zeros[:, group]).half()
    path = save_quantized(tmp_path / "c", tensors, config)
    same(imported(path), want)
    with open_repo(tmp_path / "c-out") as repo:
        features = repo.manifest.features
        assert set(repo.manifest.tensors) == {"a.weight", "a.bias", "norm.weight"}
        assert ("permutation" in features) == (kind == "ordered") and ("offsets" in features) == (kind != "sym")


def test_awq(tmp_path: Path) -> None:
    codes, zeros, scales = numbers(5, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(data: torch.Tensor) -> torch.Tensor:
        return words(data.reshape(len(data), -1, 8)[:, :, order].reshape(len(data), -1), 4)

    half = scales.half()
    tensors = {"a.qweight": interleaved(codes.t()), "a.qzeros": interleaved(zeros.t()), "a.scales": half.t()}
    config = {"quant_method": "awq", "bits": 4, "group_size": G, "version": "gemm", "zero_point": True}
    each = torch.arange(COLS) // G
    same(imported(save_quantized(tmp_path / "c", tensors, config)), half[:, each] * (codes - zeros[:, each]).half())


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("kind", ["group", "channel", "tensor", "asym", "ordered"])
def test_compressed_tensors_integers(tmp_path: Path, bits: int, kind: str) -> None:
    codes, zeros, scales = numbers(bits, bits)
    group, scales = torch.arange(COLS) // G, scales.bfloat16()
    if kind in ("channel", "tensor"):
        group, scales = torch.zeros(COLS, dtype=torch.int64), scales[:, :1]
        scales = scales[:1].expand(ROWS, 1) if kind == "tensor" else scales
    shift = zeros[:, group] if kind == "asym" else 1 << bits - 1
    tensors = {"a.weight_packed": words(codes, bits), "a.weight_shape": torch.tensor([ROWS, COLS])}
    tensors |= {"a.weight_scale": scales[0] if kind == "tensor" else scales, "a.input_scale": torch.ones(1)}
    if kind == "asym":
        tensors["a.weight_zero_point"] = words(zeros.t(), bits).t()
    if kind == "ordered":
        group = group[torch.randperm(COLS, generator=torch.Generator().manual_seed(2))]
        tensors["a.weight_g_idx"] = group.int()
    weights = {"num_bits": bits, "type": "int", "symmetric": kind != "asym"}
    weights |= (
        {"strategy": kind, "group_size": None}
        if kind in ("channel", "tensor")
        else {"strategy": "group", "group_size": G}
    )
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    want = scales[:, group] * (codes - shift).bfloat16()
    same(imported(save_quantized(tmp_path / "c", tensors, config)), want)
    if kind != "ordered":
        pytest.importorskip("compressed_tensors", reason="the format's own package is not installed")
        from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        parts = {n.removeprefix("a."): t for n, t in tensors.items() if n != "a.input_scale"}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        same(PackedQuantizationCompressor.decompress(parts, scheme)["weight"], want)


def test_compressed_tensors_in_float32_with_zeros(tmp_path: Path) -> None:
    """A product of a scale of 24 bits with a zero is not exact in float32, so that code - zero becomes the code."""
    codes, zeros, scales = numbers(9, 4)
    tensors = {
        "a.weight": (codes - 8).to(torch.int8),
        "a.weight_scale": scales,
        "a.weight_zero_point": (zeros - 8).to(torch.int8),
    }
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
    each = torch.arange(COLS) // G
    same(imported(save_quantized(tmp_path / "c", tensors, config)), scales[:, each] * (codes - zeros[:, each]).float())


def test_compressed_tensors_float8_in_blocks(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(3)
    codes = (torch.randn(ROWS, COLS, generator=rng) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=rng).bfloat16() / 100
    groups = {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 24]}}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    each = scales.repeat_interleave(8, 0).repeat_interleave(24, 1)[:, :COLS]
    path = save_quantized(tmp_path / "c", {"a.weight": codes, "a.weight_scale": scales}, config)
    same(imported(path), codes.bfloat16() * each)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_compressed_tensors_float4(tmp_path: Path, kind: str) -> None:
    """NVFP4 keeps its scales of 8 bits where multiplying by the inverse of the global scale rounds as dividing does."""
    rng = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (ROWS, COLS), generator=rng)
    length = 32 if kind == "mxfp4" else 16
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    tensors = {"a.weight_packed": packed}
    if kind == "mxfp4":
        exponents = torch.randint(110, 130, (ROWS, COLS // length), generator=rng)
        tensors["a.weight_scale"] = exponents.to(torch.uint8)
        scales = 2.0 ** (exponents - 127)
    else:
        small = (torch.rand(ROWS, COLS // length, generator=rng) * 400).to(torch.float8_e4m3fn)
        tensors |= {"a.weight_scale": small, "a.weight_global_scale": torch.tensor([1234.5])}
        scales = small.float() / 1234.5
    want = (E2M1[codes] * scales.repeat_interleave(length, 1)).bfloat16()
    config = {"quant_method": "compressed-tensors", "format": f"{kind}-pack-quantized", "config_groups": {}}
    same(imported(save_quantized(tmp_path / "c", tensors, config)), want)
    pytest.importorskip("compressed_tensors", reason="the format's own package is not installed")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if kind == "mxfp4" else "tensor_group"
    weights = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=length, symmetric=True)
    parts = {n.removeprefix("a."): t for n, t in tensors.items()}
    compressor = MXFP4PackedCompressor if kind == "mxfp4" else NVFP4PackedCompressor
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    same(compressor.decompress(parts, scheme)["weight"], want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cols", [64, 96])
def test_bitsandbytes(tmp_path: Path, kind: str, nested: bool, cols: int) -> None:
    """Blocks run over the ends of the rows where these hold no whole number of them."""
    rng, block = torch.Generator().manual_seed(6), 64
    codes = torch.randint(0, 16, (ROWS, cols), generator=rng)
    levels = torch.linspace(-1, 1, 16) ** 3
    flat, count = codes.flatten(), ROWS * cols // block
    absmax = torch.rand(count, generator=rng)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [ROWS, cols]}
    tensors = {"a.weight": (flat[::2] << 4 | flat[1::2]).to(torch.uint8)[:, None], "a.weight.quant_map": levels}
    if nested:
        small, inner = torch.randint(0, 256, (count,), generator=rng), torch.linspace(-1, 1, 256)
        outer = torch.rand(-(-count // 16), generator=rng)
        absmax = inner[small] * outer.repeat_interleave(16)[:count] + torch.tensor(1.25)
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 1.25}
        tensors |= {"a.weight.absmax": small.to(torch.uint8), "a.weight.nested_absmax": outer}
        tensors |= {"a.weight.nested_quant_map": inner}
    else:
        tensors["a.weight.absmax"] = absmax
    tensors[f"a.weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    want = (levels[flat] * absmax.repeat_interleave(block)).bfloat16().reshape(ROWS, cols)
    same(imported(save_quantized(tmp_path / "c", tensors, config)), want)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bitsandbytes_with_its_package(tmp_path: Path, kind: str, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the format's own package is not installed")
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(ROWS, 1024, generator=rng).to(dtype)
    data, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    tensors = {"a.weight": data} | {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    found = imported(save_quantized(tmp_path / "c", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    same(found, functional.dequantize_4bit(data, state))


@pytest.mark.parametrize(
    ("packing", "bits"), [("8bit_u8", 8), ("4bit_u8", 4), ("3bit_32", 3), ("2bit_u8", 2), ("1bit_u8", 1)]
)
def test_hqq(tmp_path: Path, packing: str, bits: int) -> None:
    rng = torch.Generator().manual_seed(8)
    groups = ROWS * COLS // G
    codes = torch.randint(0, 1 << bits, (groups, G), generator=rng)
    zeros = (torch.rand(groups, 1, generator=rng) * (1 << bits)).half()
    scales = (torch.rand(groups, 1, generator=rng) * 0.1).half()
    count = 10 if bits == 3 else 8 // bits
    rows = torch.cat([codes, torch.zeros(-groups % count, G, dtype=torch.int64)]).reshape(count, -1, G)
    packed = sum(rows[k] << bits * (count - 1 - k) for k in range(count))

    def text(value: str) -> torch.Tensor:
        return torch.tensor(list(value.encode()), dtype=torch.uint8)

    tensors = {"a.W_q": packed.to(torch.int32 if bits == 3 else torch.uint8), "a.scale": scales, "a.zero": zeros}
    tensors |= {"a.shape": torch.tensor([ROWS, COLS]), "a.packing": text(packing), "a.axis": torch.tensor(1).int()}
    tensors |= {"a.nbits": torch.tensor(bits).int(), "a.group_size": torch.tensor(G).int(), "a.bias": torch.ones(ROWS)}
    tensors |= {"a.view_as_float": torch.tensor(0).to(torch.uint8), "a.compute_dtype": text("torch.float16")}
    want = ((codes - zeros.float()) * scales.float()).reshape(ROWS, COLS)
    same(imported(save_quantized(tmp_path / "c", tensors, {"quant_method": "hqq"})), want)
    quantize = pytest.importorskip("hqq.core.quantize", reason="the format's own package is not installed")
    meta = {"packing": packing, "compute_dtype": torch.float32, "view_as_float": False, "nbits": bits, "group_size": G}
    meta |= {"axis": 1, "shape": (ROWS, COLS), "zero": zeros.float(), "scale": scales.float()}
    same(quantize.Quantizer.dequantize(tensors["a.W_q"], meta), want)


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    """Experts [2, rows, cols] become [2, cols, rows], as transformers has them."""
    rng = torch.Generator().manual_seed(10)
    codes = torch.randint(0, 16, (2, ROWS, COLS), generator=rng)
    exponents = torch.randint(115, 124, (2, ROWS, COLS // 32), generator=rng)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).reshape(2, ROWS, COLS // 32, 16)
    tensors = {"e.gate_up_proj_blocks": packed, "e.gate_up_proj_scales": exponents.to(torch.uint8)}
    tensors["e.gate_up_proj_bias"] = torch.ones(2, ROWS).bfloat16()
    want = (E2M1[codes] * (2.0 ** (exponents - 127)).repeat_interleave(32, 2)).bfloat16().transpose(1, 2)
    path = save_quantized(tmp_path / "c", tensors, {"quant_method": "mxfp4"})
    same(imported(path, "e.gate_up_proj"), want)
    with open_repo(tmp_path / "c-out") as repo:
        assert repo.manifest.tensors["e.gate_up_proj"].effective_bits == 6
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    same(convert_moe_packed_tensors(packed, exponents.to(torch.uint8)), want)


def test_paroquant(tmp_path: Path) -> None:
    """The rotation of the activations, as documented: y = W R (channel_scales x), computed here in float64."""
    codes, zeros, scales = numbers(11, 4)
    rng, rounds, half = torch.Generator().manual_seed(11), 3, scales.half()
    theta = torch.randn(rounds, COLS // 2, generator=rng).half()
    pairs = torch.stack(
        [torch.cat([torch.randperm(G, generator=rng) for _ in range(COLS // G)]) for _ in range(rounds)]
    )
    channel = (torch.rand(1, COLS, generator=rng) + 0.5).half()

    def interleaved(data: torch.Tensor) -> torch.Tensor:
        return words(data.reshape(len(data), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(data), -1), 4)

    tensors = {"a.qweight": interleaved(codes.t()), "a.qzeros": interleaved(zeros.t()), "a.scales": half.t()}
    tensors |= {"a.theta": theta, "a.pairs": pairs.short(), "a.channel_scales": channel}
    found = imported(
        save_quantized(
            tmp_path / "c", tensors, {"quant_method": "paroquant", "bits": 4, "group_size": G, "krot": rounds}
        )
    )
    x = torch.eye(COLS, dtype=torch.float64) * channel.double()  # a row for each unit vector
    for r in range(rounds):
        for t in range(COLS // 2):
            i, j = (int(pairs[r, 2 * t + k]) + 2 * t // G * G for k in (0, 1))
            c, s = theta[r, t].double().cos(), theta[r, t].double().sin()
            x[:, i], x[:, j] = x[:, i] * c + x[:, j] * s, x[:, j] * c - x[:, i] * s
    each = torch.arange(COLS) // G
    want = (half.double()[:, each] * (codes - zeros[:, each]) @ x.t()).float()
    assert found.dtype == torch.float32
    assert torch.allclose(found, want, rtol=0, atol=2e-6 * float(want.abs().max()))


LEVELS = {  # the positive ones of optimal_centroids(bits, 32) in turboquant-plus-vllm 0.13.12, to seven digits
    2: [0.08007984, 0.2669328],
    3: [0.0433269, 0.133644, 0.2375717, 0.3804137],
    4: [0.0222673, 0.06733998, 0.1141069, 0.164003, 0.2190933, 0.282876, 0.362664, 0.4803265],
}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_plus(tmp_path: Path, bits: int) -> None:
    """w = norm * D1 H D2 c / sqrt(group), the signs from torch's generator."""
    rng, group = torch.Generator().manual_seed(12), 32
    codes = torch.randint(0, 1 << bits, (ROWS, COLS), generator=rng)
    norms = torch.rand(ROWS, COLS // group, generator=rng) + 0.1
    packed = words(codes.reshape(-1, group), bits).view(torch.uint8)
    path = save_quantized(tmp_path / "c", {"a.weight.tq_packed": packed, "a.weight.tq_norms": norms}, {})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    config = {"format": "tq3_native", "bits": bits, "group_size": group, "quantizer_seed": 42}
    (path / "tq_config.json").write_text(json.dumps(config))
    found = imported(path)
    levels = [*(-level for level in reversed(LEVELS[bits])), *LEVELS[bits]]
    generator = torch.Generator().manual_seed(42)
    inner, outer = (torch.randint(0, 2, (group,), generator=generator).double() * 2 - 1 for _ in range(2))
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < group:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    c = torch.tensor(levels, dtype=torch.float64)[codes].reshape(-1, group)
    want = norms.reshape(-1, 1) * ((c * outer) @ hadamard * inner) / group**0.5
    want = want.reshape(ROWS, COLS).float()
    assert found.dtype == torch.float32
    assert torch.allclose(found, want, rtol=0, atol=2e-6 * float(want.abs().max()))


def test_a_learned_rotation(tmp_path: Path) -> None:
    """w = norm * R^t c, the rotation stored."""
    rng, group, bits = torch.Generator().manual_seed(13), 32, 3
    codes = torch.randint(0, 1 << bits, (ROWS, COLS), generator=rng)
    norms, levels = torch.rand(ROWS, COLS // group, generator=rng) + 0.1, torch.randn(1 << bits, generator=rng)
    rotation = torch.linalg.qr(torch.randn(group, group, generator=rng, dtype=torch.float64))[0].float()
    tensors = {"a.packed_weight": words(codes.reshape(-1, group), bits).view(torch.uint8), "a.norms": norms}
    tensors |= {"a.tq_centroids": levels, "a.rotation": rotation}
    found = imported(save_quantized(tmp_path / "c", tensors, {"quant_method": "tq3_native", "group_size": group}))
    want = levels[codes].reshape(-1, group).double() @ rotation.double() * norms.reshape(-1, 1)
    assert torch.allclose(found, want.reshape(ROWS, COLS).float(), rtol=0, atol=2e-6 * float(want.abs().max()))


def test_leanquant(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(14)
    codes = torch.randint(0, 8, (ROWS, COLS), generator=rng)
    grid = torch.randn(ROWS, 8, generator=rng).half()
    tensors = {"a.quant_grid": grid, "a.weight_codes": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)}
    path = save_quantized(tmp_path / "c", tensors, {})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    same(imported(path), grid.gather(1, codes))
