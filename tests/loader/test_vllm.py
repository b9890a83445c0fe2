"""The vLLM plugin against a stand-in of the few names of vLLM that it uses; benchmarks/serving.py runs it in the real one."""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, edit_manifest

from tqformat import TQFormatError, load_state_dict


class LinearBase(torch.nn.Module):
    pass


class Loader:  # of files, in vLLM: DefaultModelLoader
    def __init__(self, download_dir: str | None = None, local_expert_ids: set[int] | None = None) -> None:
        self.load_config = SimpleNamespace(download_dir=download_dir)
        self.local_expert_ids, self.enable_weights_track = local_expert_ids, None

    def get_all_weights(self, model_config: Any, model: Any) -> Any:
        yield "plain", None

    def download_model(self, model_config: Any) -> None:
        model_config.downloaded = True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, registered in the stand-in; `loader` and `methods` are what it changed there."""
    methods: dict[str, Any] = {}
    loader = type("DefaultModelLoader", (Loader,), {})
    names: dict[str, dict[str, Any]] = {
        "layers.linear": {"LinearBase": LinearBase, "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {})},
        "layers.quantization": {"register_quantization_config": lambda name: lambda cls: methods.update({name: cls})},
        "layers.quantization.base_config": {"QuantizationConfig": type("QuantizationConfig", (), {})},
        "model_loader.default_loader": {"DefaultModelLoader": loader},
        "model_loader.ep_weight_filter": {
            "should_skip_weight": lambda name, local: local is not None and name == "row"
        },
    }
    for path in ("vllm", "vllm.model_executor", *(f"vllm.model_executor.{key}" for key in ("layers", "model_loader"))):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for key, content in names.items():
        module = ModuleType(f"vllm.model_executor.{key}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    engine, config = SimpleNamespace(load_config=SimpleNamespace(load_format="auto")), ModuleType("vllm.config")
    config.get_current_vllm_config = lambda: engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.delitem(sys.modules, "tqformat.vllm", raising=False)
    plugin = importlib.import_module("tqformat.vllm")
    monkeypatch.delitem(sys.modules, "tqformat.vllm")  # undone afterwards: the next test imports it anew
    for _ in range(2):  # vLLM asks that plugins stand it
        plugin.register()
    return SimpleNamespace(plugin=plugin, loader=loader, methods=methods, engine=engine)


def settings(path: Path | str, tied: bool = True, quantization: str | None = "tqformat") -> Any:
    hf_config = SimpleNamespace(tie_word_embeddings=tied)
    return SimpleNamespace(model=str(path), revision=None, quantization=quantization, hf_config=hf_config)


def test_weights_come_decoded_under_the_names_of_the_checkpoint(vllm: Any, settings_repo: Path) -> None:
    expected, loader = load_state_dict(settings_repo), vllm.loader()
    found = dict(loader.get_all_weights(settings(settings_repo), torch.nn.Linear(1, 1)))
    assert found.keys() == expected.keys() - {"plain.alias"}  # the model ties by its own rule [TQ-TIE-2]
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    assert loader.enable_weights_track is True  # so that vLLM raises where a weight did not come


def test_a_model_that_ties_nothing_gets_the_aliases(vllm: Any, settings_repo: Path) -> None:
    found = dict(vllm.loader().get_all_weights(settings(settings_repo, tied=False), torch.nn.Linear(1, 1)))
    assert torch.equal(found["plain.alias"], found["plain"])


def test_experts_of_other_ranks_are_not_decoded(vllm: Any, settings_repo: Path) -> None:
    loader = vllm.loader(local_expert_ids={0})
    found = dict(loader.get_all_weights(settings(settings_repo), torch.nn.Linear(1, 1, device="meta")))
    assert "row" not in found and "plain" in found


def test_other_checkpoints_are_left_to_vllm(vllm: Any) -> None:
    other, loader = settings("owner/name", quantization=None), vllm.loader()
    assert list(loader.get_all_weights(other, torch.nn.Linear(1, 1))) == [("plain", None)]
    loader.download_model(other)
    assert other.downloaded and loader.enable_weights_track is None


def test_a_broken_repository_is_an_error(vllm: Any, settings_repo: Path) -> None:
    edit_manifest(settings_repo, lambda m: m["tensors"].pop("plain"))
    with pytest.raises(TQFormatError, match="BIND"):
        list(vllm.loader().get_all_weights(settings(settings_repo), torch.nn.Linear(1, 1)))


def test_what_cannot_be_obeyed_is_refused(vllm: Any, settings_repo: Path) -> None:
    with pytest.raises(TQFormatError, match=r"download_dir.*HF_HOME"):
        vllm.loader(download_dir="elsewhere").download_model(settings(settings_repo))
    model = torch.nn.Linear(1, 1)
    model.secondary_weights = [SimpleNamespace()]  # type: ignore[assignment]
    with pytest.raises(TQFormatError, match="all weights in one repository"):
        list(vllm.loader().get_all_weights(settings(settings_repo), model))


def test_layers_are_plain(vllm: Any) -> None:
    config = vllm.methods["tqformat"].from_config({"quant_method": "tqformat"})
    assert config.get_name() == "tqformat" and torch.float16 in config.get_supported_act_dtypes()
    assert type(config.get_quant_method(LinearBase(), "a")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(1, 1), "b") is None


def test_load_formats_that_read_files_by_themselves_are_refused(vllm: Any) -> None:
    config = vllm.methods["tqformat"].from_config({"quant_method": "tqformat"})
    vllm.engine.load_config.load_format = "runai_streamer"
    with pytest.raises(TQFormatError, match=r"load_format: expected one of auto, .* got runai_streamer"):
        config.get_quant_method(LinearBase(), "a")


def test_the_entry_point_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\ntqformat = "tqformat\.vllm:(\w+)"', text)
    functions = {
        node.name
        for node in ast.parse((ROOT / "tqformat" / "vllm.py").read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert found and found[1] in functions
