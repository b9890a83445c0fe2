"""A repository as one GGUF file, the format of llama.cpp: hyperparameters, tokenizer, and every weight decoded.

Names of keys and tensors are those of the gguf package, which llama.cpp's authors publish. What llama.cpp takes for granted of
an architecture is checked here, and refused where a model is different: it would run, and answer wrongly.
"""

import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .gguf_tokenizer import tokenizer_fields
from .load_quantized import Repo, TQFormatError, Weight, open_repo, require
from .writer import naming

TYPES = ("F32", "BF16", "F16", "Q8_0")
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}  # by model_type
BLOCK = 32  # weights of a block of Q8_0


@dataclass
class Loss:
    """What became of the weights of one type of tensor: counts, and how far they are from the decoded ones."""

    tensors: int = 0
    scalars: int = 0
    stored_bytes: int = 0
    largest: float = 0.0  # difference
    squares: float = 0.0  # of the differences, summed
    energy: float = 0.0  # squares of the weights, summed

    def add(self, wanted: np.ndarray[Any, Any], kept: np.ndarray[Any, Any], stored_bytes: int) -> None:
        """Counts one tensor in: its float32 values, and what a reader gets of them."""
        self.tensors, self.scalars = self.tensors + 1, self.scalars + wanted.size
        self.stored_bytes += stored_bytes
        for i in range(0, wanted.size, 1 << 20):
            values = wanted.reshape(-1)[i : i + (1 << 20)].astype(np.float64)
            difference = values - kept.reshape(-1)[i : i + (1 << 20)]
            self.largest = max(self.largest, float(np.abs(difference).max()))
            self.squares += float(difference @ difference)
            self.energy += float(values @ values)

    @property
    def relative(self) -> float:
        """The root of the differences' squares over that of the weights' squares."""
        return math.sqrt(self.squares / self.energy) if self.energy else 0.0


def export_gguf(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    device: str = "cpu",
    verify: bool = True,
) -> dict[str, Loss]:
    """Writes the repository at `path` as the GGUF file `out`, weight by weight; returns what each type lost.

    `kind` is one of TYPES for all matrices; without one each keeps its dtype. Vectors (norms, biases) are F32, since llama.cpp
    computes with them so, and matrices whose rows are no whole blocks of 32 keep their dtype beside Q8_0.
    Raises TQFormatError for a model that llama.cpp would read otherwise, naming what is different.
    """
    require(kind is None or kind in TYPES, "SCHEMA.VALUE", "kind", f"one of {', '.join(TYPES)}", kind)
    try:
        import gguf
    except ImportError:
        advice = "GGUF files are written by the package gguf: pip install 'tqformat[gguf]'"
        raise TQFormatError("UNSUPPORTED.LIBRARY", "gguf", advice) from None
    target = Path(os.path.realpath(out))
    if target.exists() or Path(os.path.realpath(path)) in target.parents:
        raise FileExistsError(f"{target} exists or lies in the repository; choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        open_repo(path, verify) as repo,
        naming(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work,
    ):
        config = _read(repo, "config.json")
        require(config, "BIND.MISSING_FILE", "config.json", "the model's configuration among the support files")
        model = config.get("model_type")
        known = ", ".join(ARCHITECTURES)
        require(model in ARCHITECTURES, "BIND.MODEL", "config.json: model_type", f"one of {known}", model)
        try:
            fields = _general(repo) | hyperparameters(config) | _tokenizer(repo, config)
        except KeyError as error:
            advice = f"expected the key {error} in config.json or tokenizer.json"
            raise TQFormatError("SCHEMA.MISSING_FIELD", "config.json", advice) from None
        built = Path(work, target.name)
        losses = _write(gguf, repo, config, fields, built, kind, device)
        with open(built, "rb") as file:
            os.fsync(file.fileno())
        os.rename(built, target)
    return losses


# ------------------------------------------------------------------------------------------------ metadata


def _read(repo: Repo, name: str) -> dict[str, Any]:
    """A JSON file of the repository, checked; empty if it has none of this name."""
    return json.loads(repo.check_file(name).read_bytes()) if name in repo.manifest.files else {}


def _general(repo: Repo) -> dict[str, Any]:
    base = repo.manifest.base_model
    known = {"general.type": "model", "general.name": base.get("id"), "general.license": base.get("license")}
    return {key: value for key, value in known.items() if value}


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of GGUF for a transformers configuration, as it stands in config.json.

    Raises TQFormatError where llama.cpp would compute something else.
    """
    arch, heads = ARCHITECTURES[config["model_type"]], config["num_attention_heads"]
    gemma, head_dim = arch == "gemma3", _head_dim(config)

    def fixed(key: str, *values: Any) -> None:
        found = config.get(key, values[0])
        expected = f"{values[0]}, which llama.cpp takes for granted"
        require(found in values, "BIND.MODEL", f"config.json: {key}", expected, found)

    fixed("hidden_activation" if gemma else "hidden_act", "gelu_pytorch_tanh" if gemma else "silu")
    if arch in ("qwen3", "gemma3"):
        fixed("attention_bias", False)
    if arch == "qwen2":
        fixed("head_dim", config["hidden_size"] // heads, None)
    if gemma:
        fixed("query_pre_attn_scalar", head_dim)
        fixed("final_logit_softcapping", None)
        fixed("attn_logit_softcapping", None)
        fixed("use_bidirectional_attention", False, None)
        fixed("sliding_window_pattern", 6)
        period = [f"{'sliding' if (i + 1) % 6 else 'full'}_attention" for i in range(config["num_hidden_layers"])]
        fixed("layer_types", period, None)
    else:
        fixed("use_sliding_window", False)
        fixed("layer_types", ["full_attention"] * config["num_hidden_layers"], None)
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
        **({"attention.sliding_window": config["sliding_window"]} if gemma else {}),
        **_positions(config, gemma),
    }
    return {f"{arch}.{key}": value for key, value in numbers.items()}


def _head_dim(config: dict[str, Any]) -> int:
    if config["model_type"] in ("qwen3", "gemma3_text"):
        return int(config["head_dim"])
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers 5 writes them (rope_parameters), also from rope_theta and rope_scaling of those before."""
    if rope := config.get("rope_parameters"):
        return dict(rope)
    scaling = config.get("rope_scaling") or {}
    old = {"rope_type": scaling.get("type", "default"), **scaling, "rope_theta": config.get("rope_theta", 10000.0)}
    if config["model_type"] != "gemma3_text":
        return old
    return {"full_attention": old, "sliding_attention": {"rope_theta": config["rope_local_base_freq"]}}


def _positions(config: dict[str, Any], gemma: bool) -> dict[str, Any]:
    rope = _rope(config)
    if gemma:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        default = local["rope_theta"] == 10000 and local.get("rope_type", "default") == "default"
        require(default, "BIND.MODEL", "config.json: rope of sliding layers", "base 10000, as llama.cpp has it", local)
    kind, known = rope.get("rope_type", "default"), ("default", "linear", *(() if gemma else ("llama3",)))
    require(kind in known, "BIND.MODEL", "config.json: rope_type", f"one of {', '.join(known)}", kind)
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])} if kind == "linear" else {}
    return {"rope.freq_base": float(rope["rope_theta"]), **scaling}


def frequency_factors(config: dict[str, Any]) -> np.ndarray[Any, Any] | None:
    """Divisors of the positions' frequencies, float32 [head_dim / 2], for the scaling of Llama 3.1; None without it.

    Frequencies that turn often in the original context stay, those that hardly turn are divided by the factor, and between the
    two the share of each is linear (transformers' rope_type "llama3").
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, factor = (rope[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    size = _head_dim(config)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)  # in positions
    turns = rope["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0, 1)
    factors: np.ndarray[Any, Any] = (1 / (kept + (1 - kept) / factor)).astype(np.float32)
    return factors


def _tokenizer(repo: Repo, config: dict[str, Any]) -> dict[str, Any]:
    tokenizer, settings = _read(repo, "tokenizer.json"), _read(repo, "tokenizer_config.json")
    require(tokenizer, "BIND.MISSING_FILE", "tokenizer.json", "the tokenizer among the support files")
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)
        special[key] = token["content"] if isinstance(token, dict) else token
    fields = tokenizer_fields(tokenizer, special, config["vocab_size"])
    ends = _read(repo, "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    others = [i for i in ends if i != fields.get("tokenizer.ggml.eos_token_id")]
    if others:  # a chat's turn ends with another token than a text; llama.cpp knows more of them by their names
        fields["tokenizer.ggml.eot_token_id"] = others[0]
    template = settings.get("chat_template")
    if "chat_template.jinja" in repo.manifest.files:
        template = repo.check_file("chat_template.jinja").read_text("utf-8")
    if isinstance(template, list):  # named ones
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return {**fields, **({"tokenizer.chat_template": template} if template else {})}


# ------------------------------------------------------------------------------------------------ weights


def _write(
    gguf: Any,
    repo: Repo,
    config: dict[str, Any],
    fields: dict[str, Any],
    file: Path,
    chosen: str | None,
    device: str,
) -> dict[str, Loss]:
    weights = repo.manifest.tensors
    names = _stored_names(gguf, repo, config)
    kinds = {name: _type(name, weights[name], chosen) for name in names}
    scalars = {kind: sum(math.prod(weights[n].shape) for n in names if kinds[n] == kind) for kind in FILE_TYPES}
    most = max(scalars, key=lambda kind: scalars[kind])
    losses: dict[str, Loss] = {}
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])
    try:
        for key, value in {**fields, "general.file_type": FILE_TYPES[most]}.items():
            _put(writer, key, value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, stored in names.items():
            shape, qtype = weights[name].shape, gguf.GGMLQuantizationType[kinds[name]]
            size, nbytes = gguf.GGML_QUANT_SIZES[qtype]
            writer.add_tensor_info(stored, shape, np.dtype(np.float32), math.prod(shape) // size * nbytes, qtype)
        if (factors := frequency_factors(config)) is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            qtype = gguf.GGMLQuantizationType[kinds[name]]
            weight = _rows_of_pairs(repo.dequantize(name, device).float(), name, config).cpu().numpy()
            if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
                weight = weight + np.float32(1)  # as transformers itself adds it, in float32
            with np.errstate(over="ignore"):
                data = gguf.quantize(weight, qtype)
            kept = gguf.dequantize(data, qtype)
            expected = f"weights within {kinds[name]}; choose another type"
            require(np.isfinite(kept).all(), "DATA.NON_FINITE", name, expected)
            losses.setdefault(kinds[name], Loss()).add(weight, kept, data.nbytes)
            writer.write_tensor_data(data)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return losses


def _stored_names(gguf: Any, repo: Repo, config: dict[str, Any]) -> dict[str, str]:
    """Name of each weight to be written -> its name in GGUF, where an output layer that is tied is left out."""
    kind = config["model_type"]
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind]), None)
    require(
        arch is not None,
        "UNSUPPORTED.LIBRARY",
        "gguf",
        f"a version that knows {ARCHITECTURES[kind]}; install a newer one",
    )
    mapping = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    tied = config.get("tie_word_embeddings", kind == "gemma3_text")
    aliases = {alias: source for alias, source in repo.manifest.tied_weights.items() if alias != "lm_head.weight"}
    require(not aliases, "BIND.TIED", "tied_weights", "only lm_head.weight tied", ", ".join(aliases))
    names = {}
    for name in repo.names():
        if name == "lm_head.weight" and tied:
            continue
        names[name] = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        require(names[name], "BIND.TENSOR", name, f"a weight that llama.cpp's {ARCHITECTURES[kind]} has")
    return names


def _type(name: str, weight: Weight, chosen: str | None) -> str:
    """The type of a tensor in the file."""
    require(weight.dtype in TYPES, "BIND.TENSOR", name, "floating point of 16 or 32 bits", weight.dtype)
    if len(weight.shape) < 2:
        return "F32"
    return weight.dtype if chosen is None or (chosen == "Q8_0" and weight.shape[-1] % BLOCK) else chosen


def _rows_of_pairs(weight: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp's Llama rotates neighbours, transformers' the two halves of a head: rows of q and k in the former's order."""
    part = re.search(r"\.(q|k)_proj\.(?:weight|bias)$", name)
    if config["model_type"] != "llama" or not part:
        return weight
    heads = config["num_attention_heads"]
    heads = heads if part[1] == "q" else config.get("num_key_value_heads") or heads
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _put(writer: Any, key: str, value: Any) -> None:
    """One key of the metadata, in the type of GGUF that goes with Python's: bool, uint32, float32, string, array."""
    puts = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    puts.get(type(value), writer.add_array)(key, value)
