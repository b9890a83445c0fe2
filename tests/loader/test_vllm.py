"""The vLLM plugin against a stand-in of the few names of vLLM that it uses; benchmarks/serving.py runs it in the real one."""

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, edit_manifest
from torch import Tensor
from torch.nn import functional

from tqformat import TQFormatError, load_state_dict
from tqformat.packed import PackedWeight


class LinearBase(torch.nn.Module):
    pass


class UnquantizedMethod:  # UnquantizedLinearMethod and UnquantizedEmbeddingMethod
    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, weight_loader: Any) -> None:
        layer.weight = torch.nn.Parameter(torch.empty(layer.rows, layer.cols, dtype=params_dtype), requires_grad=False)
        layer.weight.weight_loader = weight_loader

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.plain = True

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return functional.embedding(ids, layer.weight)


class VocabParallelEmbedding(torch.nn.Module):
    """One rank's rows from `first`, filled up to `rows`."""

    def __init__(self, first: int, own: int, rows: int, cols: int, added: int = 0) -> None:
        super().__init__()
        self.shard_indices = SimpleNamespace(org_vocab_start_index=first)
        self.num_org_embeddings_per_partition, self.num_added_embeddings = own, added
        self.num_embeddings_per_partition = self.rows = rows
        self.cols = self.embedding_dim = cols
        self.params_dtype = torch.float32

    def weight_loader(self, param: Any, weight: Tensor) -> None:
        own = self.num_org_embeddings_per_partition
        param.data[:own].copy_(weight.narrow(0, self.shard_indices.org_vocab_start_index, own))
        param.data[own:].fill_(0)


class ModelWeightParameter(torch.nn.Parameter):
    """Of one rank; the methods take a whole weight of the checkpoint."""

    tp_rank = 0

    def __new__(cls, data: Tensor, **_: Any) -> Any:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, input_dim: int, output_dim: int, weight_loader: Any) -> None:
        assert (input_dim, output_dim) == (1, 0)
        self.weight_loader = weight_loader

    def load_column_parallel_weight(self, weight: Tensor) -> None:
        self.data.copy_(weight.narrow(0, self.tp_rank * len(self), len(self)))

    def load_row_parallel_weight(self, weight: Tensor) -> None:
        self.data.copy_(weight.narrow(1, self.tp_rank * self.shape[1], self.shape[1]))

    def load_merged_column_weight(self, weight: Tensor, *, shard_offset: int, shard_size: int, shard_id: int) -> None:
        self.data[shard_offset:][:shard_size].copy_(weight.narrow(0, self.tp_rank * shard_size, shard_size))

    def load_qkv_weight(
        self, weight: Tensor, *, num_heads: int, shard_offset: int, shard_size: int, shard_id: str
    ) -> None:
        rank = self.tp_rank if shard_id == "q" else self.tp_rank // num_heads
        self.data[shard_offset:][:shard_size].copy_(weight.narrow(0, rank * shard_size, shard_size))


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
        "layers.linear": {
            "LinearBase": LinearBase,
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (UnquantizedMethod,), {}),
            "register_weight_loader_v2_supported_method": lambda cls: methods.update({cls.__name__: cls}) or cls,
        },
        "layers.vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding,
            "UnquantizedEmbeddingMethod": type("UnquantizedEmbeddingMethod", (UnquantizedMethod,), {}),
        },
        "parameter": {"ModelWeightParameter": ModelWeightParameter},
        "utils": {"set_weight_attrs": lambda param, attributes: None},
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
    platform, platforms = SimpleNamespace(is_cpu=lambda: True), ModuleType("vllm.platforms")
    platforms.current_platform = platform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.delitem(sys.modules, "tqformat.vllm", raising=False)
    plugin = importlib.import_module("tqformat.vllm")
    monkeypatch.delitem(sys.modules, "tqformat.vllm")  # undone afterwards: the next test imports it anew
    for _ in range(2):  # vLLM asks that plugins stand it
        plugin.register()
    return SimpleNamespace(plugin=plugin, loader=loader, methods=methods, engine=engine, platform=platform)


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


# ------------------------------------------------------------------------------------------------------- packed layers

pytestmark = pytest.mark.filterwarnings("ignore:products of packed weights")


@pytest.fixture
def method(vllm: Any) -> Callable[[Any], Any]:
    """What the plugin gives a layer where packed weights are asked for."""
    if vllm.plugin.kernels() is None:
        pytest.skip("needs tqformat-kernels")
    config, names = vllm.methods["tqformat"].from_config({"packed": True}), map(str, itertools.count())
    return lambda layer: config.get_quant_method(layer, next(names))


def test_matrices_alone_come_packed(vllm: Any, method: Any, settings_repo: Path) -> None:
    plain = load_state_dict(settings_repo)
    found = weights_for(vllm, settings_repo, linear_layer(method, [3], 48))
    assert {name for name, value in found.items() if isinstance(value, PackedWeight)} == {
        *("plain", "hadamard", "dense", "givens", "vector", "trellis", "ternary", "stages", "empty", "offsets"),
        *("fine", "exponents"),
    }
    assert all(torch.equal(value.clone() + 0, plain[name] + 0) for name, value in found.items())


def linear_layer(method: Any, rows: list[int], cols: int, rank: int = 0) -> Any:
    layer: Any = LinearBase()
    layer.quant_method = method(layer)
    sizes = (cols, rows, 2 * cols, 2 * sum(rows), torch.float32)
    layer.quant_method.create_weights(layer, *sizes, weight_loader=None)
    layer.weight.tp_rank = rank
    return layer


def weights_for(vllm: Any, repo: Path, layer: torch.nn.Module) -> dict[str, Any]:
    return dict(vllm.loader().get_all_weights(settings(repo), layer))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_multiplies_from_its_packed_rows(vllm: Any, method: Any, settings_repo: Path, rank: int) -> None:
    """q of two heads, k and v of one that both ranks have, and two matrices that are merged."""
    plain, x = load_state_dict(settings_repo), torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    layer = linear_layer(method, [3, 6, 6], 48, rank)
    found = weights_for(vllm, settings_repo, layer)
    at = {"num_heads": 2, "shard_size": 6}
    layer.weight.load_qkv_weight(found["plain"], shard_id="q", num_heads=2, shard_offset=0, shard_size=3)
    layer.weight.load_qkv_weight(found["dense"], shard_id="k", shard_offset=3, **at)
    layer.weight.load_qkv_weight(found["givens"], shard_id="v", shard_offset=9, **at)
    layer.quant_method.process_weights_after_loading(layer)
    assert len(layer.packed) == 3 and layer.weight.numel() == 0 and not hasattr(layer, "plain")
    wanted = torch.cat([plain["plain"][3 * rank :][:3].float(), plain["dense"], plain["givens"]])
    y = layer.quant_method.apply(layer, x, torch.ones(15))
    assert torch.allclose(
        y, x @ wanted.T + 1, atol=2**-6 * float(x.norm(dim=1).max())
    )  # "plain" is rounded to bfloat16

    layer = linear_layer(method, [3, 3], 48, rank)
    for i in range(2):
        layer.weight.load_merged_column_weight(found["dense"], shard_id=i, shard_offset=3 * i, shard_size=3)
    layer.quant_method.process_weights_after_loading(layer)
    (merged,) = layer.packed
    assert torch.equal(merged.decode(), torch.cat([plain["dense"][3 * rank :][:3]] * 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_multiplies_from_its_packed_columns(vllm: Any, method: Any, settings_repo: Path, rank: int) -> None:
    plain, x = load_state_dict(settings_repo), torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    layer = linear_layer(method, [6], 24, rank)
    layer.weight.load_row_parallel_weight(weights_for(vllm, settings_repo, layer)["dense"])
    layer.quant_method.process_weights_after_loading(layer)
    wanted = plain["dense"].narrow(1, 24 * rank, 24)
    assert layer.packed and torch.allclose(layer.quant_method.apply(layer, x), x @ wanted.T, atol=1e-4)
    layer = linear_layer(method, [3], 48, rank)
    layer.weight.load_column_parallel_weight(weights_for(vllm, settings_repo, layer)["dense"])
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.packed[0].decode(), plain["dense"][3 * rank :][:3])


def test_a_layer_of_which_a_part_cannot_stay_packed_is_decoded(
    vllm: Any, method: Any, settings_repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No fast product ("vector"), a share that would cut a tile ("trellis") or a block ("hadamard"); it is said in a line."""
    caplog.set_level("INFO", "vllm.tqformat")
    plain = load_state_dict(settings_repo)
    layer = linear_layer(method, [3, 3, 3], 48)
    weights = vllm.loader().get_all_weights(settings(settings_repo), layer)
    for name, weight in weights:
        if name in ("dense", "vector", "trellis"):
            i = ("dense", "vector", "trellis").index(name)
            layer.weight.load_merged_column_weight(weight, shard_id=i, shard_offset=3 * i, shard_size=3)
    assert [record.getMessage() for record in caplog.records] == [
        "tqformat: 1 of 1 layers cannot stay packed here: weight"
    ]
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.packed is None and layer.plain
    assert torch.equal(layer.weight, torch.cat([plain[name][:3] for name in ("dense", "vector", "trellis")]))
    layer = linear_layer(method, [6], 12)
    layer.weight.load_row_parallel_weight(weights_for(vllm, settings_repo, layer)["hadamard"])
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.quant_method.apply(layer, torch.eye(12)), plain["hadamard"][:, :12].float().T)


@pytest.mark.parametrize("name", ["dense", "vector"])  # packed, and decoded
def test_embedding_and_output_layer(vllm: Any, method: Any, settings_repo: Path, name: str) -> None:
    """The second of two ranks, whose rows are filled up to four; the output layer is tied as vLLM ties it."""
    wanted = load_state_dict(settings_repo)[name][3:]
    layer, head = VocabParallelEmbedding(3, 3, 4, 48), VocabParallelEmbedding(3, 3, 4, 48)
    for one in (layer, head):
        one.quant_method = method(one)
        one.quant_method.create_weights(one, params_dtype=torch.float32, weight_loader=one.weight_loader)
    head.weight = layer.weight
    layer.weight.weight_loader(layer.weight, weights_for(vllm, settings_repo, layer)[name])  # type: ignore[operator]
    for one in (layer, head):
        one.quant_method.process_weights_after_loading(one)
        assert (one.packed is None) == (name == "vector")
    ids, x = torch.tensor([[2, 0], [1, 1]]), torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer.quant_method.embedding(layer, ids), wanted[ids])
    logits = head.quant_method.apply(head, x)
    assert logits.shape == (3, 4) and not logits[:, 3].any()
    assert torch.allclose(logits[:, :3], x @ wanted.T, atol=1e-4)
    assert method(VocabParallelEmbedding(3, 3, 5, 48, added=1)) is None


def test_layers_are_compiled(vllm: Any, method: Any, settings_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the same program, packed or not, with operators by names: vLLM keeps such programs for other processes."""
    monkeypatch.setitem(sys.modules, "tqformat.vllm", vllm.plugin)  # Dynamo asks for it
    x, ids = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    for name in ("dense", "vector"):
        layer, table = linear_layer(method, [6], 48), VocabParallelEmbedding(3, 3, 4, 48)
        table.quant_method = method(table)
        table.quant_method.create_weights(table, params_dtype=torch.float32, weight_loader=table.weight_loader)
        weight = weights_for(vllm, settings_repo, layer)[name]
        layer.weight.load_column_parallel_weight(weight)
        table.weight.weight_loader(table.weight, weight)  # type: ignore[operator]
        layer.quant_method.process_weights_after_loading(layer)
        table.quant_method.process_weights_after_loading(table)
        graphs: list[str] = []

        def backend(graph: Any, _: Any, graphs: list[str] = graphs) -> Any:
            graphs.append(graph.code)
            return graph.forward

        def step(layer: Any = layer, table: Any = table) -> tuple[Tensor, Tensor]:
            y = layer.quant_method.apply(layer, x, None) * 2
            return y, table.quant_method.embedding(table, ids)

        for found, wanted in zip(torch.compile(step, backend=backend, fullgraph=True)(), step(), strict=True):
            assert torch.equal(found, wanted)
        (code,) = graphs
        assert all(f"'{one.quant_method.name}')" in code for one in (layer, table)) and "weight" not in code


def test_names_of_packed_layers_are_those_of_one_model(vllm: Any) -> None:
    if vllm.plugin.kernels() is None:
        pytest.skip("needs tqformat-kernels")
    config = vllm.methods["tqformat"].from_config({"packed": True})
    layer = linear_layer(lambda layer: config.get_quant_method(layer, "q"), [6], 48)
    with pytest.raises(TQFormatError, match="q: expected one packed layer of this name"):
        linear_layer(lambda layer: config.get_quant_method(layer, "q"), [6], 48)
    del layer
    linear_layer(lambda layer: config.get_quant_method(layer, "q"), [6], 48)


def test_where_packed_weights_are_refused(vllm: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from_config = vllm.methods["tqformat"].from_config
    with pytest.raises(TQFormatError, match="packed: expected true or false"):
        from_config({"packed": 1})
    vllm.engine.load_config.load_format = "dummy"
    assert type(method(LinearBase())).__name__ == "UnquantizedLinearMethod"
    monkeypatch.setattr(vllm.plugin, "kernels", lambda: None)
    with pytest.raises(TQFormatError, match="tqformat-kernels"):
        from_config({"packed": True})
    vllm.platform.is_cpu = lambda: False
    with pytest.raises(TQFormatError, match="the CPU"):
        from_config({"packed": True})


def test_the_entry_point_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\ntqformat = "tqformat\.vllm:(\w+)"', text)
    functions = {
        node.name
        for node in ast.parse((ROOT / "tqformat" / "vllm.py").read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert found and found[1] in functions
