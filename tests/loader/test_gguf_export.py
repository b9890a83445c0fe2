"""Repositories as GGUF files: read again by transformers they are the same models; what llama.cpp would read otherwise is refused.

That llama.cpp itself computes the same is shown by benchmarks/llama_cpp.py, which needs its build for Node.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import new_writer, repo_from_checkpoint
from helpers import SMALL, SPECIAL, byte_level_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import tqformat
from tqformat import TQFormatError, add_files, export_gguf
from tqformat.__main__ import main
from tqformat.gguf_export import frequency_factors, hyperparameters
from tqformat.gguf_tokenizer import tokenizer_fields

gguf = pytest.importorskip("gguf")

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES: dict[str, Any] = {**SMALL, **TOKENS, "vocab_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEXTS = ["a b  c", "it's 2024\n\n\tdé東", "<s>aa</s>b[x] ab", ""]
PERIOD = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}} | {
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}
}


def sentencepiece() -> Tokenizer:
    """As Gemma's: bytes for what is no token, and no space before a text."""
    pieces = [*SPECIAL.values(), *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdxits'", "\u2581\u2581"]
    merges = [("\u2581", "\u2581"), ("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\u2581a", "b")]
    vocab = {piece: i for i, piece in enumerate([*pieces, "ab", "\u2581a", "\u2581ab", "[x]"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken("[x]", normalized=False)])
    return tokenizer


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes}))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=False))


def qwen3() -> Any:  # transformers' reader of GGUF takes this head_dim for granted
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=128))


def gemma3() -> Any:  # the same
    sizes = {**SIZES, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4, "num_hidden_layers": 7}
    rope = {**PERIOD, "full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, rope_parameters=rope))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Tokenizer]]] = {
    "llama-tied": (lambda: llama(tie_word_embeddings=True), byte_level_tokenizer),
    "llama-untied": (lambda: llama(tie_word_embeddings=False), byte_level_tokenizer),
    "qwen2": (qwen2, byte_level_tokenizer),
    "qwen3": (qwen3, byte_level_tokenizer),
    "gemma3": (gemma3, sentencepiece),
}


def make_repo(path: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    build, tokens = MODELS[name]
    model = build().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that are neither 0 nor 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path / "checkpoint")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens(), **SPECIAL, chat_template="{{ messages[0].content }}")
    fast.save_pretrained(path / "checkpoint", save_jinja_files=False)
    return repo_from_checkpoint(path / "checkpoint", path / "repo", "text-generation")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_repo(tmp_path, "llama-tied")


def load_gguf(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    """Weights and logits equal to the last bit, the same token ids and chat template; norms of Gemma are 1 + w there."""
    repo, file = make_repo(tmp_path, name), tmp_path / "model.gguf"
    losses = export_gguf(repo, file)
    assert set(losses) == {"BF16", "F32"} and not any(loss.largest for loss in losses.values())
    ours, theirs = tqformat.load(repo, dtype=torch.float32), load_gguf(file)
    state, found = ours.state_dict(), theirs.state_dict()
    if name == "gemma3":  # GGUF has 1 + w, and small w lose digits, for the model, too
        state, found = ({k: w + 1 if "norm" in k else w for k, w in d.items()} for d in (state, found))
    assert state.keys() == found.keys() and all(torch.equal(state[key], found[key]) for key in state)
    ids = torch.arange(30).reshape(1, -1)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    here, there = tqformat.load_tokenizer(repo), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    for text in TEXTS:
        ids = there(text, add_special_tokens=False)["input_ids"]
        assert here(text, add_special_tokens=False)["input_ids"] == ids, text
    assert here.chat_template == there.chat_template and here.convert_tokens_to_ids("[x]") == ids_of(file)["[x]"]


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def ids_of(file: Path) -> dict[str, int]:
    return {token: i for i, token in enumerate(fields_of(file)["tokenizer.ggml.tokens"])}


def test_metadata(repo: Path, tmp_path: Path) -> None:
    export_gguf(repo, tmp_path / "model.gguf", kind="Q8_0")
    found = fields_of(tmp_path / "model.gguf")
    types = found["tokenizer.ggml.token_type"]
    assert len(types) == 320 and types[:4] == [3] * 4 and types[4] == 1 and types[-1] == 5  # control, normal, unused
    assert types[found["tokenizer.ggml.tokens"].index("[x]")] == 4  # defined by the user
    expected = {
        "general.architecture": "llama",
        "general.name": "org/base",
        "general.file_type": 7,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    assert expected.items() <= found.items()


@pytest.mark.parametrize(("ends", "turn"), [(2, None), (5, 5), ([2, 5], 5), (None, None)])
def test_a_turn_may_end_with_a_token_of_its_own(repo: Path, tmp_path: Path, ends: Any, turn: int | None) -> None:
    add_files(repo, {"generation_config.json": ("support", json.dumps({"eos_token_id": ends}).encode())})
    export_gguf(repo, tmp_path / "model.gguf")
    found = fields_of(tmp_path / "model.gguf")
    assert (found["tokenizer.ggml.eos_token_id"], found.get("tokenizer.ggml.eot_token_id")) == (2, turn)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0"])
def test_what_is_lost_is_told(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are those of the weights that transformers reads from the file; rows of 48 are no blocks of Q8_0."""
    repo, file = make_repo(tmp_path, "llama-untied", torch.float32), tmp_path / "model.gguf"
    assert main(["export", str(repo), str(file), "--format", "gguf", "--type", kind.lower(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["types"]
    state, found = tqformat.load_state_dict(repo), load_gguf(file).state_dict()
    chosen = {n: w for n, w in state.items() if w.dim() == 2 and (kind != "Q8_0" or w.shape[1] % 32 == 0)}
    assert report[kind]["tensors"] == len(chosen) and report["F32"]["tensors"] == len(state) - len(chosen)
    differences = torch.cat([(found[n] - w).double().flatten() for n, w in chosen.items()])
    assert report[kind]["largest"] == float(differences.abs().max()) > 0 == report["F32"]["largest"]
    weights = torch.cat([w.double().flatten() for w in chosen.values()])
    assert report[kind]["relative"] == pytest.approx(float(differences.norm() / weights.norm()), rel=1e-9)
    assert report[kind]["relative"] < {"BF16": 4e-3, "F16": 5e-4, "Q8_0": 1e-2}[kind]


def test_the_command_says_exact_or_how_far(repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options, words in (("a", [], ["exact"] * 4), ("b", ["--type", "q8_0"], ["exact", "e-0"])):
        assert main(["export", str(repo), str(tmp_path / name), "--format", "gguf", *options]) == 0
        text = capsys.readouterr().out
        assert f"wrote {tmp_path / name}" in text and all(word in text for word in words)
    assert main(["export", str(repo), str(tmp_path / "a"), "--format", "gguf"]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_weight_too_large_for_the_type_leaves_no_file(tmp_path: Path) -> None:
    repo = make_repo(tmp_path, "llama-tied")
    with new_writer(tmp_path / "large", "text-generation") as writer, tqformat.open_repo(repo) as source:
        for name in source.names():
            writer.add_passthrough(name, source.dequantize(name) * 1e6)
        for name in source.manifest.files:
            if name.endswith(".json"):
                writer.add_file(repo / name, "support")
        writer.finish()
    with pytest.raises(TQFormatError, match=r"DATA\.NON_FINITE.*within F16; choose another type"):
        export_gguf(tmp_path / "large", tmp_path / "model.gguf", kind="F16")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_without_gguf_it_says_what_to_install(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.LIBRARY.*pip install 'tqformat\[gguf\]'"):
        export_gguf(repo, tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------------ hyperparameters


@pytest.mark.parametrize(
    ("build", "changes", "where"),
    [
        (llama, {"hidden_act": "gelu"}, "hidden_act"),
        (llama, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        (qwen2, {"use_sliding_window": True}, "use_sliding_window"),
        (qwen2, {"head_dim": 16}, "head_dim"),
        (qwen3, {"attention_bias": True}, "attention_bias"),
        (gemma3, {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
        (gemma3, {"layer_types": ["full_attention"] * 7}, "layer_types"),
        (gemma3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (gemma3, {"rope_parameters": {k: {**v, "rope_theta": 1e6} for k, v in PERIOD.items()}}, "sliding layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(build: Any, changes: Any, where: str) -> None:
    config = build().config.to_dict()
    assert hyperparameters(config)
    with pytest.raises(TQFormatError, match=rf"BIND\.MODEL.*{where}"):
        hyperparameters({**config, **changes})


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with new_writer(tmp_path / "repo", "text-generation") as writer:
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        writer.add_file(tmp_path / "config.json", "support")
        writer.finish()
    with pytest.raises(TQFormatError, match=r"BIND\.MODEL.*model_type.*llama, qwen2, qwen3, gemma3_text, got mamba"):
        export_gguf(tmp_path / "repo", tmp_path / "model.gguf")


def test_positions_as_older_configurations_give_them() -> None:
    new, old = llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}).config.to_dict(), {}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert hyperparameters(new) == hyperparameters(old)
    assert hyperparameters(new)["llama.rope.scaling.factor"] == 2.0
    assert hyperparameters(gemma3().config.to_dict())["gemma3.rope.freq_base"] == 1e6


def test_frequency_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = llama(head_dim=64, rope_parameters={**rope, "original_max_position_embeddings": 8192}).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    factors = frequency_factors(config.to_dict())
    assert factors is not None and factors[0] == 1 and factors[-1] == 8 and len(set(factors.tolist())) > 3
    np.testing.assert_allclose(factors, plain / scaled.numpy(), rtol=1e-5)
    assert frequency_factors(llama().config.to_dict()) is None


# ------------------------------------------------------------------------------------------------ tokenizers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(numbers: str) -> Any:
    cut = pre_tokenizers.Split(Regex(SPLIT.replace("NUMBERS", numbers)), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def fields(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    parsed = json.loads(tokenizer.to_str())
    parsed["model"] |= changes
    return tokenizer_fields(parsed, dict(SPECIAL), 320)


@pytest.mark.parametrize(
    ("name", "cuts", "changes"),
    [
        ("gpt-2", GPT2, {}),
        ("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), {}),
        ("qwen2", split(r"\p{N}"), {}),
        ("llama-bpe", split(r"\p{N}{1,3}"), {"ignore_merges": True}),
    ],
)
def test_programs_of_llama_cpp(name: str, cuts: Any, changes: dict[str, Any]) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = cuts
    assert fields(tokenizer, **changes)["tokenizer.ggml.pre"] == name
    with pytest.raises(TQFormatError, match="pre_tokenizer"):  # the same, but for what else it has to be
        fields(tokenizer, ignore_merges=not changes.get("ignore_merges", False))


def changed(make: Callable[[], Tokenizer], **parts: Any) -> Tokenizer:
    tokenizer = make()
    for key, value in parts.items():
        setattr(tokenizer, key, value)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "changes", "where"),
    [
        (byte_level_tokenizer(), {"type": "Unigram"}, "model.type"),
        (byte_level_tokenizer(), {"end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        (changed(byte_level_tokenizer, pre_tokenizer=pre_tokenizers.Whitespace()), {}, "pre_tokenizer"),
        (changed(byte_level_tokenizer, normalizer=normalizers.Lowercase()), {}, "pre_tokenizer"),
        (changed(sentencepiece, normalizer=normalizers.NFKC()), {}, "normalizer"),
        (sentencepiece(), {"merges": [["a", "b"], ["\u2581", "a"], ["\u2581", "\u2581"], ["\u2581", "ab"]]}, "merges"),
        (sentencepiece(), {"merges": [["\u2581", "ab"], ["a", "b"], ["\u2581a", "b"], ["\u2581", "a"]]}, "merges"),
        (changed(byte_level_tokenizer, post_processor=processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 3)])),
         {}, "post_processor"),
    ],
)  # fmt: skip
def test_other_tokenizers_are_refused(tokenizer: Tokenizer, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(TQFormatError, match=rf"SCHEMA\.VALUE.*{where}"):
        fields(tokenizer, **changes)


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(TQFormatError, match=r"BIND\.MODEL.*at most 100 tokens.*got 26"):
        tokenizer_fields(json.loads(byte_level_tokenizer().to_str()), dict(SPECIAL), 100)


def test_llama_2_puts_a_space_before_a_text() -> None:
    steps = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = changed(sentencepiece, normalizer=steps, pre_tokenizer=pre_tokenizers.Sequence([]))
    assert fields(tokenizer)["tokenizer.ggml.add_space_prefix"] is True
    assert fields(sentencepiece())["tokenizer.ggml.add_space_prefix"] is False
    scores = dict(
        zip(fields(tokenizer)["tokenizer.ggml.tokens"], fields(tokenizer)["tokenizer.ggml.scores"], strict=True)
    )
    assert scores["\u2581\u2581"] > scores["ab"] > scores["\u2581a"] > scores["\u2581ab"] > scores["a"]
