"""Tiny models, checkpoints, texts and weights that several test modules work on."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from reference_quantizer.codes import feedback
from reference_quantizer.evaluation import evaluate
from reference_quantizer.job import calibrated, encoding
from tqformat.load_quantized import torch_dtype
from tqformat.writer import add_files

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]  # the vocabulary of the tiny model
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


def make_tokenizer(path: Path, bos: bool = False, chat: bool = False) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    tokenizer.save_pretrained(path)


SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def byte_level_tokenizer() -> Any:
    """Bytes, two merges, a token that is added and not special; a template that puts bos before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken("[x]", normalized=False)])
    return tokenizer


def make_checkpoint(path: Path, seed: int = 0, positions: int = 600, tied: bool = False, **tokenizer: bool) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=tied,
        **sizes,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it has preferences
    model.save_pretrained(path)
    make_tokenizer(path, **tokenizer)
    return path


def make_twins(base: Path) -> None:
    """Give the output layer of a checkpoint the bytes of the embedding, with a configuration that does not tie them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(base)


def make_text(path: Path, tokens: int, seed: int = 0) -> Path:
    """A file of as many words, ten a row."""
    words = np.random.default_rng(seed).choice(WORDS[3:], tokens)
    path.write_text("\n\n".join(" ".join(words[i : i + 10]) for i in range(0, tokens, 10)) + "\n")
    return path


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "seconds"}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**SMALL, **TOKENS, "num_key_value_heads": 2, **changes})
    return transformers.LlamaForCausalLM(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, **TOKENS, num_key_value_heads=2, num_local_experts=4)
    )


def qwen3_moe() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        **TOKENS,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=2
    )
    return transformers.T5ForConditionalGeneration(config)


def qwen3_5() -> Any:
    text = {
        **SMALL, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4, **TOKENS, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return transformers.Qwen3_5ForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], Any], str, dict[str, torch.Tensor]]] = {
    "llama-tied": (lambda: llama(tie_word_embeddings=True), "text-generation", {}),
    "llama-untied": (lambda: llama(tie_word_embeddings=False), "text-generation", {}),
    "mixtral": (mixtral, "text-generation", {}),
    "qwen3-moe": (qwen3_moe, "text-generation", {}),
    "bert": (bert, "feature-extraction", {}),
    "t5": (t5, "text2text-generation", {}),
    "qwen3.5-vl": (qwen3_5, "image-text-to-text", {"mtp.layers.0.fc.weight": torch.ones(4, 32), "mtp.norm.weight": torch.ones(32)}),
}  # fmt: skip


def sample_tensors() -> Tensors:
    """One tensor of each awkward kind."""
    g = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    zeros = randn(6, 40)
    zeros[2] = 0
    return {
        "model.embed_tokens.weight": (randn(300, 96) * 0.02).bfloat16(),
        "model.layers.0.q_proj.weight": (randn(64, 96) * 0.05).half(),
        "model.layers.0.k_proj.weight": randn(32, 96) * 3,
        "model.layers.0.norm.weight": torch.ones(96).bfloat16(),
        "model.layers.1.experts.weight": (randn(3, 8, 96) * 0.02).bfloat16(),
        "visual.patch_embed.weight": (randn(8, 3, 2, 4, 4) * 0.1).bfloat16(),
        "odd.weight": randn(5, 7),
        "pairs.weight": randn(9, 2).half(),
        "column.weight": randn(11, 1).bfloat16(),
        "one_row.weight": randn(1, 128).bfloat16(),
        "no_rows.weight": torch.zeros(0, 24),
        "no_columns.weight": torch.zeros(4, 0),
        "zeros.weight": zeros.bfloat16(),
        "tiny.weight": (randn(4, 64) * 1e-7).bfloat16(),
        "double.weight": randn(4, 4).double(),
        "position_ids": torch.arange(20).reshape(2, 10),
        "mask": torch.tensor([[True, False]]),
        "scalar": torch.tensor(1.5),
    }


def files_of(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def manifest_of(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / "quant_manifest.json").read_text())
    return manifest


def correlated(cols: int, tokens: int = 4000, seed: int = 0) -> Tensor:
    """The Hessian of inputs whose few directions hold most of the power, as in a language model."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g) * torch.linspace(0, 4, cols).neg().exp()
    x = torch.randn(tokens, cols, generator=g) @ mix.T
    return x.T @ x / tokens


def gaussian(rows: int, cols: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g) * torch.rand(rows, 1, generator=g)


def keep_decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The decoded weights, in their dtype, that encoding with feedback will give from now on."""
    kept: dict[str, Tensor] = {}

    def keep(item: Any, encoders: Any, weight: Tensor, earlier: Any, found: feedback.Encoded, **options: Any) -> Any:
        kept[item.info.name] = found.decoded.to(torch_dtype(item.info.dtype)).float()
        return plain(item, encoders, weight, earlier, found, **options)

    plain = encoding.as_stored
    for module in (encoding, calibrated):
        monkeypatch.setattr(module, "as_stored", keep)
    return kept


class Lab:
    """A checkpoint, its repository at 4 bit, and a text of 300 tokens."""

    def __init__(self, path: Path, **tokenizer: bool) -> None:
        from conftest import repo_from_checkpoint  # which takes names from here

        self.path = path
        self.base = make_checkpoint(path / "base", **tokenizer)
        self.repo = repo_from_checkpoint(self.base, path / "repo", "text-generation")
        for file in self.base.glob("*.jinja"):
            add_files(self.repo, {file.name: ("support", file.read_bytes())})
        self.text = make_text(path / "text.txt", 300)

    def run(
        self, repo: Path | None = None, base: Path | None = None, texts: list[Path] | None = None, **settings: Any
    ) -> dict[str, Any]:
        chosen = evaluate.Settings(**{"max_length": 32, "stride": 16, **settings})
        options: dict[str, Any] = {"cache_dir": self.path / "cache", "quiet": True}
        datasets = [str(text) for text in texts or [self.text]]
        return evaluate.evaluate(str(base or self.base), repo or self.repo, datasets, chosen, **options)


GGUF_HIDDEN, GGUF_HEADS, GGUF_LAYERS, GGUF_WORDS = 64, 4, 2, 96


def make_gguf(
    path: Path, architecture: str = "llama", leave_out: str = "", add: str = "", kind: str = "Q8_0"
) -> dict[str, np.ndarray[Any, Any]]:
    """Writes a small GGUF file with matrices of one type and a byte-level vocabulary; the decoded tensors by name."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(GGUF_HIDDEN)
    writer.add_block_count(GGUF_LAYERS)
    writer.add_feed_forward_length(2 * GGUF_HIDDEN)
    writer.add_head_count(GGUF_HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(GGUF_WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", *(chr(33 + i) for i in range(GGUF_WORDS - 3)), "ab"])
    writer.add_token_types([3, 3] + [1] * (GGUF_WORDS - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (GGUF_WORDS, GGUF_HIDDEN),
        "output_norm.weight": (GGUF_HIDDEN,),
    }
    for i in range(GGUF_LAYERS):
        for name, rows, cols in (
            ("attn_q", GGUF_HIDDEN, GGUF_HIDDEN),
            ("attn_k", GGUF_HIDDEN // 2, GGUF_HIDDEN),
            ("attn_v", GGUF_HIDDEN // 2, GGUF_HIDDEN),
            ("attn_output", GGUF_HIDDEN, GGUF_HIDDEN),
            ("ffn_gate", 2 * GGUF_HIDDEN, GGUF_HIDDEN),
            ("ffn_up", 2 * GGUF_HIDDEN, GGUF_HIDDEN),
            ("ffn_down", GGUF_HIDDEN, 2 * GGUF_HIDDEN),
        ):
            shapes[f"blk.{i}.{name}.weight"] = (rows, cols)
        shapes |= {f"blk.{i}.attn_norm.weight": (GGUF_HIDDEN,), f"blk.{i}.ffn_norm.weight": (GGUF_HIDDEN,)}
    if add:
        shapes[add] = (8,)
    shapes.pop(leave_out, None)
    decoded = {}
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            decoded[name] = values
        else:
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
            decoded[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, words]: the numbers of each row as one long number, the first in its lowest bits."""
    size = -(-values.shape[1] * bits // 32) * 4
    data = b"".join(
        sum(v << bits * k for k, v in enumerate(row)).to_bytes(size, "little") for row in values.int().tolist()
    )
    return torch.frombuffer(bytearray(data), dtype=torch.int32).reshape(len(values), -1)


def save_quantized(path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint with these tensors, whose config.json has `config` as its quantization_config."""
    from safetensors.torch import save_file

    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    return path
