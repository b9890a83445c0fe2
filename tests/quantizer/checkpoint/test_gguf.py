"""GGUF files as sources: small ones made here with gguf's writer, imported, planned and quantized; and what is refused."""

import hashlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_python
from helpers import GGUF_HEADS, GGUF_HIDDEN, GGUF_LAYERS, GGUF_WORDS, make_gguf
from safetensors.torch import load_file

from reference_quantizer.__main__ import main
from reference_quantizer.checkpoint import gguf_source
from reference_quantizer.checkpoint.source import PROVENANCE, open_source
from tqformat import TQFormatError, load, open_repo

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    path = tmp_path_factory.mktemp("gguf") / "small-Q8_0.gguf"
    return path, make_gguf(path)


@pytest.fixture(scope="module")
def checkpoint(small: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["import-gguf", str(small[0]), str(out)]) == 0
    return out


def test_import(small: tuple[Path, dict[str, np.ndarray[Any, Any]]], checkpoint: Path) -> None:
    """Every tensor: those that are mapped by name alone, and the heads of q and k, which GGUF stores interleaved."""
    path, decoded = small
    state = load_file(checkpoint / "model.safetensors")
    parts = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    parts |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")} | {"ffn_norm": "post_attention_layernorm"}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names |= {
        f"blk.{i}.{k}.weight": f"model.layers.{i}.{v}.weight" for i in range(GGUF_LAYERS) for k, v in parts.items()
    }
    for i in range(GGUF_LAYERS):
        for part, heads in (("q", GGUF_HEADS), ("k", 2)):
            name = f"blk.{i}.attn_{part}.weight"
            names[name] = f"model.layers.{i}.self_attn.{part}_proj.weight"
            interleaved = decoded[name].reshape(heads, GGUF_HIDDEN // GGUF_HEADS // 2, 2, GGUF_HIDDEN)
            decoded = decoded | {name: interleaved.swapaxes(1, 2).reshape(-1, GGUF_HIDDEN)}
    assert set(names.values()) == set(state) and set(names) == set(decoded)
    for stored, name in names.items():
        assert torch.equal(state[name], torch.tensor(decoded[stored]).bfloat16()), name

    config = json.loads((checkpoint / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    assert (checkpoint / "tokenizer.json").is_file()
    facts = json.loads((checkpoint / PROVENANCE).read_text())
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and facts["file"] == path.name
    assert (
        facts["tensor_types"] == {"F32": 2 * GGUF_LAYERS + 1, "Q8_0": 7 * GGUF_LAYERS + 1}
        and facts["quantized"] is True
    )


def test_plan_of_the_file_is_that_of_the_checkpoint(
    small: tuple[Path, Any], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for source in (small[0], small[0].parent, checkpoint):
        assert main(["plan", str(source), "--bits", "4", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        notes = plan.pop("notes")
        assert any("already quantized (F32 5, Q8_0 15)" in note for note in notes) == (source != checkpoint)
        plans.append(plan)
    assert plans[0] == plans[1] == plans[2]


def test_quantize(
    small: tuple[Path, Any],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the file as from the checkpoint; interrupted, the import is not done again; and the manifest tells the source."""
    from reference_quantizer.job import quantize as module

    out, work = tmp_path / "out", tmp_path / ".out.gguf"
    command = ["quantize", str(small[0]), str(out), "--bits", "4", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "quantize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    assert (work / PROVENANCE).is_file() and "importing" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(gguf_source, "import_gguf", lambda *_, **__: pytest.fail("imported twice"))
        assert main(command) == 0
    assert "going on with the checkpoint" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

    assert main(["quantize", str(checkpoint), str(tmp_path / "twin"), "--bits", "4", "--quiet"]) == 0
    payload = "turboquant_weights.safetensors"
    assert (out / payload).read_bytes() == (tmp_path / "twin" / payload).read_bytes()
    manifest = json.loads((out / "quant_manifest.json").read_text())
    base = manifest["base_model"]
    assert (base["id"], base["license"]) == ("small-Q8_0", "mit")
    assert base["extra"]["imported_from"] == json.loads((checkpoint / PROVENANCE).read_text())
    assert PROVENANCE not in manifest["files"]
    with open_repo(out) as repo:
        assert repo.manifest.base_model["extra"]["imported_from"]["tensor_types"]["Q8_0"] == 15
    assert torch.isfinite(load(out)(torch.tensor([[0, 5, 9]])).logits).all()

    assert main(command) == 1 and not work.exists()  # the target exists: nothing is imported


def test_evaluate_against_the_file(
    small: tuple[Path, Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As against the checkpoint; the import stays in the cache and is done once."""
    repo, text = tmp_path / "repo", tmp_path / "text.txt"
    assert main(["quantize", str(checkpoint), str(repo), "--bits", "4", "--quiet"]) == 0
    text.write_text("ab " * 200)

    def evaluate(base: Path, name: str) -> dict[str, Any]:
        settings = ["--max-length", "32", "--stride", "16", "--max-windows", "2", "--quiet"]
        paths = ["--dataset", str(text), "--cache-dir", str(tmp_path / name)]
        assert main(["evaluate", str(base), str(repo), *paths, *settings]) == 0
        return dict(json.loads((repo / "eval_summary.json").read_text()))

    found = evaluate(small[0], "cache")
    (kept,) = (p for p in (tmp_path / "cache").glob("gguf-*") if p.is_dir())
    assert (kept / PROVENANCE).is_file()
    monkeypatch.setattr(gguf_source, "import_gguf", lambda *_, **__: pytest.fail("imported twice"))
    again, plain = evaluate(small[0], "cache"), evaluate(checkpoint, "other")
    for key in ("base", "quantized", "kl_divergence", "base_weights_sha256"):
        assert found[key] == again[key] == plain[key], key
    assert main(["evaluate", str(small[0]), str(repo), "--revision", "main", "--dataset", str(text)]) == 1


def test_a_release_keeps_the_import_until_it_is_evaluated(
    small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reference_quantizer.commands import release
    from reference_quantizer.evaluation import evaluate as module
    from reference_quantizer.release import card

    out, work, text = tmp_path / "out", tmp_path / ".out.gguf", tmp_path / "text.txt"
    text.write_text("ab " * 200)
    monkeypatch.setattr(card.figures, "draw", lambda facts: {})
    command = ["release", str(small[0]), str(out), "--bits", "4", "--dataset", str(text), "--quiet"]
    command += ["--max-length", "32", "--stride", "16", "--max-windows", "2", "--cache-dir", str(tmp_path / "cache")]
    imports: list[Any] = []
    real = gguf_source.import_gguf
    monkeypatch.setattr(
        gguf_source, "import_gguf", lambda *args, **keys: (imports.append(args), real(*args, **keys))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    assert out.is_dir() and (work / PROVENANCE).is_file()
    assert main(command) == 0
    assert len(imports) == 1 and not work.exists()
    assert main(command) == 0  # complete: nothing is imported
    assert len(imports) == 1
    assert main([*command, "--bos", "never"]) == 0  # the evaluation anew: the base is needed again
    assert len(imports) == 2 and not work.exists()
    manifest = json.loads((out / "quant_manifest.json").read_text())
    assert manifest["base_model"]["extra"]["imported_from"]["file"] == small[0].name
    assert release.is_described(out, None)


def test_a_package_in_parts(small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("some_model_gguf")
    package.MODEL_NAME = "model.gguf"  # type: ignore[attr-defined]
    package.assemble = lambda target: shutil.copy(small[0], target)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_model_gguf", package)
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    file = gguf_source.find_file("package:some-model-gguf", tmp_path / "work")
    assert file.read_bytes() == small[0].read_bytes() and file.parent == tmp_path / "work"


def test_what_is_for_this_module(small: tuple[Path, Any], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "odd name").write_bytes(small[0].read_bytes()[:64])
    (tmp_path / "inventory.json").write_text("{}")
    wanted = {
        small[0]: True,
        small[0].parent: True,
        tmp_path / "odd name": True,
        "package:x": True,
        "missing.gguf": True,
    }
    wanted |= {checkpoint: False, tmp_path: False, tmp_path / "inventory.json": False, "owner/name": False}
    assert {path: gguf_source.is_gguf(str(path)) for path in wanted} == wanted


def refused(src: Path | str, tmp_path: Path) -> tuple[str, str]:
    with pytest.raises(TQFormatError) as caught:
        gguf_source.import_gguf(str(src), tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name], "something was left behind"
    return caught.value.code, caught.value.message


def test_files_that_are_refused(small: tuple[Path, Any], tmp_path: Path) -> None:
    data = small[0].read_bytes()
    (tmp_path / "x.gguf").write_bytes(b"PK" + data)
    assert refused(tmp_path / "x.gguf", tmp_path)[0] == "CONTAINER.HEADER"
    (tmp_path / "x.gguf").write_bytes(data[: len(data) // 2])
    assert refused(tmp_path / "x.gguf", tmp_path)[0] == "CONTAINER.HEADER"
    (tmp_path / "y.gguf").write_bytes(data)
    assert refused(tmp_path, tmp_path)[0] == "SCHEMA.AMBIGUOUS"
    (tmp_path / "y-00001-of-00002.gguf").write_bytes(data)
    assert refused(tmp_path / "y-00001-of-00002.gguf", tmp_path)[0] == "BIND.SHARDS"
    assert refused(tmp_path / "missing.gguf", tmp_path)[0] == "BIND.MISSING_FILE"
    assert refused("package:no-such-package-here", tmp_path)[0] == "UNSUPPORTED.LIBRARY"


def test_models_that_are_refused(tmp_path: Path) -> None:
    make_gguf(tmp_path / "a.gguf", architecture="grok")
    code, message = refused(tmp_path / "a.gguf", tmp_path)
    assert code == "UNSUPPORTED.LIBRARY" and "'grok'" in message
    make_gguf(tmp_path / "b.gguf", leave_out="blk.1.ffn_up.weight")
    assert refused(tmp_path / "b.gguf", tmp_path)[0] == "BIND.MODEL"
    make_gguf(tmp_path / "c.gguf", add="blk.0.attn_sinks.weight")
    assert refused(tmp_path / "c.gguf", tmp_path)[0] == "BIND.MODEL"


def test_a_wrong_value_is_found(small: tuple[Path, Any], checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(checkpoint, tmp_path / "copy")
    state = load_file(checkpoint / "model.safetensors")
    state["model.embed_tokens.weight"][GGUF_WORDS - 1, 3] += 1
    save_file(state, tmp_path / "copy" / "model.safetensors")
    with gguf_source.opened(small[0]) as reader:
        gguf_source._check(checkpoint, small[0], reader)
        with pytest.raises(TQFormatError, match=r"BIND\.TENSOR.*token_embd"):
            gguf_source._check(tmp_path / "copy", small[0], reader)


def test_rope_tables_are_left_out_and_told(tmp_path: Path) -> None:
    make_gguf(tmp_path / "r.gguf", add="rope_freqs.weight")
    facts = gguf_source.import_gguf(str(tmp_path / "r.gguf"), tmp_path / "out")
    assert facts["left_out"] == ["rope_freqs.weight"] and "rope scaling" in gguf_source.describe_import(facts)[1]
    assert "rope" not in " ".join(open_source(str(tmp_path / "out")).tensors)


def test_without_the_libraries(small: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, message = refused(small[0], tmp_path)
    assert code == "UNSUPPORTED.LIBRARY" and "the extra `gguf` of tqformat" in message


def test_quiet_is_quiet(small: tuple[Path, Any], tmp_path: Path) -> None:
    """The bars of transformers and gguf, in a process of its own; what a reader should know of the file is still said."""
    told = []
    for options in ([], ["--quiet"]):
        arguments = ["import-gguf", str(small[0]), str(tmp_path / f"out{len(told)}"), *options]
        done = run_python("-m", "reference_quantizer", *arguments)
        assert done.returncode == 0, done.stderr
        told.append(done.stderr)
    assert "it/s]" in told[0] and all(line.startswith("note: ") for line in told[1].splitlines()), told[1]
