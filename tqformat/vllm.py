"""vLLM serves tqformat repositories: after `pip install tqformat`, `vllm serve repo_dir_or_owner/name` is all it takes.

vLLM calls `register` in each of its processes (the entry point vllm.general_plugins in pyproject.toml), and chooses this module
for a repository whose config.json has "quantization_config": {"quant_method": "tqformat"}. Its weights are decoded one at a time
on the device and handed to vLLM's model under the names of the base checkpoint, so that vLLM itself fuses them, and divides them
among ranks, as it does with plain safetensors. The model takes the memory of its base, and its layers are vLLM's plain ones.

With "packed": true beside "quant_method", on the CPU, linear layers, embedding and output layer keep the parts of their weights
in place of values, as packed.py does: a rank cuts its share out of the parts. A layer whose share cannot be cut, or with a
setting that tqformat_kernels has no fast product for, is decoded as above.
"""

import gc
import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from . import hub
from . import load_quantized as lq
from .load_quantized import require
from .packed import PackedRepo, PackedWeight, kernels, merge

METHOD = "tqformat"
LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")  # the others name files, or loaders that read them by themselves
logger = logging.getLogger("vllm.tqformat")  # below vLLM's own, which writes it


class TQFormatConfig(QuantizationConfig):  # type: ignore[misc]
    """What config.json says of a repository's quantization, as vLLM asks for it: every layer is plain, or packed."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # any GPU: torch decodes

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TQFormatConfig":
        packed = config.get("packed", False)  # the manifest says the rest
        require(isinstance(packed, bool), "SCHEMA.TYPE", "quantization_config.packed", "true or false", packed)
        if packed:
            require(current_platform.is_cpu(), "UNSUPPORTED.DEVICE", "packed", "the CPU; elsewhere leave it out")
            require(kernels() is not None, "UNSUPPORTED.LIBRARY", "packed", "tqformat-kernels to be installed")
        return cls(packed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        found = get_current_vllm_config().load_config.load_format
        expected = f"one of {', '.join(LOAD_FORMATS)} for a tqformat repository"
        require(found in LOAD_FORMATS, "SCHEMA.VALUE", "load_format", expected, found)
        packed = self.packed and found != "dummy"
        if isinstance(layer, LinearBase):
            return PackedLinearMethod(prefix) if packed else UnquantizedLinearMethod()
        if packed and isinstance(layer, VocabParallelEmbedding) and not layer.num_added_embeddings:
            return PackedEmbeddingMethod(prefix)
        return None  # plain


_plain_weights, _plain_download = DefaultModelLoader.get_all_weights, DefaultModelLoader.download_model


def get_all_weights(self: Any, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and values of a checkpoint's weights, for load_weights of vLLM's model; of any format, as it is patched in.

    Raises TQFormatError for a repository that breaks SPEC.md, before or while its weights are decoded.
    """
    if model_config.quantization != METHOD:
        yield from _plain_weights(self, model_config, model)
        return
    require(
        not getattr(model, "secondary_weights", ()), "UNSUPPORTED.LIBRARY", "model", "all weights in one repository"
    )
    if self.enable_weights_track is None:
        self.enable_weights_track = True  # a weight of the model that did not come is an error; vLLM's own check
    self.counter_before_loading_weights = time.perf_counter()  # of the seconds that vLLM reports
    device = next(model.parameters()).device  # with its index: threads that decode know no current GPU
    tied = getattr(model_config.hf_config, "tie_word_embeddings", False)  # by the model's own rule [TQ-TIE-2]
    places = {name: p for name, p in model.named_parameters() if hasattr(p, "shares")}
    path = fetch(self, model_config)
    with PackedRepo(path) if places else lq.Repo(path, beside=True) as repo:
        for name in [*repo.names(), *(() if tied else repo.manifest.tied_weights)]:
            if not should_skip_weight(name, self.local_expert_ids):  # experts of other ranks (enable_ep_weight_filter)
                value = repo.dequantize(name, "cpu" if device.type == "meta" else device)
                if isinstance(value, PackedWeight) and value.dim() > 2:  # no linear layer takes it
                    value = value.decode()
                yield name, value
    if decoded := [name for name, p in places.items() if not complete(p)]:
        some = ", ".join(decoded[:3]) + (", ..." if len(decoded) > 3 else "")
        logger.info("tqformat: %d of %d layers cannot stay packed here: %s", len(decoded), len(places), some)


def download_model(self: Any, model_config: Any) -> None:
    """Fetches a repository's files, so that they are in the cache."""
    (fetch if model_config.quantization == METHOD else _plain_download)(self, model_config)


def fetch(loader: Any, model_config: Any) -> Any:
    """The directory of the repository that a model's configuration names."""
    folder = loader.load_config.download_dir
    require(
        folder is None, "SCHEMA.UNKNOWN_FIELD", "download_dir", "the Hub's cache (HF_HOME chooses the place)", folder
    )
    return hub.fetch(model_config.model, model_config.revision)


# Packed layers --------------------------------------------------------------------------------------------------------
#
# While vLLM loads a model, a PackedWeight goes to the layer's parameter, which keeps the rank's share of it in `shares`, by the
# share's first row there, of which `rows` have to come. What it cannot keep is decoded into `data`, as the rest is at the end
# unless all rows are there. So `data` is touched only where it is needed; until then it takes no memory.

_layers: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()  # by the names that operators get


def keep(param: Any, weight: Tensor, dim: int, start: int, size: int, row: int = 0) -> bool:
    """Whether `size` rows (`dim` 0) or columns (1) of a weight from `start` stay packed, for the rows of `param` from `row`."""
    share = weight.share(dim, start, size) if isinstance(weight, PackedWeight) else None
    if share is None or not all(s and s.fast for s in share.parts.kernel_stages(share.entry, kernels().Stage)):
        return False
    param.shares[row] = share
    return True


def complete(param: Any) -> bool:
    return bool(sum(share.rows for share in param.shares.values()) == param.rows)


class PackedParameter(ModelWeightParameter):  # type: ignore[misc]
    """The weight of a linear layer; vLLM calls these methods with a whole weight of the checkpoint."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shares: dict[int, PackedWeight] = {}
        self.rows = len(self.data)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        if not keep(self, loaded_weight, 0, self.tp_rank * self.rows, self.rows):
            super().load_column_parallel_weight(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        cols = self.data.shape[1]
        if not keep(self, loaded_weight, 1, self.tp_rank * cols, cols):
            super().load_row_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **at: Any) -> None:
        size = at["shard_size"]
        if not keep(self, loaded_weight, 0, self.tp_rank * size, size, at["shard_offset"]):
            super().load_merged_column_weight(loaded_weight, **at)

    def load_qkv_weight(self, loaded_weight: Tensor, **at: Any) -> None:
        size, rank = at["shard_size"], self.tp_rank if at["shard_id"] == "q" else self.tp_rank // at["num_heads"]
        if not keep(self, loaded_weight, 0, rank * size, size, at["shard_offset"]):
            super().load_qkv_weight(loaded_weight, **at)


class _Packed:
    """What packed layers of both kinds have in common."""

    supports_pre_processed_weights = False

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.name = prefix

    def introduce(self, layer: Any, rows: int) -> None:
        """Lets the operators find a layer, by a name that is the same in all processes, as vLLM keeps compiled models."""
        if self.name in _layers:
            gc.collect()  # an earlier model may not be gone yet
        require(
            self.name not in _layers, "UNSUPPORTED.LIBRARY", self.name, "one packed layer of this name in a process"
        )
        _layers[self.name], layer.rows = layer, rows

    def process_weights_after_loading(self, layer: Any) -> None:
        param, used_elsewhere = layer.weight, getattr(layer, "_cpu_skip_gemm_dispatch", False)
        if complete(param) and not used_elsewhere:
            weights = [share for _, share in sorted(param.shares.items())]
            merged = merge(weights, new=False) if len(weights) > 1 else None
            layer.packed = weights if merged is None else [merged]
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=param.dtype), requires_grad=False)
        else:
            for row, share in param.shares.items():
                param.data[row : row + share.rows].copy_(share)
            layer.packed = None
            super().process_weights_after_loading(layer)  # type: ignore[misc]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.tqformat.linear(x, bias, self.name)  # type: ignore[no-any-return]

    def multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        if layer.packed is None:
            return super().apply(layer, x, bias)  # type: ignore[misc, no-any-return]
        found = [functional.linear(x, weight) for weight in layer.packed]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        if filled := layer.rows - y.shape[-1]:  # of a vocabulary
            y = functional.pad(y, (0, filled))
        return y if bias is None else y + bias


@register_weight_loader_v2_supported_method
class PackedLinearMethod(_Packed, UnquantizedLinearMethod):  # type: ignore[misc]
    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        loader = attributes.pop("weight_loader")
        weight = PackedParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, attributes)
        self.introduce(layer, len(data))


class PackedEmbeddingMethod(_Packed, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    def create_weights(self, layer: Any, *sizes: Any, weight_loader: Any, **attributes: Any) -> None:
        first, rows = layer.shard_indices.org_vocab_start_index, layer.num_org_embeddings_per_partition

        def load(param: Any, weight: Tensor) -> None:
            if not keep(param, weight, 0, first, rows):
                weight_loader(param, weight)

        super().create_weights(layer, *sizes, weight_loader=load, **attributes)
        layer.weight.shares, layer.weight.rows = {}, rows
        self.introduce(layer, layer.num_embeddings_per_partition)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return torch.ops.tqformat.embedding(ids, self.name)  # type: ignore[no-any-return]

    def look_up(self, layer: Any, ids: Tensor) -> Tensor:
        if layer.packed is None:
            return super().embedding(layer, ids)  # type: ignore[no-any-return]
        return functional.embedding(ids, *layer.packed).to(layer.params_dtype)


# Operators, so that torch.compile does not look inside: whether a layer is packed is no part of a compiled model.


@torch.library.custom_op("tqformat::linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return _layers[name].quant_method.multiply(_layers[name], x, bias)  # type: ignore[no-any-return]


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _layers[name].rows)


@torch.library.custom_op("tqformat::embedding", mutates_args=())
def _embedding(ids: Tensor, name: str) -> Tensor:
    return _layers[name].quant_method.look_up(_layers[name], ids)  # type: ignore[no-any-return]


@_embedding.register_fake
def _(ids: Tensor, name: str) -> Tensor:
    return ids.new_empty(*ids.shape, _layers[name].embedding_dim, dtype=_layers[name].params_dtype)


def register() -> None:
    """Makes vLLM know the quantization method, and its loader of files ask here for weights."""
    register_quantization_config(METHOD)(TQFormatConfig)
    DefaultModelLoader.get_all_weights, DefaultModelLoader.download_model = get_all_weights, download_model
