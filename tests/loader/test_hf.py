"""transformers' own from_pretrained on tqformat repositories, with tqformat.hf and without."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import run_python
from helpers import MODELS, Lab, make_gguf, manifest_of
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import tqformat
from reference_quantizer.__main__ import main
from tqformat import TQFormatError, add_files, packed
from tqformat.packed import PackedWeight

pytestmark = pytest.mark.filterwarnings("ignore:products of packed weights")
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as the reference quantizer writes it."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    assert main(["quantize", str(lab.base), str(lab.path / "release"), "--preset", "fast", "--bits", "4"]) == 0
    return lab.path / "release"


@pytest.fixture
def hf() -> Iterator[Any]:
    """tqformat.hf, whose patch lasts as long as the test."""
    plain = transformers.PreTrainedModel.__dict__["from_pretrained"]
    import tqformat.hf as hf

    transformers.PreTrainedModel.from_pretrained = classmethod(hf.from_pretrained)
    yield hf
    transformers.PreTrainedModel.from_pretrained = plain


def test_a_release_says_its_method_and_names_no_weights(release: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "tqformat"} and "transformers_weights" not in config
    assert not [name for name in manifest_of(release)["files"] if name.startswith("model") or "index" in name]


def test_without_the_import_there_is_an_error_and_no_random_model(release: Path) -> None:
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(release)!r})"
    done = run_python("-c", code)
    assert done.returncode == 1 and "no file named model.safetensors" in done.stderr.splitlines()[-1]


def test_from_pretrained_is_packed(release: Path, hf: Any) -> None:
    plain = tqformat.load(release)
    for model in (
        AutoModelForCausalLM.from_pretrained(release),
        AutoModelForCausalLM.from_pretrained(str(release), device_map="cpu", dtype="auto"),
        LlamaForCausalLM.from_pretrained(release, attn_implementation="eager"),
    ):
        assert isinstance(model.lm_head.weight, PackedWeight) and model.is_quantized and not model.training
        assert model.hf_quantizer.quantization_config.quant_method == "tqformat" and model.dtype == plain.dtype
        assert model.name_or_path == str(release) and model.generation_config.eos_token_id == 2
        with torch.no_grad():
            assert torch.allclose(
                model(IDS).logits, plain(IDS).logits, atol=1e-4 * float(plain(IDS).logits.abs().max())
            )
    assert model.config._attn_implementation == "eager"
    half = AutoModelForCausalLM.from_pretrained(release, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    model, info = AutoModelForCausalLM.from_pretrained(release, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_experts_run_as_the_user_asks(hf: Any, tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    MODELS["mixtral"][0]().save_pretrained(lab.base)
    assert main(["quantize", str(lab.base), str(tmp_path / "release"), "--preset", "fast", "--bits", "4"]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "release", experts_implementation="batched_mm")
    for options, way in (
        ({}, "eager"),
        ({"experts_implementation": "grouped_mm"}, "grouped_mm"),
        ({"config": config}, "batched_mm"),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "release", **options)
        assert model.config._experts_implementation == way and any(
            p.dim() > 2 for p in packed.packed_weights(model).values()
        )


def test_dequantize(release: Path, hf: Any, tmp_path: Path) -> None:
    for chosen in (hf.TQFormatConfig(dequantize=True), {"quant_method": "tqformat", "dequantize": True}):
        model = AutoModelForCausalLM.from_pretrained(release, quantization_config=chosen)
        assert not packed.packed_weights(model) and not getattr(model, "is_quantized", False)
    assert torch.equal(model.lm_head.weight, tqformat.load(release).lm_head.weight)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(TQFormatError, match="TQFormatConfig"):
        AutoModelForCausalLM.from_pretrained(release, quantization_config=transformers.GPTQConfig(4))


def test_names_are_compared_before_anything_is_loaded(
    release: Path, hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((release / "config.json").read_text())
    copied = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(release).save_pretrained(copied)
    monkeypatch.setattr(packed.PackedRepo, "dequantize", lambda *_: pytest.fail("a weight was read"))
    for change, words in (({"num_hidden_layers": 3}, "no missing keys"), ({"num_hidden_layers": 1}, "no unexpected keys"),
                          ({"intermediate_size": 64}, "no mismatched keys")):  # fmt: skip
        add_files(copied, {"config.json": ("support", json.dumps({**config, **change}).encode())})
        with pytest.raises(TQFormatError, match=f"BIND.MODEL.*{words}"):
            AutoModelForCausalLM.from_pretrained(copied)
    with pytest.raises(TQFormatError, match=r"BIND.MODEL.*lm_head"):
        AutoModel.from_pretrained(release)


def test_a_pipeline(release: Path, hf: Any, capfd: pytest.CaptureFixture[str]) -> None:
    answer = transformers.pipeline("text-generation", str(release))("w1 w2 w3", max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"].startswith("w1 w2 w3")


def test_other_checkpoints_are_left_alone(release: Path, hf: Any, tmp_path: Path) -> None:
    plain = tqformat.export_safetensors(release, tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    model, other = AutoModelForCausalLM.from_pretrained(plain), LlamaForCausalLM.from_pretrained(plain)
    assert not packed.packed_weights(model) and torch.equal(model.lm_head.weight, other.lm_head.weight)
    with pytest.raises(OSError, match=r"config.json|model.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_file_of_gguf_without_a_configuration_is_left_to_transformers(hf: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    commit = "a" * 40
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    make_gguf(cached / "snapshots" / commit / "model.gguf")
    where = {"gguf_file": "model.gguf", "cache_dir": str(tmp_path), "local_files_only": True}
    assert isinstance(LlamaForCausalLM.from_pretrained("org/name", **where), LlamaForCausalLM)


@pytest.mark.parametrize("option", [{"subfolder": ".part"}, {"variant": "fp16"}])
def test_options_that_name_other_weights_are_refused(
    release: Path, hf: Any, tmp_path: Path, option: dict[str, str]
) -> None:
    copied = shutil.copytree(release, tmp_path / "copy")
    (copied / ".part").mkdir()
    shutil.copy(copied / "config.json", copied / ".part")
    with pytest.raises(TQFormatError, match=rf"SCHEMA.UNKNOWN_FIELD\] {next(iter(option))}"):
        LlamaForCausalLM.from_pretrained(copied, **option)


def test_another_configuration_by_its_path(release: Path, hf: Any, tmp_path: Path) -> None:
    config = json.loads((release / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    assert LlamaForCausalLM.from_pretrained(release, config=tmp_path).config.rms_norm_eps == 0.25


def test_the_digests_of_code_are_compared_before_it_is_trusted(release: Path, hf: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(release, tmp_path / "copy")
    loader = copied / "load_quantized.py"
    loader.write_bytes(loader.read_bytes().replace(b"SPEC", b"spec", 1))
    AutoModelForCausalLM.from_pretrained(copied)
    with pytest.raises(TQFormatError, match=r"BIND.DIGEST\] load_quantized.py"):
        AutoModelForCausalLM.from_pretrained(copied, trust_remote_code=True)
