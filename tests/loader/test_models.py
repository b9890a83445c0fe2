"""tqformat.load against transformers: every parameter and buffer equals that of the dequantized plain checkpoint."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import DEVICES, edit_manifest, new_writer, quantize_simply, repo_from_checkpoint, run_python
from helpers import MODELS, llama
from transformers.utils import logging

import tqformat
from tqformat import TQFormatError, add_files, export_safetensors, load_quantized, open_repo
from tqformat.load_quantized import LOADER_KINDS, Repo


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(repository, dequantized plain checkpoint) of a model by name, in bfloat16; made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            torch.manual_seed(0)
            build, kind, extra = MODELS[name]
            model = build().to(torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():  # norms and biases that are neither 0 nor 1
                    parameter.add_(0.02 * torch.randn_like(parameter))
            if hasattr(model, "generation_config") and model.can_generate():
                model.generation_config.max_new_tokens = 7
            model.save_pretrained(root / name / "checkpoint")
            repo = repo_from_checkpoint(root / name / "checkpoint", root / name / "repo", kind, extra)
            made[name] = repo, export_safetensors(repo, root / name / "plain")
        return made[name]

    return make


@pytest.fixture
def copied(repos: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(repos("llama-tied")[0], tmp_path / "copy"))


def reference(name: str, plain: Path, **options: Any) -> Any:
    return getattr(transformers, LOADER_KINDS[MODELS[name][1]]).from_pretrained(plain, **options).eval()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those that no checkpoint holds among them, under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_same(model: Any, other: Any) -> None:
    a, b = tensors(model), tensors(other)
    assert type(model) is type(other) and a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].cpu(), b[name].cpu()), name
    assert not model.training and not any(module.training for module in model.modules())


# ------------------------------------------------------------------------------------------------ every kind of model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_load_equals_the_plain_checkpoint(name: str, device: str, repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos(name)
    model = tqformat.load(repo, device)
    assert_same(model, reference(name, plain))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {t.device.type for t in tensors(model).values()} == {device}
    assert model.device.type == device


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "t5"])
def test_generation(name: str, repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos(name)
    model, other = tqformat.load(repo), reference(name, plain)
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 7
    ids = torch.tensor([[5, 6, 7]])
    got = model.generate(input_ids=ids, do_sample=False)
    assert torch.equal(got, other.generate(input_ids=ids, do_sample=False)) and 1 < got.shape[1] <= 3 + 7 + 1


def test_a_vision_model_answers(repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos("qwen3.5-vl")
    model, other = tqformat.load(repo), reference("qwen3.5-vl", plain)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert "mtp.norm.weight" in open_repo(repo).names()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_dtype(name: str, dtype: torch.dtype, repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos(name)
    model = tqformat.load(repo, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.config.dtype == dtype
    assert_same(model, reference(name, plain, dtype=dtype))
    assert torch.get_default_dtype() == torch.float32


def test_dtype_without_one_in_the_configuration(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["dtype"]
    add_files(copied, {"config.json": ("support", json.dumps(config).encode())})
    assert {p.dtype for p in tqformat.load(copied).parameters()} == {torch.bfloat16}


def test_load_quantized_model_and_strings(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, manifest = tqformat.load_quantized_model(str(copied), device="cpu", dtype=torch.float32)
    assert manifest == json.loads((copied / "quant_manifest.json").read_text())
    monkeypatch.chdir(copied)
    again, _ = tqformat.load_quantized_model()
    assert torch.equal(model.lm_head.weight.bfloat16(), again.lm_head.weight)
    assert sorted(file.name for file in copied.iterdir()) == sorted(["quant_manifest.json", *manifest["files"]])


def test_tied_weights_share_memory(repos: Callable[..., tuple[Path, Path]]) -> None:
    model = tqformat.load(repos("llama-tied")[0])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_alias_fills_a_weight_that_the_model_does_not_tie(tmp_path: Path) -> None:
    """Equal embeddings in an untied model: stored once, with an alias; the model still gets both [TQ-TIE-2]."""
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path / "checkpoint")
    alias = {"lm_head.weight": "model.embed_tokens.weight"}
    repo = repo_from_checkpoint(tmp_path / "checkpoint", tmp_path / "repo", "text-generation", ties=alias)
    loaded = tqformat.load(repo)
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    plain = export_safetensors(repo, tmp_path / "plain")
    assert_same(loaded, transformers.AutoModelForCausalLM.from_pretrained(plain))


def test_an_alias_that_the_model_ties_itself_is_harmless(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "checkpoint")
    alias = {"lm_head.weight": "model.embed_tokens.weight"}
    repo = repo_from_checkpoint(tmp_path / "checkpoint", tmp_path / "repo", "text-generation", ties=alias)
    loaded = tqformat.load(repo)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    plain = export_safetensors(repo, tmp_path / "plain")
    assert_same(loaded, transformers.AutoModelForCausalLM.from_pretrained(plain))


def test_other_float_types_and_shards(tmp_path: Path) -> None:
    model = llama().to(torch.float16)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    repo = repo_from_checkpoint(tmp_path / "checkpoint", tmp_path / "repo", "text-generation", max_shard_bytes=3000)
    assert len(list(repo.glob("*.safetensors"))) > 3
    plain = export_safetensors(repo, tmp_path / "plain", max_shard_bytes=10_000)
    assert (plain / "model.safetensors.index.json").exists()
    assert_same(tqformat.load(repo), transformers.AutoModelForCausalLM.from_pretrained(plain))


def test_the_model_tells_where_it_comes_from(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT records `name_or_path` of a model's own attributes as the base model of an adapter."""
    monkeypatch.chdir(copied.parent)
    for given in (copied, "copy"):
        for model in (tqformat.load(given), tqformat.load_quantized_model(given)[0]):
            config = model.config
            assert {vars(model)["name_or_path"], config.name_or_path, config._name_or_path} == {str(given)}


def test_three_threads_load_at_once(repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos("llama-tied")  # without a lock, tied weights count as missing
    start = threading.Barrier(3)

    def load(_: int) -> Any:
        start.wait()
        return tqformat.load(repo)

    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(load, range(3)))
    for model in models:
        assert_same(model, reference("llama-tied", plain))


# ------------------------------------------------------------------------------------------------ options of transformers


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", {"": torch.device("cpu")}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto chooses the GPU")
def test_device_map(device_map: Any, repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, plain = repos("mixtral")
    model = tqformat.load(repo, device_map=device_map)
    assert_same(model, reference("mixtral", plain))
    assert {t.device.type for t in tensors(model).values()} == {"cpu"}
    assert tqformat.load_quantized_model(repo, device_map=device_map)[0].device.type == "cpu"


SPLIT = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
SPLIT |= dict.fromkeys(("model.layers", "lm_head"), "disk")


@pytest.mark.parametrize("options", [{"device_map": "auto", "max_memory": {"cpu": 25_000}}, {"device_map": SPLIT}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device map would name the GPU")
def test_weights_on_disk(options: dict[str, Any], repos: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """What does not fit lies in offload_folder, decoded, and comes in as it is used."""
    repo, plain = repos("llama-untied")
    model = tqformat.load(repo, offload_folder=tmp_path / "spill", **options)
    assert "disk" in model.hf_device_map.values() and any(p.stat().st_size for p in (tmp_path / "spill").iterdir())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference("llama-untied", plain)(ids).logits)


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("packed", [False, True])
def test_names_are_gone_over_once(
    name: str, packed: bool, repos: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], transformers.LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "from_pretrained", lambda *a, **k: (calls.append(k), plain(*a, **k))[1]
    )
    tqformat.load(repos(name)[0], packed=packed)
    assert [str(call["device_map"][""]) for call in calls] == ["cpu"]
    monkeypatch.setattr(load_quantized, "fits_model", lambda *_: False)
    tqformat.load(repos(name)[0], packed=packed)
    assert [str(call["device_map"][""]) for call in calls[1:]] == ["meta", "cpu"]


def test_which_repositories_fit_a_model_plainly() -> None:
    def fits(change: Callable[[dict[str, Any]], Any] = lambda _: None, tie: bool = False) -> bool:
        model = llama(tie_word_embeddings=tie)
        tied = {"lm_head.weight"} if tie else set()
        found = {name: SimpleNamespace(shape=tuple(t.shape)) for name, t in model.state_dict().items()}
        found = {name: w for name, w in found.items() if name not in tied}
        change(found)
        model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
        manifest: Any = SimpleNamespace(tensors=found)
        return load_quantized.fits_model(manifest, model)

    other = SimpleNamespace(shape=(3, 5))
    assert fits() and fits(tie=True) and fits(lambda found: found.update({"mtp.x": other}))
    assert not fits(lambda found: found.pop("lm_head.weight"))
    assert not fits(lambda found: found.update({"extra.mtp.x": other}))
    for tie in (False, True):
        assert not fits(lambda found: found.pop("model.norm.weight"), tie)
        assert not fits(lambda found: found.update({"model.norm.weight": other}), tie)
    assert not fits(lambda found: found.update({"lm_head.weight": other}), tie=True)


def test_each_weight_is_decoded_where_it_goes(
    repos: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is an index, as in the maps that accelerate makes, is not mistaken for the CPU."""
    repo, _ = repos("llama-untied")
    asked: list[Any] = []
    monkeypatch.setattr(Repo, "dequantize", lambda _self, _name, device, _dtype: asked.append(device))
    places = [0, 1, "cuda:2", torch.device("cuda", 3), "cpu", None]
    with open_repo(repo) as opened:
        weight = load_quantized.LazyWeight(opened, "lm_head.weight")
        for device in places:
            weight.to(device=device)
        assert asked == [*places[:-1], "cpu"] and weight.to("meta").is_meta and weight.to(torch.device("meta")).is_meta


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_options(attention: str, repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, _ = repos("llama-tied")
    model = tqformat.load(repo, attn_implementation=attention, use_cache=False, dtype="float32")
    assert model.config._attn_implementation == attention
    assert model.model.layers[0].self_attn.config._attn_implementation == attention
    assert (
        model.config.use_cache is False and model.dtype == torch.float32
    )  # a key of the configuration; a dtype's name
    assert tqformat.load(repo, dtype="auto").dtype == tqformat.load(repo).dtype == torch.bfloat16
    assert tqformat.load(repo, torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"attn_implementation": "telepathy"}, "BIND.MODEL", ["attn_implementation", "telepathy"]),
        ({"no_such_option": 1}, "SCHEMA.UNKNOWN_FIELD", ["no_such_option"]),
        ({"state_dict": {}}, "SCHEMA.UNKNOWN_FIELD", ["state_dict"]),
        ({"config": None}, "SCHEMA.UNKNOWN_FIELD", ["config"]),
        ({"token": "secret"}, "SCHEMA.UNKNOWN_FIELD", ["token", "HF_TOKEN"]),
        ({"tp_plan": "auto"}, "SCHEMA.UNKNOWN_FIELD", ["tp_plan"]),
        ({"device_map": "auto", "device": "cpu"}, "SCHEMA.AMBIGUOUS", ["device", "not both"]),
        ({"device_map": "somewhere"}, "BIND.MODEL", ["device_map", "somewhere"]),
        ({"device_map": {"": "disk"}}, "BIND.MODEL", ["offload"]),
        ({"vocab_size": 7}, "BIND.MODEL", ["mismatched"]),
        ({"dtype": "float17"}, "BIND.MODEL", ["dtype"]),
    ],
)
def test_wrong_options(
    options: dict[str, Any], code: str, words: list[str], repos: Callable[..., tuple[Path, Path]]
) -> None:
    with pytest.raises(TQFormatError) as caught:
        tqformat.load(repos("llama-tied")[0], **options)
    assert caught.value.code == code and "secret" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------------------------------ refusals


def test_a_directory_that_is_no_repository(repos: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """A plain checkpoint is named as one; of another directory it is said what was looked for."""
    plain = repos("llama-tied")[1]
    with pytest.raises(TQFormatError, match=r"plain checkpoint.*transformers.*reference_quantizer quantize") as caught:
        tqformat.load(plain)
    assert caught.value.code == "BIND.MISSING_FILE" and str(plain) in str(caught.value)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(TQFormatError, match=r"quant_manifest\.json.*notes\.txt") as caught:
        tqformat.load(tmp_path)
    assert "plain" not in caught.value.message


def test_the_tokenizer_of_a_repository_without_one(copied: Path) -> None:
    with pytest.raises(TQFormatError, match="this repository has none") as caught:
        tqformat.load_tokenizer(copied)
    assert caught.value.code == "BIND.MISSING_FILE" and "config.json" in caught.value.message


@pytest.mark.parametrize("library", ["transformers", "accelerate", "huggingface_hub"])
def test_a_library_that_is_not_there(copied: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    where = copied if library != "huggingface_hub" else "owner/name"
    with pytest.raises(TQFormatError, match="the extra `models` of tqformat") as caught:
        tqformat.load(where)
    assert caught.value.code == "UNSUPPORTED.LIBRARY" and library in caught.value.message


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(Repo, "dequantize", fail)


def checkpoint_without(tmp_path: Path, name: str = "mixtral") -> Path:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    ("name", "lost", "named"),
    [
        ("llama-untied", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama-untied", "lm_head.weight", "lm_head.weight"),
        ("llama-tied", "model.embed_tokens.weight", "embed_tokens.weight"),
        ("llama-untied", "model.norm.weight", "model.norm.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("t5", "decoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_missing_weight(tmp_path: Path, name: str, lost: str, named: str) -> None:
    checkpoint = checkpoint_without(tmp_path, name)
    kind = MODELS[name][1]
    repo = repo_from_checkpoint(checkpoint, tmp_path / "repo", kind, drop=[lost])
    with open_repo(repo) as opened:
        assert lost not in opened.names()
    with pytest.raises(TQFormatError, match="missing") as caught:
        tqformat.load(repo)
    assert caught.value.code == "BIND.MODEL" and named in caught.value.message


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_a_missing_expert(tmp_path: Path, name: str) -> None:
    """One of the tensors that transformers fuses into one parameter is absent."""
    checkpoint = checkpoint_without(tmp_path, name)
    with open_repo(repo_from_checkpoint(checkpoint, tmp_path / "whole", "text-generation")) as opened:
        lost = next(key for key in opened.names() if ".1." in key and "experts.2" in key)
    repo = repo_from_checkpoint(checkpoint, tmp_path / "repo", "text-generation", drop=[lost])
    with pytest.raises(TQFormatError) as caught:
        tqformat.load(repo)
    assert caught.value.code == "BIND.MODEL"


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("extra", ["surplus.weight", "model.layers.7.mlp.up_proj.weight"])
def test_an_extra_weight(tmp_path: Path, extra: str) -> None:
    checkpoint = checkpoint_without(tmp_path, "llama-tied")
    repo = repo_from_checkpoint(checkpoint, tmp_path / "repo", "text-generation", {extra: torch.ones(3, 4)})
    with pytest.raises(TQFormatError, match="unexpected") as caught:
        tqformat.load(repo)
    assert caught.value.code == "BIND.MODEL" and extra in caught.value.message


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("shape", [(48, 31), (47, 32), (96, 16), (48, 32, 1), (1536,)])
def test_a_weight_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = checkpoint_without(tmp_path, "llama-tied")
    repo = repo_from_checkpoint(checkpoint, tmp_path / "repo", "text-generation", {name: torch.ones(shape)})
    with pytest.raises(TQFormatError) as caught:
        tqformat.load(repo)
    assert caught.value.code == "BIND.MODEL" and name in caught.value.message


@pytest.mark.usefixtures("no_decoding")
def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    checkpoint = checkpoint_without(tmp_path, "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    repo = repo_from_checkpoint(checkpoint, tmp_path / "repo", "text-generation", {name: torch.ones(32, 47)})
    with pytest.raises(TQFormatError) as caught:
        tqformat.load(repo)
    assert caught.value.code == "BIND.MODEL"


@pytest.mark.usefixtures("no_decoding")
def test_the_wrong_loader_kind(copied: Path) -> None:
    for kind in ("text2text-generation", "image-classification"):  # classes that no Llama has
        edit_manifest(copied, lambda m, kind=kind: m.update(loader_kind=kind))
        with pytest.raises(TQFormatError) as caught:
            tqformat.load(copied)
        assert caught.value.code in ("BIND.MODEL", "UNSUPPORTED.LIBRARY"), kind


@pytest.mark.usefixtures("no_decoding")
def test_a_repository_without_configuration(copied: Path) -> None:
    edit_manifest(copied, lambda m: m["files"].pop("config.json"))
    (copied / "config.json").unlink()
    with pytest.raises(TQFormatError) as caught:
        tqformat.load(copied)
    assert "config.json" in str(caught.value)


@pytest.mark.usefixtures("no_decoding")
def test_a_damaged_configuration(copied: Path) -> None:
    (copied / "config.json").write_text("{}")
    with pytest.raises(TQFormatError, match=r"BIND\.SIZE"):
        tqformat.load(copied)
    add_files(copied, {"config.json": ("support", b'{"model_type": "no such model"}')})
    with pytest.raises(TQFormatError):
        tqformat.load(copied)


def test_remote_code_is_never_run(copied: Path, tmp_path: Path) -> None:
    flag = tmp_path / "it-ran"
    module = f"open({str(flag)!r}, 'w')\nfrom transformers import PretrainedConfig, PreTrainedModel\n"
    module += "class C(PretrainedConfig):\n  model_type = 'mine'\nclass M(PreTrainedModel):\n  config_class = C\n"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    add_files(copied, {"config.json": ("support", json.dumps(config).encode()), "mine.py": ("code", module.encode())})
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.REMOTE_CODE"):
        tqformat.load(copied)
    assert not flag.exists() and not [name for name in sys.modules if name.endswith("mine")]


def test_the_tokenizer_runs_no_remote_code(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even after a question: a tokenizer whose class is program text of the repository is refused."""
    flag = tmp_path / "it-ran"
    module = f"open({str(flag)!r}, 'w')\nfrom transformers import PreTrainedTokenizer\nclass T(PreTrainedTokenizer):\n  pass\n"
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["mine.T", None]}}
    files = {"tokenizer_config.json": ("support", json.dumps(settings).encode()), "mine.py": ("code", module.encode())}
    add_files(copied, files)

    def asked(*_: object) -> str:
        flag.touch()
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.REMOTE_CODE"):
        tqformat.load_tokenizer(copied)
    assert not flag.exists()


def test_the_tokenizer(copied: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    plain = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    files = {
        "tokenizer.json": ("support", plain.to_str().encode()),
        "tokenizer_config.json": ("support", json.dumps(settings).encode()),
    }
    add_files(copied, files)
    assert tqformat.load_tokenizer(copied)("two one three")["input_ids"] == [2, 1, 0]
    (copied / "tokenizer.json").write_bytes(b"x" * len(files["tokenizer.json"][1]))
    with pytest.raises(TQFormatError, match=r"BIND\.DIGEST"):
        tqformat.load_tokenizer(copied)


def test_a_device_that_is_not_there(copied: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.DEVICE"):
        tqformat.load(copied, device="cuda")
    with pytest.raises(TQFormatError, match=r"UNSUPPORTED\.DEVICE"):
        tqformat.load(copied, device=["cpu"])


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_corrupted_payload_is_an_error_of_the_format(
    name: str, repos: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """The error of a weight reaches the caller as it is, through all of transformers' loading."""
    repo = Path(shutil.copytree(repos(name)[0], tmp_path / "repo"))
    with open_repo(repo) as opened:
        spans = [span for key, span in opened.spans.items() if key.endswith(".scales")]
    file = repo / "turboquant_weights.safetensors"
    for span in (spans[0], spans[len(spans) // 2], spans[-1]):
        data = bytearray(file.read_bytes())
        whole = bytes(data)
        data[span.begin : span.begin + 4] = b"\x00\x00\xc0\x7f"  # a NaN among the scales
        file.write_bytes(data)
        with pytest.raises(TQFormatError, match=r"BIND\.DIGEST"):
            tqformat.load(repo)
        with pytest.raises(TQFormatError) as caught:
            tqformat.load(repo, verify=False)
        assert caught.value.code == "DATA.NON_FINITE" and "scales" in caught.value.where
        file.write_bytes(whole)
    assert tqformat.load(repo) is not None


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_settings_of_transformers_are_restored(
    copied: Path, bars: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbosity, before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity(logging.INFO)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        if fails:
            edit_manifest(copied, lambda m: m["tensors"].pop("model.norm.weight"))
            monkeypatch.setattr(load_quantized.Repo, "_open_payload", lambda *_: None)
            with pytest.raises(TQFormatError, match=r"BIND\.MODEL"):
                tqformat.load(copied)
        else:
            tqformat.load(copied)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() is bars
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_random_numbers_and_settings_of_torch_are_left_alone(repos: Callable[..., tuple[Path, Path]]) -> None:
    repo, _ = repos("llama-tied")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    tqformat.load(repo)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was initialised at random
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"


# ------------------------------------------------------------------------------------------------ memory

MEASURE = """
import sys, torch
import tqformat

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) << 10

torch.set_num_threads(1)
tqformat.load(sys.argv[1])  # the libraries' own memory
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
model = tqformat.load(sys.argv[2])
weights = sum(p.nbytes for p in model.parameters())
print(status("VmHWM") - before - weights, weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory(
    big_repo: Path, repos: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading takes the finished weights and at most 256 MiB, whatever the largest weight is; here it has 400 MB."""
    done = run_python("-c", MEASURE, str(repos("llama-tied")[0]), str(big_repo), timeout=300)
    assert done.returncode == 0, done.stderr
    over, weights = map(int, done.stdout.split())
    with capsys.disabled():
        print(f"\npeak over the finished weights ({weights / 2**20:.0f} MiB): {over / 2**20:.0f} MiB")
    assert weights > 400_000_000 and over < 256 * 2**20


@pytest.fixture(scope="module")
def big_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tied embedding [200000, 1024] takes 400 MB in bfloat16; 2 bit, one scale per row."""
    root = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16}
    llama(**sizes, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(root / "checkpoint")
    config = json.loads((root / "checkpoint" / "config.json").read_text()) | {"vocab_size": 200_000}
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    with new_writer(root / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_transform("h", "hadamard", 1024, factors=[1024], signs="5a" * 128)
        writer.add_codebook("c4", torch.linspace(-2.5, 2.5, 16))
        writer.add_codebook("c", [-1.51, -0.4528, 0.4528, 1.51])
        for name, tensor in load_file(root / "checkpoint" / "model.safetensors").items():
            if name == "model.embed_tokens.weight":
                codes = torch.randint(0, 256, (200_000, 256), dtype=torch.uint8, generator=generator)
                scales = torch.full((200_000, 1), 0.02)
                stage = {"bits": 2, "codebook": "c", "transform": "h", "codes": codes, "scales": scales}
                writer.add_quantized(name, [200_000, 1024], "BF16", [stage])
            elif tensor.dim() > 1:
                quantize_simply(writer, name, tensor, "BF16")
            else:
                writer.add_passthrough(name, tensor)
        writer.add_file(json.dumps(config).encode(), "support", "config.json")
        return writer.finish()
