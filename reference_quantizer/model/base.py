"""The base model: the checkpoint that a name stands for, its weights in memory, its tokenizer, and how it is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch

from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.checkpoint.source import Source, open_source
from reference_quantizer.model.machine import locked
from tqformat.load_quantized import LOADER_KINDS, TQFormatError, translated

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_base(base: str, revision: str | None, cache: Path, quiet: bool = False) -> Source:
    """The checkpoint that `base` names; of a GGUF file, its import in the cache."""
    gguf = gguf_source.is_gguf(base)
    if revision and (gguf or Path(base).exists()):
        raise TQFormatError("SCHEMA.VALUE", "--revision", "BASE is no Hub id, so there is nothing to select")
    if not gguf:
        return open_source(base, revision)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "gguf.lock"):
        return gguf_source.cached(base, cache, quiet)


def default_dtype(device: str) -> str:
    """The dtype of arithmetic that suits the device: the CPU computes in float32."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def load_base(source: Source, loader_kind: str, dtype: str = "float32", device: str = "cpu", **placement: Any) -> Any:
    """The checkpoint's model, in eval mode; every weight must be there. `placement`, for transformers, takes the place of `device`."""
    import transformers

    with translated(source.path.name):
        model, info = getattr(transformers, LOADER_KINDS[loader_kind]).from_pretrained(
            source.path,
            dtype=DTYPES[dtype],
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise TQFormatError("BIND.MODEL", source.path.name, f"the checkpoint lacks weights: {', '.join(wrong)[:200]}")
    return (model if placement else model.to(device)).eval()


def check_same_model(source: Source, manifest: Any) -> None:
    """BIND.TENSOR if a weight has another shape in the checkpoint: then it is not the base."""
    for name, weight in manifest.tensors.items():
        info = source.tensors.get(name)
        if info is not None and tuple(info.shape) != tuple(weight.shape):
            message = f"the repository has the shape {list(weight.shape)}, the base {list(info.shape)}: another model"
            raise TQFormatError("BIND.TENSOR", name, message)


def check_length(model: Any, length: int) -> None:
    """SCHEMA.VALUE if the model has fewer positions than a window takes."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        message = f"the model takes {limit} tokens, a window has {length} (with its BOS token, if it has one)"
        raise TQFormatError("SCHEMA.VALUE", "--max-length", message)


@contextmanager
def running_models() -> Iterator[None]:
    """How models are run here: subnormal numbers count as 0, and libraries show no bars and give no advice.

    A damaged model's activations are full of subnormal numbers, which change nothing, but make a processor ten times slower.
    Threads inherit the setting, so this comes before the first work that torch shares among them.
    """
    import transformers

    torch.set_flush_denormal(True)

    advice = getLogger("accelerate")  # that weights were left in files, where that is wanted
    level = advice.level
    advice.setLevel(ERROR)
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        logging.set_verbosity(verbosity)
        advice.setLevel(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint directory."""
    from transformers import AutoTokenizer

    with translated(f"{checkpoint.name}: tokenizer"):
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)


def find_bos(tokenizer: Any) -> int | None:
    """The BOS token, if the tokenizer itself puts it at the start of a text."""
    text, bos = "A text.", tokenizer.bos_token_id
    with_special = tokenizer(text)["input_ids"][:1]
    without = tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    return int(bos) if bos is not None and with_special == [bos] != without else None
