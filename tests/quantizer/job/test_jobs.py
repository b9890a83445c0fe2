"""The reference quantizer as a program: plans, sources, whole jobs, interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, interrupted
from helpers import CONFIG, Make, Tensors, files_of, manifest_of, sample_tensors
from safetensors.torch import save_file

import tqformat
from reference_quantizer.__main__ import main
from reference_quantizer.checkpoint.source import Reader, open_source
from reference_quantizer.checkpoint.support import find_license, find_loader_kind
from reference_quantizer.codes.encode import encode_stages
from reference_quantizer.job import quantize as quantize_module
from reference_quantizer.planning.plan import make_plan
from reference_quantizer.planning.settings import Settings
from tqformat.load_quantized import TQFormatError, torch_dtype

INVENTORY = ROOT / "tests" / "data" / "inventory_0_8b.json"  # [shape, dtype, count] of a 0.8B model's 488 tensors


def run(*args: Any) -> int:
    return main(["quantize", "--preset", "fast", *map(str, args), "--quiet"])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).square().sum() / expected.square().sum().clamp_min(1e-300))


# ------------------------------------------------------------------------------------------------ plan


def inventory(tmp_path: Path) -> Path:
    tensors: dict[str, Any] = {}
    for k, (shape, dtype, count) in enumerate(json.loads(INVENTORY.read_text())):
        tensors |= {f"kind{k}.tensor{i}.weight": {"shape": shape, "dtype": dtype} for i in range(count)}
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps(tensors))
    return path


def test_plan_of_a_published_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The totals that the page of a uniform 2-bit release of this model reports."""
    path = inventory(tmp_path)
    assert main(["plan", str(path), "--bits", "2", "--json"]) == 0
    accounting = json.loads(capsys.readouterr().out)["accounting"]
    assert accounting.pop("ratio") == pytest.approx(7.920, abs=5e-4)
    assert accounting == {
        "original_bytes": 1_746_882_752,
        "stored_bytes": 220_568_384,
        "quantized_tensors": 265,
        "passthrough_tensors": 223,
        "quantized_scalars": 873_250_816,
        "passthrough_scalars": 187_968,
    }
    assert main(["plan", str(path), "--bits", "2"]) == 0
    out = capsys.readouterr().out
    assert "248320x1024" in out and "1,746,882,752 -> 220,568,384 bytes, ratio 7.920" in out


def test_plan_needs_neither_torch_nor_weights(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from reference_quantizer.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "plan", str(inventory(tmp_path))]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "vector_length": 32},
        {"bits": 4, "rotation": "haar", "scale_dtype": "F32"},
        {"bits": 5, "rotation": "none", "scale_dtype": "BF16"},
        {"bits": 2, "protect_fragments": ("embed",), "protected_bits": 8, "exclude": ("visual.*",)},
    ],
)
def test_what_is_written_is_what_was_planned(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = sample_tensors()
    source = open_source(str(make(tensors)))
    settings = Settings(**options)
    plan = make_plan(source, settings)
    target = quantize_module.Target(tmp_path / "out", {"id": "x"}, "text-generation")
    out = quantize_module.quantize(source, plan, target)
    manifest = manifest_of(out)
    assert manifest["accounting"].pop("ratio") == pytest.approx(plan.accounting()["ratio"], abs=1e-3)
    assert manifest["accounting"] == {k: v for k, v in plan.accounting().items() if k != "ratio"}
    assert set(manifest["transforms"]) == set(plan.transforms) and set(manifest["codebooks"]) == set(plan.codebooks)
    with tqformat.open_repo(out) as repo:
        assert set(repo.names()) == set(tensors)
        for item in plan.tensors:
            name, weight = item.info.name, tensors[item.info.name]
            decoded, entry = repo.dequantize(name), manifest["tensors"][name]
            assert decoded.shape == weight.shape and decoded.dtype == weight.dtype
            assert entry["kind"] == item.kind and entry["dtype"] == item.info.dtype
            if item.bits is None:
                assert torch.equal(decoded, weight)
            else:
                assert entry["effective_bits"] == item.bits
                found = relative_error(decoded, weight)
                assert found == pytest.approx(entry["extra"]["relative_error"], rel=0.03, abs=1e-5)


def test_plan_decides_by_names_shapes_and_dtypes(make: Make) -> None:
    source = open_source(str(make(sample_tensors())))

    def kinds(**options: Any) -> dict[str, int | None]:
        return {t.info.name: t.bits for t in make_plan(source, Settings(**options)).tensors}

    plain = kinds()
    kept = {"model.layers.0.norm.weight", "no_columns.weight", "double.weight", "position_ids", "mask", "scalar"}
    assert {name for name, bits in plain.items() if bits is None} == kept
    only = kinds(include=("model.*",), exclude=("*.experts.*", "*k_proj*"))
    assert {n for n, b in only.items() if b} == {"model.embed_tokens.weight", "model.layers.0.q_proj.weight"}
    protected = kinds(protect=("odd.weight",), protect_fragments=("layers.0", "norm"))
    assert protected["odd.weight"] is protected["model.layers.0.q_proj.weight"] is None
    protected = kinds(protect=("odd.weight",), protect_fragments=("layers.0",), protected_bits=6)
    assert protected["odd.weight"] == protected["model.layers.0.q_proj.weight"] == 6
    assert protected["model.layers.0.norm.weight"] is None and protected["one_row.weight"] == 4


def test_plan_tells_what_departs_from_the_request(make: Make) -> None:
    source = open_source(str(make({"a": torch.ones(2, 96), "b": torch.ones(2, 96), "c": torch.ones(2, 7)})))
    notes = "\n".join(make_plan(source, Settings(vector_length=40, exclude=("x*",), protect_fragments=("q",))).notes)
    assert "rows of 96: vectors of 32, their largest divisor up to 40 (2 tensors)" in notes
    assert "vectors of 7: not rotated" in notes and "'x*'" in notes and "'q'" in notes


def test_rows_beyond_the_format_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "inventory.json"
    path.write_text(json.dumps({"wide": {"shape": [2, 2**20 + 1], "dtype": "BF16"}}))
    plan = make_plan(open_source(str(path)), Settings())
    assert plan.tensors[0].bits is None and "1048577" in plan.notes[0]


# ------------------------------------------------------------------------------------------------ sources


def shards() -> dict[str, Tensors]:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = {names[0]: {"a.weight": torch.ones(4, 8).half()}, names[1]: {"b.weight": torch.ones(4, 16).bfloat16()}}
    return tensors


def write_index(path: Path, files: dict[str, Tensors]) -> None:
    weight_map = {key: file for file, tensors in files.items() for key in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_with_and_without_index(make: Make) -> None:
    path = make(shards())
    assert set(open_source(str(path)).tensors) == {"a.weight", "b.weight"}
    write_index(path, shards())
    save_file({"c": torch.ones(2, 2)}, path / "consolidated.safetensors")
    source = open_source(str(path))
    assert set(source.tensors) == {"a.weight", "b.weight"} and "consolidated" in source.notes[0]
    with Reader(source) as reader:
        chunks = list(reader.row_chunks(source.tensors["b.weight"], 32))
    assert len(chunks) == 2 and chunks[0].shape == (2, 16) and chunks[0].dtype == torch.bfloat16


def expect_error(code: str, *words: str, **source: Any) -> None:
    with pytest.raises(TQFormatError) as caught:
        open_source(**source)
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_faulty_sources(make: Make, tmp_path: Path) -> None:
    expect_error("BIND.MISSING_FILE", "Hub id", src=str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    expect_error("BIND.MISSING_FILE", "no weights at all", src=str(empty))
    (empty / "pytorch_model.bin").write_bytes(b"x")
    expect_error("BIND.MISSING_FILE", "pytorch_model.bin", src=str(empty))

    path = make(shards(), "index")
    write_index(path, {**shards(), "model-00003-of-00003.safetensors": {"c": torch.ones(1)}})
    expect_error("BIND.MISSING_FILE", "model-00003-of-00003", src=str(path))
    write_index(path, {"model-00001-of-00002.safetensors": {"z": torch.ones(1)}})
    expect_error("BIND.MISSING_TENSOR", "'z'", src=str(path))
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    expect_error("PATH.NAME", "../a", src=str(path))
    (path / "model.safetensors.index.json").write_text("{")
    expect_error("JSON.SYNTAX", "index.json", src=str(path))

    path = make(shards(), "missing")
    (path / "model-00001-of-00002.safetensors").unlink()
    expect_error("BIND.MISSING_FILE", "number 1", src=str(path))

    path = make({"a.safetensors": {"w": torch.ones(2, 2)}, "b.safetensors": {"w": torch.ones(2, 2)}}, "twice")
    expect_error("CONTAINER.DUPLICATE_NAME", "b.safetensors", "a.safetensors", "'w'", src=str(path))

    path = make({"w": torch.ones(2, 2)}, "damaged")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1])
    expect_error("CONTAINER.OFFSETS", "model.safetensors", src=str(path))
    (path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F9X"'))
    expect_error("CONTAINER.DTYPE", "F9X", src=str(path))
    (path / "model.safetensors").write_bytes(b"\0" * 4)
    expect_error("CONTAINER.HEADER_LENGTH", src=str(path))


def test_faulty_inventories(tmp_path: Path) -> None:
    path = tmp_path / "inventory.json"
    for content, code in (
        ("[]", "JSON.SYNTAX"),
        ('{"a": 1}', "SCHEMA.TYPE"),
        ('{"a": {"shape": [-1], "dtype": "F16"}}', "SCHEMA.TYPE"),
        ('{"a": {"shape": [1], "dtype": "F17"}}', "CONTAINER.DTYPE"),
    ):
        path.write_text(content)
        expect_error(code, src=str(path))


def test_hub_cache_directories_name_the_model(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--some-model" / "snapshots"
    folder.mkdir(parents=True)
    path = make({"w": torch.ones(2, 2)}).rename(folder / "abc123")
    source = open_source(str(path))
    assert (source.id, source.revision) == ("owner/some-model", "abc123")


def test_hub_ids_are_fetched(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = make({"w": torch.ones(2, 8)})

    def snapshot_download(repo_id: str, **options: Any) -> str:
        if repo_id != "owner/model":
            raise FileNotFoundError(f"{repo_id} is not there\nsecond line")
        wanted = options["allow_patterns"]
        assert "*.safetensors" in wanted and not any("bin" in p or p in ("*", "*.*") for p in wanted)
        assert options["revision"] == "v1"
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert run("owner/model", tmp_path / "out", "--revision", "v1") == 0
    assert manifest_of(tmp_path / "out")["base_model"] == {"id": "owner/model", "revision": "v1", "license": None}
    expect_error("BIND.MISSING_FILE", "cannot be fetched", src="owner/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expect_error("UNSUPPORTED.LIBRARY", "huggingface_hub", src="owner/other")


# ------------------------------------------------------------------------------------------------ what surrounds the weights


@pytest.mark.parametrize(
    "config, kind",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["XForConditionalGeneration"], "vision_config": {}}, "image-text-to-text"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "text2text-generation"),
        (
            {"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True, "num_mel_bins": 80},
            "automatic-speech-recognition",
        ),
        ({"architectures": ["BertForMaskedLM"]}, "fill-mask"),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classification"),
        ({"architectures": ["BertModel"]}, "feature-extraction"),
        ({"architectures": ["XForConditionalGeneration"]}, None),
        ({"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}, None),
        ({"architectures": ["Mystery"]}, None),
        ({"architectures": ["VisionEncoderDecoderModel"]}, None),
        ({"architectures": None}, None),
        ({}, None),
        (None, None),
    ],
)
def test_loader_kind_follows_from_the_architecture(config: dict[str, Any] | None, kind: str | None) -> None:
    if kind:
        assert find_loader_kind(config) == kind
    else:
        with pytest.raises(TQFormatError, match="--loader-kind"):
            find_loader_kind(config)


def test_licences_are_found(tmp_path: Path) -> None:
    assert find_license(tmp_path) is None
    (tmp_path / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004\n...")
    assert find_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("no front matter\nlicense: mit\n")
    assert find_license(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense:\n- llama3.2\n---\ntext")
    assert find_license(tmp_path) == "llama3.2"
    (tmp_path / "README.md").write_text('---\nlicense: "MIT"\n---\n')
    assert find_license(tmp_path) == "mit"


def test_a_repository_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "repo"
    shutil.copytree(
        ROOT / "conformance" / "vectors" / "v1" / "valid" / "repository" / "typical" / "repo",
        path,
    )
    assert run(path, tmp_path / "out") == 1
    assert "tqformat export" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_support_files_and_provenance(make: Make, tmp_path: Path) -> None:
    path = make({"w": torch.ones(2, 8)}, config={**CONFIG, "time_step_limit": [0.0, float("inf")]})
    roles = {
        "config.json": "support",
        "generation_config.json": "support",
        "tokenizer.json": "support",
        "tokenizer_config.json": "support",
        "special_tokens_map.json": "support",
        "chat_template.jinja": "support",
        "merges.txt": "support",
        "preprocessor_config.json": "support",
        "tokenizer.model": "support",
        "LICENSE": "document",
        "NOTICE": "document",
    }
    for name in roles.keys() - {"config.json"}:
        (path / name).write_text("{}")
    for name in (
        "README.md",
        "training_args.bin",
        "modeling_x.py",
        "picture.png",
        ".gitattributes",
        "LICENSE.",  # no file name of the format
    ):
        (path / name).write_text("x")
    (path / "subfolder").mkdir()
    out = tmp_path / "out"
    assert run(path, out, "--license", "mit", "--base-model", "a/b", "--revision", "r1") == 0
    manifest = manifest_of(out)
    roles |= {"turboquant_weights.safetensors": "payload", "load_quantized.py": "code", "requirements.txt": "document"}
    assert {name: file["role"] for name, file in manifest["files"].items()} == roles
    assert manifest["base_model"] == {"id": "a/b", "revision": "r1", "license": "mit"}
    assert manifest["quantization"]["method"] == "turboquant_mse" and manifest["quantization"]["seed"] == 42
    assert "transformers" in (out / "requirements.txt").read_text()


# ------------------------------------------------------------------------------------------------ jobs


def test_two_runs_give_the_same_bytes(make: Make, tmp_path: Path) -> None:
    path = make(sample_tensors())
    assert run(path, tmp_path / "a", "--bits", 3) == 0
    assert run(path, tmp_path / "b", "--bits", 3) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert run(path, tmp_path / "b", "--bits", 3, "--overwrite", "--seed", 43) == 0
    assert files_of(tmp_path / "a") != files_of(tmp_path / "b")


def test_result_does_not_depend_on_how_the_checkpoint_is_cut(make: Make, tmp_path: Path) -> None:
    tensors = sample_tensors()
    half = dict(list(tensors.items())[::2])
    rest = {k: v for k, v in tensors.items() if k not in half}
    assert run(make(tensors), tmp_path / "a", "--base-model", "x") == 0
    assert run(make({"z.safetensors": half, "y.safetensors": rest}, "cut"), tmp_path / "b", "--base-model", "x") == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_weights_are_stored_in_the_order_of_the_model(make: Make, tmp_path: Path) -> None:
    """Whatever order they were encoded in, or the checkpoint has: layer 2 before layer 10, the output layer last [TQ-PAY-9]."""
    names = ["lm_head", "model.embed_tokens", "model.layers.10.a", "model.layers.2.b", "model.layers.2.a", "model.norm"]
    tensors = {f"{name}.weight": torch.randn(8, 16) for name in names}
    assert run(make(tensors), tmp_path / "a") == 0
    with tqformat.open_repo(tmp_path / "a") as repo:
        want = [f"{names[k]}.weight" for k in (1, 4, 3, 2, 5, 0)]
        assert repo.names() == want
        places = [repo.spans[f"{name}.codes"].begin for name in want]
        assert places == sorted(places)


def test_result_does_not_depend_on_chunks(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks decide sums of errors, and nothing else."""
    path = make(sample_tensors())
    assert run(path, tmp_path / "a") == 0
    original = Reader.row_chunks
    monkeypatch.setattr(Reader, "row_chunks", lambda self, info: original(self, info, 200))
    assert run(path, tmp_path / "b") == 0
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a["turboquant_weights.safetensors"] == b["turboquant_weights.safetensors"]


def test_shards_by_size(make: Make, tmp_path: Path) -> None:
    path = make(sample_tensors())
    assert run(path, tmp_path / "one") == 0
    assert run(path, tmp_path / "many", "--max-shard-size", "2K") == 0
    assert len(list((tmp_path / "many").glob("turboquant_weights-*-of-*.safetensors"))) > 2
    one, many = (tqformat.load_state_dict(tmp_path / name) for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)


def test_scale_dtypes(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"small": torch.full((2, 64), 1e-6), "plain": torch.ones(2, 64), "large": torch.full((2, 64), 1e6)}
    path = make(tensors)
    assert run(path, tmp_path / "auto") == 0
    with tqformat.open_repo(tmp_path / "auto") as repo:
        stored = {name: repo.spans[f"{name}.scales"].dtype for name in tensors}
    assert stored == {"small": "BF16", "plain": "F16", "large": "BF16"}
    assert run(path, tmp_path / "f32", "--scale-dtype", "f32") == 0
    state = tqformat.load_state_dict(tmp_path / "f32")
    assert all(relative_error(state[name], tensors[name]) < 0.2 for name in tensors)
    assert run(path, tmp_path / "f16", "--scale-dtype", "f16") == 1
    assert "error [DATA.NON_FINITE] large: " in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 5] = bad
    path = make({"w": weight, "mask": torch.full((8,), bad)})
    assert run(path, tmp_path / "out") == 1
    assert "error [DATA.NON_FINITE] w: " in (err := capsys.readouterr().err) and "--protect w" in err
    assert not (tmp_path / "out").exists()
    assert run(path, tmp_path / "out", "--protect", "w") == 0
    assert tqformat.load_state_dict(tmp_path / "out")["w"].equal(weight) or bad != bad


def test_tied_tensors_are_stored_once(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    other = weight.clone()
    other[-1, -1] += 1
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": weight.clone(), "x.lm_head.weight": other}
    path = make(tensors)
    assert run(path, tmp_path / "out") == 0
    assert "lm_head.weight equals model.embed_tokens.weight" in capsys.readouterr().err
    manifest = manifest_of(tmp_path / "out")
    assert manifest["tied_weights"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(manifest["tensors"]) == {"model.embed_tokens.weight", "x.lm_head.weight"}
    assert run(path, tmp_path / "apart", "--exclude", "lm_head*") == 0
    assert "tied_weights" not in manifest_of(tmp_path / "apart")


def test_protected_tensors_say_so(make: Make, tmp_path: Path) -> None:
    path = make(sample_tensors())
    assert run(path, tmp_path / "out", "--protect-fragment", "q_proj", "--protected-bits", 8) == 0
    manifest = manifest_of(tmp_path / "out")
    entry = manifest["tensors"]["model.layers.0.q_proj.weight"]
    assert entry["effective_bits"] == 8 and entry["extra"]["protected"] is True
    assert manifest["quantization"]["protected_bits"] == 8
    assert manifest["quantization"]["protected_fragments"] == ["q_proj"]


def test_bits_of_protected_tensors_need_a_protection(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make({"w": torch.ones(2, 8)})
    for command in (["plan", str(path)], ["quantize", str(path), str(tmp_path / "out")]):
        assert main([*command, "--protected-bits", "8"]) == 1
        assert "error [SCHEMA.VALUE] --protected-bits: " in capsys.readouterr().err
    assert main(["plan", str(path), "--protected-bits", "8", "--protect", "w"]) == 0


def test_revisions_of_local_directories(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to select: it is recorded, which is told, and a known other commit is an error."""
    path = make({"w": torch.ones(2, 8)})
    assert main(["plan", str(path), "--revision", "v2"]) == 0
    assert "the revision v2 is recorded; the local directory is read as it is" in capsys.readouterr().err
    snapshot = make({"w": torch.ones(2, 8)}, "models--a--b")
    (tmp_path / "hub" / "models--a--b" / "snapshots").mkdir(parents=True)
    snapshot = snapshot.rename(tmp_path / "hub" / "models--a--b" / "snapshots" / ("1" * 40))
    assert open_source(str(snapshot), "1" * 40).revision == "1" * 40
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*another commit"):
        open_source(str(snapshot), "2" * 40)


def test_haar_rotations_are_stored_and_shared(make: Make, tmp_path: Path) -> None:
    assert run(make(sample_tensors()), tmp_path / "out", "--rotation", "haar") == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["features"] == ["dense"]
    assert manifest["transforms"]["haar-96"] == {
        "kind": "dense",
        "size": 96,
        "matrix": "haar-96.matrix",
        "extra": {"method": "haar", "seed": 42},
    }


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "args",
    [
        *(["--bits", "0"], ["--bits", "9"], ["--seed", "-1"], ["--rotation", "x"], ["--max-shard-size", "0"]),
        *(["--max-shard-size", "4X"], ["--vector-length", "0"], ["--loader-kind", "x"]),
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "out", *args)
    assert caught.value.code == 2


def test_errors_are_one_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def expect(start: str, *args: Any) -> None:
        assert run(*args) == 1
        err = capsys.readouterr().err
        assert err.startswith(start) and err.count("\n") == 1, err

    path, out = make({"w": torch.ones(2, 8)}), tmp_path / "out"
    expect("error [BIND.MISSING_FILE] ", tmp_path / "nowhere", out)
    expect("error [SCHEMA.REFERENCE] --protect v: ", path, out, "--protect", "v")
    expect("error [PATH.NAME] ", path, path / "out")
    expect("error [PATH.NAME] ", path, tmp_path, "--overwrite")
    expect("error [UNSUPPORTED.DEVICE] --device tape: ", path, out, "--device", "tape")
    expect("error [BIND.MISSING_FILE] ", inventory(tmp_path), out)
    expect("error [BIND.MISSING_FILE] config.json: ", make({"w": torch.ones(2, 8)}, "bare", config=None), out)
    quantized = make(
        {"w": torch.ones(2, 8)}, "quantized", config={**CONFIG, "quantization_config": {"quant_method": "q"}}
    )
    expect("error [SCHEMA.VALUE] config.json: quantization_config: ", quantized, out)
    out.mkdir()
    expect("error [PATH.COLLISION] ", path, out)
    (out / "precious").write_text("x")
    expect("error [PATH.COLLISION] ", path, out, "--overwrite")
    assert (out / "precious").exists()


def test_ctrl_c_says_how_to_go_on(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(sample_tensors())
    with monkeypatch.context() as patch:
        patch.setattr("reference_quantizer.job.encoding.encode_stages", interrupted(encode_stages, 5))
        assert run(path, tmp_path / "out") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(path, tmp_path / "out") == 0
    assert run(path, tmp_path / "straight") == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "straight")


# ------------------------------------------------------------------------------------------------ kill -9

KILLED = """
import os, signal, sys
from reference_quantizer.__main__ import main
from reference_quantizer.job import encoding
from tqformat.writer import RepoWriter

RepoWriter.COMMIT_SECONDS = 0
module, name, when, count = {"os": os, "encoding": encoding}[sys.argv[1]], sys.argv[2], sys.argv[3], int(sys.argv[4])
original, calls = getattr(module, name), 0

def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(module, name, dying)
main(sys.argv[5:])
print(calls)
"""


def run_killed(module: str, name: str, when: str, count: int, *args: Any) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        KILLED,
        module,
        name,
        when,
        str(count),
        "quantize",
        "--preset",
        "fast",
        *map(str, args),
        "--quiet",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_kill_and_resume(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any point, the target is absent or complete, and the same command gives the uninterrupted result."""
    path, out = make(sample_tensors()), tmp_path / "out"
    whole = run_killed("os", "fsync", "before", 0, path, tmp_path / "straight")
    assert whole.returncode == 0, whole.stderr
    expected, syncs = files_of(tmp_path / "straight"), int(whole.stdout.split()[-1])
    encoded = 0
    original = encode_stages

    def counting(*args: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return original(*args)

    monkeypatch.setattr("reference_quantizer.job.encoding.encode_stages", counting)
    chunks = sum(t.bits is not None and t.info.rows > 0 for t in make_plan(open_source(str(path)), Settings()).tensors)
    points = [
        ("encoding", "encode_stages", "before", 1),
        ("encoding", "encode_stages", "after", chunks // 2),
        *(("os", "fsync", "before", max(1, syncs * k // 4)) for k in (1, 2, 3)),
        *(("os", "fsync", "after", syncs - k) for k in (2, 1)),
        ("os", "rename", "before", 1),
        ("os", "rename", "after", 1),
    ]
    resumed = 0
    for module, name, when, count in points:
        killed = run_killed(module, name, when, count, path, out)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if out.exists():
            assert files_of(out) == expected, "complete"
        else:
            encoded = 0
            assert run(path, out) == 0
            assert files_of(out) == expected, (module, name, when, count)
            resumed += encoded < chunks
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
    assert resumed >= 5


def test_another_job_does_not_resume(make: Make, tmp_path: Path) -> None:
    path, out = make(sample_tensors()), tmp_path / "out"
    assert run_killed("encoding", "encode_stages", "after", 6, path, out).returncode == -signal.SIGKILL
    assert run(path, out, "--bits", 4) == 0
    assert run(path, tmp_path / "straight", "--bits", 4) == 0
    assert files_of(out) == files_of(tmp_path / "straight")
    changed = sample_tensors()
    changed["odd.weight"] += 1
    out = tmp_path / "again"
    assert run_killed("encoding", "encode_stages", "after", 6, path, out).returncode == -signal.SIGKILL
    before = os.stat(path / "model.safetensors").st_mtime_ns
    make(changed)
    os.utime(path / "model.safetensors", ns=(before + 10**9, before + 10**9))
    assert run(path, out) == 0
    assert run(path, tmp_path / "new") == 0
    assert files_of(out) == files_of(tmp_path / "new")


def test_torch_dtypes_of_the_loader_cover_the_sources() -> None:
    assert [torch_dtype(name) for name in ("F16", "BF16", "F32")] == [torch.float16, torch.bfloat16, torch.float32]
