"""A GGUF file, imported without decoding: its blocks, the order of its rows, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_gguf

from reference_quantizer.__main__ import main
from reference_quantizer.foreign import gguf_blocks
from tqformat import load, load_tokenizer, open_repo

pytest.importorskip("gguf")
NAME = "small.gguf"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "BF16"])
def test_the_model_is_the_one_that_transformers_reads(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parameters and the logits, bit for bit; the rows of q and k stand in another order in the file."""
    import transformers

    make_gguf(tmp_path / NAME, kind=kind)
    out = tmp_path / "made" / "out"
    assert main(["import", str(tmp_path / NAME), str(out), "--quiet"]) == 0
    told = capsys.readouterr().out
    ours = load(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype == torch.float32 and torch.equal(tensor, other[name]), name
    tokens = torch.tensor([[0, 5, 9, 44]])
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert load_tokenizer(out)("ab!").input_ids == [95, 2]
    with open_repo(out) as repo:
        m = repo.manifest
        kinds = {w.dtype for w in m.tensors.values() if len(w.shape) == 2}
        assert kinds == {"BF16" if kind == "BF16" else "F32"}
        assert m.base_model["id"] == "small" and m.base_model["license"] == "mit"
        assert m.base_model["extra"]["imported_from"]["tensor_types"] == {"F32": 5, kind: 15}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == ["LlamaForCausalLM"]
    bits = {"Q8_0": "8.5", "Q4_1": "5.1", "Q5_0": "5.6", "BF16": "16.0"}[kind]
    assert f"bits per weight: {bits}" in told and "there (gguf, " in told


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    out = path.with_name("out")
    assert main(["import", str(path), str(out), "--quiet"]) == 1
    assert not [p for p in path.parent.iterdir() if "out" in p.name], "something was left behind"
    return capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as utils

    path = tmp_path / NAME
    make_gguf(path, leave_out="blk.1.ffn_up.weight")
    assert "[BIND.MODEL]" in refused(path, capsys)
    make_gguf(path, add="blk.0.attn_sinks.weight")
    assert "[BIND.MODEL]" in refused(path, capsys)
    make_gguf(path)
    with monkeypatch.context() as patch:
        patch.delitem(gguf_blocks.TYPES, "Q8_0")
        error = refused(path, capsys)
        assert "[UNSUPPORTED.LIBRARY]" in error and "15 tensors have the type Q8_0" in error and "import-gguf" in error
    with monkeypatch.context() as patch:

        def transposed(self: object, weights: object, name: str, **_: object) -> object:
            return utils.GGUFTensor(weights.T if "ffn_up" in name else weights, name, {})  # type: ignore[attr-defined]

        patch.setattr(utils.LlamaTensorProcessor, "process", transposed)
        error = refused(path, capsys)
        assert "more than put rows in another order" in error and "mlp.up_proj" in error
    assert main(["import", str(path), str(tmp_path / "o"), "--revision", "main"]) == 1
