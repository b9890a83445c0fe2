"""The comparison with other quantizers: what each codec stores, and that all candidates go through the same evaluation."""

import importlib.metadata
import importlib.util
import json
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import benchmark, repo_from_checkpoint
from helpers import make_checkpoint, make_text, make_tokenizer, save_quantized, words

from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.evaluation import evaluate
from reference_quantizer.model.base import load_base as load_model
from tqformat.load_quantized import MANIFEST, TQFormatError

peers, pack_peers = benchmark("peers"), benchmark("pack_peers")

SETTINGS = evaluate.Settings(max_length=32, stride=16)


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(package), reason=f"the peer's package {package} is not installed")


# ------------------------------------------------------------------------------------------------ codecs

ROWS, COLS = 16, 192  # no multiple of 256: the K and IQ types join four rows
WEIGHTS = ROWS * COLS
CODECS = [  # bytes by the format's own definition, and the largest relative squared error that is acceptable
    pytest.param(peers.int8_rows, WEIGHTS + 2 * ROWS, 1e-4, id="int8"),
    pytest.param(partial(peers.rounded, bits=4), WEIGHTS // 64 * (32 + 2) + 3 * ROWS // 2, 0.015, id="rounded"),
    pytest.param(peers.PEERS["ggml-Q4_0"].make.args[0], WEIGHTS // 32 * 18, 0.02, id="Q4_0"),
    pytest.param(peers.PEERS["ggml-Q5_0"].make.args[0], WEIGHTS // 32 * 22, 0.005, id="Q5_0"),
    *(
        pytest.param(
            peers.PEERS[f"ggml-{kind}"].make.args[0],
            WEIGHTS // 256 * size,
            worst,
            id=kind,
            marks=needs("libggml-python"),
        )
        for kind, size, worst in (("Q2_K", 84, 0.15), ("IQ2_XXS", 66, 0.25), ("Q3_K", 110, 0.05), ("Q4_K", 144, 0.02))
    ),
    *(
        pytest.param(partial(peers.iqk, kind=kind), size, worst, id=kind, marks=needs("ik-llama-cpp-python"))
        for kind, size, worst in (  # four joined rows: three blocks each, and a scale where the type has one
            ("IQ2_KT", 4 * (3 * 68 + 4), 0.15),
            ("IQ3_KT", 4 * (3 * 100 + 4), 0.05),
            ("IQ4_KT", 4 * (3 * 128 + 4), 0.02),
            ("IQ4_KSS", 4 * (3 * 128 + 4), 0.02),
            ("IQ3_KS", 4 * (3 * 102 + 2), 0.05),
            ("IQ6_K", 4 * 3 * 212, 0.001),
        )
    ),
    *(
        pytest.param(
            peers.PEERS[f"hqq-{bits}"].make.args[0],
            codes + WEIGHTS // 64 * 4,
            worst,
            id=f"hqq-{bits}",
            marks=needs("hqq"),
        )
        for bits, codes, worst in (
            (2, WEIGHTS // 4, 0.3),
            (3, 5 * 64 * 4, 0.08),  # ten codes in an int32: 48 groups of 64 in 5 rows of 64
            (4, WEIGHTS // 2, 0.02),
        )
    ),
]


@pytest.mark.parametrize(("codec", "size", "worst"), CODECS)
def test_codecs_store_what_their_format_says(codec: Any, size: int, worst: float) -> None:
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.05
    decoded, stored = codec(weight, torch.ones(COLS))
    assert sum(part.numel() * part.element_size() for part in stored.values()) == size
    assert decoded.shape == weight.shape and decoded.dtype == torch.float32
    assert 0 < (decoded - weight).square().sum() / weight.square().sum() < worst


@needs("bitsandbytes")
def test_nf4_counts_its_tables() -> None:
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    decoded, stored = peers.nf4(weight)
    state = stored["quant_state.bitsandbytes__nf4"].numel()
    tables = WEIGHTS // 64 + 16 * 4 + 4 + 256 * 4  # codes of the maxima, levels, scale and levels of the maxima
    assert sum(part.numel() * part.element_size() for part in stored.values()) == WEIGHTS // 2 + tables + state
    assert (decoded - weight).square().sum() / weight.square().sum() < 0.02


def test_int8_rows_of_zeros_and_of_small_values() -> None:
    decoded, _ = peers.int8_rows(torch.tensor([[0.0, 0.0], [1e-30, -1e-30]]))
    assert decoded.tolist() == [[0, 0], [0, 0]]


def test_rounding_between_the_extremes_of_a_group() -> None:
    row = torch.zeros(1, 128)
    row[0, :3] = torch.tensor([-0.75, 3.0, 0.26])  # scale 0.25, zero point 3
    decoded, stored = peers.rounded(row, bits=4)
    assert decoded[0, :4].tolist() == [-0.75, 3.0, 0.25, 0] and not decoded[0, 4:].any()
    assert stored["codes"][0, :2].tolist() == [15 << 4, 3 << 4 | 4] and stored["zeros"].flatten().tolist() == [3, 0]
    assert stored["scales"].dtype == torch.bfloat16


def test_blocks_must_be_filled() -> None:
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*blocks of 32"):
        peers.ggml(torch.zeros(3, 24), None, kind="Q4_0")


def small_checkpoint() -> Any:
    generator = torch.Generator().manual_seed(0)
    linear = {"a.weight": torch.randn(32, 64, generator=generator)}
    embedding = {"e.weight": torch.randn(8, 64, generator=generator)}
    return peers.Checkpoint({}, linear, embedding, {"norm.weight": torch.linspace(0, 1, 64)})


def test_the_policy_counts_the_whole_container() -> None:
    checkpoint = small_checkpoint()
    decoded, size = peers.PEERS["ggml-Q4_0"].make(checkpoint)
    parts = 32 * 64 // 32 * 18 + (8 * 64 + 2 * 8) + 2 * 64  # linear, embedding, norm
    assert parts + 8 < size < parts + 8 + 4 * 100  # and the header, with an entry for each of four tensors
    assert decoded.keys() == {"a.weight", "e.weight", "norm.weight"}
    assert torch.equal(decoded["norm.weight"], checkpoint.rest["norm.weight"].bfloat16().float())
    assert torch.equal(decoded["e.weight"], peers.int8_rows(checkpoint.embedding["e.weight"])[0])


def test_importance_reaches_the_codec_of_its_layer() -> None:
    seen = {}

    def codec(weight: torch.Tensor, importance: torch.Tensor | None) -> Any:
        seen[tuple(weight.shape)] = importance
        return weight, {"whole": weight}

    checkpoint = small_checkpoint()
    importance = torch.rand(64)
    measured = peers.Checkpoint(*list(vars(checkpoint).values())[:4], {"a.weight": importance})
    decoded, _ = peers.by_policy(codec, measured)
    assert seen == {(32, 64): importance} and torch.equal(decoded["a.weight"], checkpoint.linear["a.weight"])


def test_imatrix_file() -> None:
    data = peers.imatrix_file({"blk.0.x": torch.tensor([1.0, 2.5])})
    assert data == struct.pack("<ii7siiff", 1, 7, b"blk.0.x", 1, 2, 1.0, 2.5)


# ------------------------------------------------------------------------------------------------ tiny models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("peers") / "base")


def load_base(base: Path) -> Any:
    return load_model(open_source(str(base)), "text-generation")


def test_parts_and_importance_of_a_checkpoint(base: Path) -> None:
    model = load_base(base)
    ids = torch.arange(40).reshape(2, 20)
    checkpoint = peers.open_checkpoint(model, ids)
    assert set(checkpoint.embedding) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(checkpoint.linear) == 14 and checkpoint.importance.keys() == {*checkpoint.linear, "lm_head.weight"}
    assert checkpoint.weights == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    with torch.inference_mode():
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        last = model.model(ids).last_hidden_state
    for name in ("q_proj", "k_proj"):
        found = checkpoint.importance[f"model.layers.0.self_attn.{name}.weight"]
        torch.testing.assert_close(found, x.square().mean((0, 1)))
    torch.testing.assert_close(checkpoint.importance["lm_head.weight"], last.square().mean((0, 1)))


def test_gguf_file_of_a_checkpoint(base: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint = peers.open_checkpoint(load_base(base))
    names = peers.write_gguf(checkpoint, tmp_path / "plain.gguf")
    weights = checkpoint.linear | checkpoint.embedding | checkpoint.rest
    assert names["blk.1.ffn_down.weight"] == "model.layers.1.mlp.down_proj.weight"
    tensors = {names[t.name]: t for t in gguf.GGUFReader(tmp_path / "plain.gguf").tensors}
    assert tensors.keys() == weights.keys()
    assert all(np.array_equal(tensors[n].data.reshape(w.shape), w.numpy()) for n, w in weights.items())


def test_llama_quantize_needs_whole_blocks(base: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*down_proj.*multiple of 32"):
        peers.PEERS["gguf-Q4_K_M"].make(peers.open_checkpoint(load_base(base)))


def whole_model(positions: int = 64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=positions, **sizes)).eval()


def whole_blocks() -> Any:
    return peers.open_checkpoint(whole_model(), torch.arange(40).reshape(2, 20))


def test_a_tool_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(peers, "packaged_file", lambda *_: Path(sys.executable))
    failed = subprocess.CompletedProcess([], 1, "one line\nno such type")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.LIBRARY.*Q4_K_M.*failed: no such type"):
        peers.PEERS["gguf-Q4_K_M"].make(whole_blocks())


@needs("ik-llama-cpp-python")
def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "mixed.gguf").write_bytes(b"GGUF, but not quite" * 9)
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.LIBRARY.*mixed.gguf"):
        peers.read_gguf(tmp_path / "mixed.gguf", {})


@needs("ik-llama-cpp-python")
def test_llama_quantize_makes_a_mix() -> None:
    checkpoint = whole_blocks()
    decoded, size = peers.PEERS["gguf-Q4_K_M"].make(checkpoint)
    weights = checkpoint.linear | checkpoint.embedding | checkpoint.rest
    assert decoded.keys() == weights.keys() and checkpoint.weights / 2 < size < 2 * checkpoint.weights
    for name, w in weights.items():
        torch.testing.assert_close(decoded[name], w, atol=float(w.abs().max()) / 8, rtol=0)


@needs("ik-llama-cpp-python")
def test_trellis_types_in_a_file_are_those_of_the_codec() -> None:
    checkpoint = whole_blocks()
    embedding, down = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
    makes = [partial(peers.gguf_file, mix="IQ3_KT", embedding=kind) for kind in ("IQ4_NL", "Q6_0")]
    (narrow, small), (wide, large) = (make(checkpoint) for make in makes)
    assert large - small == 2 * 64 * 64 // 32 * (26 - 18)  # bytes of 32 weights; embedding and output layer
    assert torch.equal(narrow[down], wide[down])
    assert torch.equal(narrow[down], peers.iqk(checkpoint.linear[down], checkpoint.importance[down], kind="IQ3_KT")[0])
    exact = checkpoint.embedding[embedding]
    assert (wide[embedding] - exact).square().sum() < (narrow[embedding] - exact).square().sum() / 4


def test_the_embedding_can_have_a_codec_of_its_own() -> None:
    checkpoint = small_checkpoint()
    q4, q5 = (partial(peers.ggml, kind=kind) for kind in ("Q4_0", "Q5_0"))
    decoded, size = peers.by_policy(q4, checkpoint, embedding=q5)
    assert torch.equal(decoded["e.weight"], q5(checkpoint.embedding["e.weight"], None)[0])
    assert size < peers.by_policy(q4, checkpoint)[1]


@pytest.mark.parametrize("coded", [False, True])
def test_a_low_bit_checkpoint_is_a_peer(tmp_path: Path, coded: bool) -> None:
    """An embedding without codes is encoded by the policy, and its copy for a tied output layer is not counted."""
    checkpoint, rng = small_checkpoint(), torch.Generator().manual_seed(1)
    tensors, wanted = {"norm.weight": checkpoint.rest["norm.weight"].bfloat16()}, {}
    for name, rows in (("a", 32), ("e", 8)):
        codes, scales = torch.randint(0, 16, (rows, 64), generator=rng), torch.rand(rows, 2, generator=rng).bfloat16()
        wanted[f"{name}.weight"] = scales.float().repeat_interleave(32, 1) * (codes - 8)
        tensors |= {f"{name}.weight_packed": words(codes, 4), f"{name}.weight_scale": scales}
        tensors[f"{name}.weight_shape"] = torch.tensor([rows, 64])
    if not coded:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("e.")}
        tensors |= {key: checkpoint.embedding["e.weight"].bfloat16() for key in ("e.weight", "lm_head.weight")}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    path = save_quantized(tmp_path / "c", tensors, config)
    plain, small = (peer.make(checkpoint) for peer in peers.packed_peers("gptq-4", path).values())

    linear = 32 * 64 // 2 + 32 * 2 * 2 + 16  # codes, scales, shape
    sizes = [8 * 64 // 2 + 8 * 2 * 2 + 16] * 2 if coded else [8 * 64 + 8 * 2, 8 * 64 // 2 + 8 // 2 + 8 * 2]
    for (decoded, size), own in zip((plain, small), sizes, strict=True):
        parts = linear + own + 2 * 64
        assert parts + 8 < size < parts + 8 + 7 * 100  # and the header
        assert decoded.keys() == {"a.weight", "e.weight", "norm.weight"}
        torch.testing.assert_close(decoded["a.weight"], wanted["a.weight"], rtol=2**-8, atol=0)  # bfloat16 there
        assert torch.equal(decoded["norm.weight"], checkpoint.rest["norm.weight"].bfloat16().float())
    if coded:
        torch.testing.assert_close(plain[0]["e.weight"], wanted["e.weight"], rtol=2**-8, atol=0)
        assert torch.equal(small[0]["e.weight"], plain[0]["e.weight"])
    else:
        assert torch.equal(plain[0]["e.weight"], peers.int8_rows(checkpoint.embedding["e.weight"])[0])
        assert torch.equal(small[0]["e.weight"], peers.rounded(checkpoint.embedding["e.weight"], bits=4)[0])


@pytest.mark.parametrize(
    "method", [pytest.param("gptq", marks=needs("llmcompressor")), pytest.param("autoround", marks=needs("auto-round"))]
)
def test_other_programs_pack_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    base, text = tmp_path / "base", make_text(tmp_path / "text.txt", 2100)
    whole_model(positions=512).save_pretrained(base)
    make_tokenizer(base)
    options = ["--bits", "3", "--group", "32", "--tokens", "2048", "--iterations", "2", "--batch", "2"]
    arguments = [method, str(base), str(tmp_path / "out"), *options, "--calibration", str(text)]
    monkeypatch.setattr(sys, "argv", ["pack_peers.py", *arguments])
    pack_peers.main()
    checkpoint = peers.open_checkpoint(load_base(base))
    decoded, size = peers.packed(checkpoint, path=tmp_path / "out")
    assert decoded.keys() == (checkpoint.linear | checkpoint.embedding | checkpoint.rest).keys()
    for name, w in checkpoint.linear.items():
        assert 0 < (decoded[name] - w).square().sum() / w.square().sum() < 0.1, name
        assert len(decoded[name][0, :32].unique()) <= 8
    assert size < checkpoint.weights + 100 * 100  # at 4 to 8 bits, and the header


def exact(checkpoint: Any) -> Any:
    return checkpoint.linear | checkpoint.embedding | checkpoint.rest, 1000


def noisy(checkpoint: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    found = {n: w + 0.02 * torch.randn(w.shape, generator=generator) for n, w in checkpoint.linear.items()}
    return found | checkpoint.embedding | checkpoint.rest, 500


def absent(checkpoint: Any) -> Any:
    raise TQFormatError("UNSUPPORTED.LIBRARY", "absent", "no such package")


def incomplete(checkpoint: Any) -> Any:
    return checkpoint.linear, 10


def broken(checkpoint: Any) -> Any:
    return {n: w * float("nan") for n, w in exact(checkpoint)[0].items()}, 10


def test_all_candidates_go_through_the_same_evaluation(base: Path, tmp_path: Path) -> None:
    repo, text = repo_from_checkpoint(base, tmp_path / "repo", "text-generation"), make_text(tmp_path / "text.txt", 300)
    expected = evaluate.evaluate(str(base), repo, [str(text)], SETTINGS, cache_dir=tmp_path / "cache", quiet=True)
    fakes = (exact, noisy, absent, incomplete, broken)
    chosen = {make.__name__: peers.Peer(make, ()) for make in fakes}
    out = tmp_path / "peers"
    report = peers.run_comparison(str(base), str(text), [repo], chosen, out, SETTINGS, at_once=2)

    found = {c["name"]: c for c in report["candidates"]}
    assert found.keys() == {"repo", "exact", "noisy"}
    assert found["exact"]["perplexity_ratio"] == 1 and found["exact"]["kl_mean"] == 0
    assert found["exact"]["top1_agreement"] == 1 and found["noisy"]["kl_mean"] > 0
    assert found["repo"]["perplexity"] == expected["quantized"]["perplexity"]
    assert found["repo"]["kl_mean"] == expected["kl_divergence"]["mean"]
    assert found["repo"]["top1_agreement"] == expected["top1_agreement"]["rate"]
    assert {c["base_perplexity"] for c in found.values()} == {expected["base"]["perplexity"]}
    weights = sum(p.numel() for p in load_base(base).parameters())
    assert found["noisy"]["bits_per_weight"] == 8 * 500 / weights
    assert [found[name]["series"] for name in ("repo", "noisy")] == ["tqformat", "noisy"]
    files = json.loads((repo / MANIFEST).read_text("utf-8"))["files"].values()
    payload = sum(file["size"] for file in files if file["role"] == "payload")
    assert found["repo"]["bytes"] == payload + (repo / MANIFEST).stat().st_size

    reasons = {"absent": "no such package", "incomplete": "lacks this weight", "broken": "NON_FINITE"}
    assert report["not_made"].keys() == reasons.keys()
    assert all(reason in report["not_made"][name] for name, reason in reasons.items())
    table = (tmp_path / "peers.md").read_text("utf-8")
    assert "| noisy | peer | 500 |" in table and "absent was not made" in table
    better = next(line for line in table.splitlines() if line.startswith("- repo: peers no larger"))
    assert "exact" in better
    assert ElementTree.parse(tmp_path / "peers.svg").getroot().tag.endswith("svg")

    # a later run adds to the file, and computes nothing again
    later = {"exact": peers.Peer(absent, ()), "second": peers.Peer(noisy, ())}
    again = peers.run_comparison(str(base), str(text), [], later, out, SETTINGS)
    assert {c["name"]: c for c in again["candidates"]}["exact"] == found["exact"]
    assert {c["name"] for c in again["candidates"]} == {"repo", "exact", "noisy", "second"}
    assert again["not_made"] == {}
    assert json.loads((tmp_path / "peers.json").read_bytes()) == again
    assert peers.run_comparison(str(base), str(text), [repo], later, out, SETTINGS) == again
    # of another text, nothing is kept
    other = make_text(tmp_path / "other.txt", 300, seed=1)
    fresh = peers.run_comparison(str(base), str(other), [], {"noisy": chosen["noisy"]}, out, SETTINGS)
    assert [c["name"] for c in fresh["candidates"]] == ["noisy"]


@pytest.mark.parametrize(
    "quantization, series",
    [
        ({"extra": {"preset": "balanced"}}, "tqformat balanced"),
        ({"extra": {"preset": "best", "tuning": {"steps": 3}}, "allocation": {}}, "tqformat best mixed tuned"),
    ],
)
def test_repositories_of_one_preset_are_a_series(
    monkeypatch: pytest.MonkeyPatch, quantization: dict[str, Any], series: str
) -> None:
    monkeypatch.setattr(peers, "read_manifest", lambda _: SimpleNamespace(quantization=quantization))
    assert peers.find_series(Path()) == series


def test_no_candidate_is_an_error_that_says_why(base: Path, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.txt", 300)
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*absent: .*no such package"):
        peers.run_comparison(str(base), str(text), [], {"absent": peers.Peer(absent, ())}, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out.json").exists()


def test_the_evaluated_text_is_no_calibration(base: Path, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.txt", 300)
    same = tmp_path / "same.txt"
    same.write_bytes(text.read_bytes())
    with pytest.raises(TQFormatError, match="another text"):
        peers.run_comparison(str(base), str(text), [], {}, tmp_path / "out", SETTINGS, (str(same),))


def test_better_peers_are_no_larger() -> None:
    def candidate(name: str, size: int, perplexity: float, kl: float, kind: str = "peer") -> dict[str, Any]:
        return {"name": name, "kind": kind, "bytes": size, "perplexity": perplexity, "kl_mean": kl}

    ours = candidate("ours", 100, 10, 0.1, "tqformat")
    others = [candidate("worse", 100, 11, 0.2), candidate("larger", 101, 9, 0.05), candidate("half", 90, 11, 0.05)]
    assert peers.better_peers(ours, [ours, *others, candidate("better", 100, 9, 0.2)]) == ["half", "better"]
