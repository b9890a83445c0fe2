"""vLLM serves tqformat repositories: after `pip install tqformat`, `vllm serve repo_dir_or_owner/name` is all it takes.

vLLM calls `register` in each of its processes (the entry point vllm.general_plugins in pyproject.toml), and chooses this module
for a repository whose config.json has "quantization_config": {"quant_method": "tqformat"}. Its weights are decoded one at a time
on the device and handed to vLLM's model under the names of the base checkpoint, so that vLLM itself fuses them, and divides them
among ranks, as it does with plain safetensors. The model takes the memory of its base, and its layers are vLLM's plain ones.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from . import hub
from . import load_quantized as lq
from .load_quantized import require

METHOD = "tqformat"
LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")  # the others name files, or loaders that read them by themselves


class TQFormatConfig(QuantizationConfig):  # type: ignore[misc]
    """What config.json says of a repository's quantization, as vLLM asks for it: every layer is plain."""

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
        return cls()  # the manifest says the rest

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        found = get_current_vllm_config().load_config.load_format
        expected = f"one of {', '.join(LOAD_FORMATS)} for a tqformat repository"
        require(found in LOAD_FORMATS, "SCHEMA.VALUE", "load_format", expected, found)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None  # None is plain for all others


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
    with lq.Repo(fetch(self, model_config), beside=True) as repo:
        for name in [*repo.names(), *(() if tied else repo.manifest.tied_weights)]:
            if not should_skip_weight(name, self.local_expert_ids):  # experts of other ranks (enable_ep_weight_filter)
                yield name, repo.dequantize(name, "cpu" if device.type == "meta" else device)


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


def register() -> None:
    """Makes vLLM know the quantization method, and its loader of files ask here for weights."""
    register_quantization_config(METHOD)(TQFormatConfig)
    DefaultModelLoader.get_all_weights, DefaultModelLoader.download_model = get_all_weights, download_model
