"""Which checkpoints `import` takes: a model from end to end, what is refused, and what stays behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Tensors, make_tokenizer, save_quantized, words
from safetensors.torch import load_file, save_file

from reference_quantizer.__main__ import main
from tqformat import load, open_repo


def gptq_model(path: Path) -> Tensors:
    """A tiny Llama whose linear layers are GPTQ's, in `path`; the decoded weights by name."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, dtype="float16"
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(path)
    make_tokenizer(path)
    state = load_file(path / "model.safetensors")
    rng, tensors, decoded = torch.Generator().manual_seed(0), {}, {}
    for name, weight in state.items():
        if "proj" not in name:
            tensors[name] = decoded[name] = weight
            continue
        rows, cols = weight.shape
        codes, stem = torch.randint(0, 16, (rows, cols), generator=rng), name.removesuffix(".weight")
        scales = (torch.rand(rows, cols // 16, generator=rng) * 0.02).half()
        decoded[name] = scales.repeat_interleave(16, 1) * (codes - 8).half()
        tensors |= {f"{stem}.qweight": words(codes.t().t(), 4).t(), f"{stem}.scales": scales.t()}
        tensors[f"{stem}.qzeros"] = words(torch.full((cols // 16, rows), 7), 4)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    written = json.loads((path / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
    (path / "config.json").write_text(json.dumps(written))
    return decoded


def test_a_model_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoded = gptq_model(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text(
        "Permission is hereby granted, free of charge ... THE SOFTWARE IS PROVIDED"
    )
    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "model"), str(out), "--base-model", "org/base"]) == 0
    told = capsys.readouterr().out
    parameters = dict(load(out).named_parameters())
    assert parameters.keys() >= decoded.keys() - {"lm_head.weight"}
    assert all(
        parameters[name].dtype == torch.float16 and torch.equal(parameters[name], decoded[name]) for name in decoded
    )
    with open_repo(out) as repo:
        assert repo.manifest.base_model["id"] == "org/base" and repo.manifest.base_model["license"] == "mit"
        assert repo.manifest.quantization["method"] == "import_gptq" and repo.manifest.quantization["bits"] == 4
        assert not repo.manifest.features  # no zero points: all are 8
        assert {"tokenizer.json", "LICENSE", "load_quantized.py"} <= set(repo.manifest.files)
        there = sum(t.nbytes for t in load_file(tmp_path / "model" / "model.safetensors").values())
    assert f"there (gptq, {there:,} bytes)" in told
    assert main(["import", str(tmp_path / "model"), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path / "model"), str(tmp_path / "no")]) == 1
    assert "keep its values: import" in capsys.readouterr().err


def refused(tmp_path: Path, tensors: Tensors, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    path = save_quantized(tmp_path / f"c{len(list(tmp_path.iterdir()))}", tensors, config)
    before = set(tmp_path.iterdir())
    assert main(["import", str(path), str(tmp_path / "out"), "--quiet"]) == 1
    assert set(tmp_path.iterdir()) == before, "something was left behind"
    return capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(tensors: Tensors, **config: Any) -> str:
        return refused(tmp_path, tensors, config, capsys)

    floats, codes = torch.ones(8, 16), torch.zeros(8, 16, dtype=torch.int8)
    zeros, scales = torch.full((2, 1), -1, dtype=torch.int32), torch.ones(2, 8).half()
    gptq = {"a.qweight": torch.zeros(2, 8, dtype=torch.int32), "a.qzeros": zeros, "a.scales": scales}
    assert "expected one of gguf, gptq" in error({"a.weight": floats}, quant_method="quip")
    assert "read as 0 or as the next power of two" in error(gptq, quant_method="gptq", bits=4, group_size=8)
    assert "is that of a kernel" in error(gptq, quant_method="gptq", bits=4, group_size=8, checkpoint_format="marlin")
    assert "other parts are not there" in error({"a.scales": scales}, quant_method="gptq")
    assert "ends in .scales" in error({"a.qweight": gptq["a.qweight"]}, quant_method="gptq", bits=4)
    assert "do not fit" in error(
        gptq | {"a.scales": torch.ones(2, 9).half()}, quant_method="gptq", bits=4, group_size=8
    )
    assert "expected AWQ of version gemm" in error(gptq, quant_method="awq", bits=4, version="gemv")
    assert "codes of I8" in error({"a.weight": codes, "a.SCB": torch.ones(8)}, quant_method="bitsandbytes")
    sparse = {"a.weight_packed": codes.int(), "a.weight_scale": scales}
    whole = {
        "a.weight_packed": codes[:, ::4].int(),
        "a.weight_scale": scales.t(),
        "a.weight_shape": torch.tensor([8, 16]),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 7, "strategy": "group", "group_size": 8}}}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    assert "its words hold 8 bits for each weight, config.json says 7" in error(whole, **packed)
    assert "leaves weights out" in error(sparse, quant_method="compressed-tensors", format="marlin-24")
    text = {
        key: torch.tensor(list(value.encode()), dtype=torch.uint8) for key, value in {"p": "8bit_u8", "q": "9"}.items()
    }
    hqq = {"a.W_q": codes.to(torch.uint8), "a.scale": torch.ones(8, 1), "a.zero": torch.ones(8, 1)}
    hqq |= {"a.shape": torch.tensor([8, 16]), "a.packing": text["p"], "a.axis": torch.tensor(0)}
    assert "quantize with axis=1" in error(hqq, quant_method="hqq")
    assert "packing '9'" in error(hqq | {"a.axis": torch.tensor(1), "a.packing": text["q"]}, quant_method="hqq")
    wide = {"a_blocks": torch.zeros(1, 200, 1, 16, dtype=torch.uint8) + 1}
    wide["a_scales"] = torch.arange(200).to(torch.uint8).reshape(1, 200, 1)
    assert "exponents reach from 0 to 199" in error(wide, quant_method="mxfp4")
    short = {"a.weight.tq_packed": torch.zeros(8, 4, dtype=torch.uint8), "a.weight.tq_norms": torch.ones(8, 1)}
    config = {"quant_method": "tq3_native", "group_size": 16, "orig_in_dims": {"a.weight": 12}}
    assert "divides 12" in error(short, **config)


def test_a_plain_checkpoint_is_for_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_quantized(tmp_path / "c", {"a.weight": torch.ones(8, 16)}, {})
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert main(["import", str(path), str(tmp_path / "out")]) == 1
    assert "names no quantization_config" in capsys.readouterr().err


def test_a_hub_id_is_no_place_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever names the new directory like the Hub's repository replaces nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["import", "owner/name", "owner/name"]) == 1  # offline
    assert "the checkpoint cannot be fetched" in capsys.readouterr().err


def test_old_files_of_gptq(tmp_path: Path) -> None:
    """AutoGPTQ once wrote its settings to a file of their own."""
    gptq_model(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    (tmp_path / "c" / "quantize_config.json").write_text(json.dumps(settings))
    assert main(["import", str(tmp_path / "c"), str(tmp_path / "out"), "--quiet"]) == 0
    with open_repo(tmp_path / "out") as repo:
        assert (
            repo.manifest.quantization["method"] == "import_gptq" and "quantize_config.json" not in repo.manifest.files
        )
