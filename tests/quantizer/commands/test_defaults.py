"""What the commands do when nothing is said: a model that works, a reason where it cannot, and what to expect of it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import MODELS, Make, make_checkpoint, manifest_of, sample_tensors

from reference_quantizer.__main__ import _parser, main
from reference_quantizer.checkpoint.source import open_source
from reference_quantizer.commands import settings as choices
from reference_quantizer.planning import expectations
from reference_quantizer.planning.settings import Settings
from tqformat import open_repo

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny model writes less text than the default, and keeps it nowhere but here."""
    monkeypatch.setattr(choices, "FEEDBACK_TOKENS", {"self": 1024, "given": 1024})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_options_a_model_gets_four_bits_with_feedback(tmp_path: Path, capsys: Capture) -> None:
    base, out = make_checkpoint(tmp_path / "base"), tmp_path / "out"
    assert main(["quantize", str(base), str(out), "--quiet"]) == 0
    quantization, tensors = manifest_of(out)["quantization"], manifest_of(out)["tensors"]
    assert (quantization["method"], quantization["bits"], quantization["extra"]["preset"]) == (
        "feedback",
        4,
        "balanced",
    )
    assert quantization["calibration"]["source"] == "self" and quantization["calibration"]["tokens"] == 1024
    bits = {name: entry["effective_bits"] for name, entry in tensors.items() if entry["kind"] == "quantized"}
    assert all(b == (4 if ".layers." in name else 5) for name, b in bits.items())
    assert {name for name, b in bits.items() if b == 5} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("output_error" in tensors[name]["extra"] for name in bits)
    said = capsys.readouterr().err
    assert (
        "embed_tokens.weight, lm_head.weight: 5 bits" in said and "about 1.08 times" in said and "warning" not in said
    )


@pytest.mark.parametrize(
    "model, reason",
    [
        ("bert", "a model for feature-extraction writes no text"),
        ("gpt2", "the blocks of the model have no linear layers"),
    ],
)
def test_where_blocks_cannot_be_walked_it_is_fast_and_says_why(
    tmp_path: Path, capsys: Capture, model: str, reason: str
) -> None:
    import transformers

    base = make_checkpoint(tmp_path / "base")  # for its tokenizer
    if model == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(base)
    else:
        MODELS[model][0]().save_pretrained(base)
    assert main(["quantize", str(base), str(tmp_path / "out"), "--quiet"]) == 0
    said, quantization = capsys.readouterr().err, manifest_of(tmp_path / "out")["quantization"]
    assert f"the preset is fast: {reason}" in said
    assert (quantization["extra"]["preset"], quantization["bits"]) == ("fast", 4) and "calibration" not in quantization


def test_a_model_that_cannot_be_built_is_fast_and_says_why(make: Make, tmp_path: Path, capsys: Capture) -> None:
    assert main(["quantize", str(make(sample_tensors())), str(tmp_path / "out"), "--quiet"]) == 0
    assert "note: no error feedback, the preset is fast: " in capsys.readouterr().err
    assert manifest_of(tmp_path / "out")["tensors"]["model.embed_tokens.weight"]["effective_bits"] == 8


def test_a_model_that_is_too_large_is_fast_and_says_why(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reference_quantizer.model.machine.free_memory", lambda: 1000)
    assert main(["quantize", str(make_checkpoint(tmp_path / "base")), str(tmp_path / "out"), "--quiet"]) == 0
    assert "give text with --calibration" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--cache-dir", "cache"]])
def test_a_release_without_options_has_feedback(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache is the user's where none is named, also while it looks whether the blocks can be walked."""
    monkeypatch.chdir(tmp_path)
    base = make_checkpoint(tmp_path / "base")
    args = _parser().parse_args(["release", str(base), str(tmp_path / "out"), *options])
    assert choices.without_walk(args, open_source(str(base))) is args and (tmp_path / "cache").is_dir()


def test_what_was_asked_for_is_never_replaced(tmp_path: Path, capsys: Capture) -> None:
    base = make_checkpoint(tmp_path / "base")
    MODELS["bert"][0]().save_pretrained(base)
    for options in (["--preset", "balanced"], ["--calibration-tokens", "512"], ["--spill"], ["--tune-steps", "2"]):
        assert main(["quantize", str(base), str(tmp_path / "out"), "--quiet", *options]) == 1
        assert "preset is fast" not in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["plan", "quantize"])
@pytest.mark.parametrize("bits, warned", [(1, True), (2, True), (3, True), (4, False)])
def test_few_bits_without_feedback_are_warned_of(
    tmp_path: Path, capsys: Capture, command: str, bits: int, warned: bool
) -> None:
    base = make_checkpoint(tmp_path / "base")
    out = [str(tmp_path / "out"), "--quiet"] if command == "quantize" else []
    assert main([command, str(base), *out, "--preset", "fast", "--bits", str(bits)]) == 0
    said = capsys.readouterr().err
    assert ("warning: the preset fast" in said and "babbles" in said) == warned


def test_how_long_it_takes_is_said_for_text_and_tuning() -> None:
    def line(*given: Any, **settings: Any) -> str:
        return expectations.expected_time(2**28, Settings(**{"preset": "balanced", **settings}), *given)

    def minutes(*given: Any, **settings: Any) -> int:
        return int(line(*given, **settings).split()[2])

    plain = minutes(8192, False, 0, None, 2)
    assert 2 < plain < minutes(8192, True, 0, None, 2) < minutes(8192, True, 100, None, 2) < 100
    assert plain < minutes(8192, False, 0, "fisher", 2) < minutes(8192, False, 0, "perturbation", 2)
    assert minutes(8192, False, 0, None, 8) <= plain / 2
    assert f"about {plain} min on 2 CPU cores, judging by SmolLM2-135M; --preset" in line(8192, False, 0, None, 2)
    told = line(8192, True, 100, "fisher", 2, preset="best", output_feedback=True)
    stages = told.partition("SmolLM2-135M: ")[2].partition(";")[0]
    assert [part.split()[0] for part in stages.split(", ")] == ["text", "sensitivities", "gradients", "codes", "tuning"]
    best = [minutes(8192, False, 0, None, 2, preset="best", window=w) for w in (8, 12, 14)]
    assert best[0] == best[1] < best[2] / 2


def test_how_long_an_evaluation_takes_is_said() -> None:
    assert "about 165 min more" in expectations.expected_evaluation(2**28, 2**20, 2)  # 2**48 * 7e-11 / 120 = 164.2


def test_expectations_are_the_published_figures() -> None:
    with open(ROOT / "benchmarks" / "quality.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"].startswith(expectations.MODEL)]
    for (preset, bits), ratio in expectations.RATIOS.items():
        (found,) = [row for row in rows if (row["family"], row["candidate"]) == (preset, str(bits))]
        assert float(found["perplexity_ratio"]) == ratio


def test_uniform_gives_every_weight_the_same_bits(make: Make, tmp_path: Path, capsys: Capture) -> None:
    assert (
        main(["quantize", str(make(sample_tensors())), str(tmp_path / "out"), "--uniform", "--bits", "3", "--quiet"])
        == 0
    )
    assert "embed_tokens.weight: 8 bits" not in capsys.readouterr().err
    with open_repo(tmp_path / "out") as repo:
        floats = {
            n: w for n, w in repo.manifest.tensors.items() if len(w.shape) >= 2 and w.dtype in ("F16", "BF16", "F32")
        }
        found = {w.effective_bits for w in floats.values() if w.shape[-1] > 0}
    assert found == {3} and manifest_of(tmp_path / "out")["quantization"]["method"] == "turboquant_mse"


@pytest.mark.parametrize(
    "options",
    [["--preset", "best"], ["--target-bpw", "4"], ["--protect", "lm_head.weight"], ["--protect-fragment", "embed"]],
)
def test_uniform_beside_what_contradicts_it(tmp_path: Path, capsys: Capture, options: list[Any]) -> None:
    assert main(["plan", str(make_checkpoint(tmp_path / "base")), "--uniform", *options]) == 1
    assert f"error [SCHEMA.VALUE] {options[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        *(["--output-feedback"], ["--calibration-inputs", "original"], ["--no-activation-order"], ["--spill"]),
        *(["--candidate-bits", "2,3"], ["--allocator", "perturbation"]),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(tmp_path: Path, capsys: Capture, options: list[str]) -> None:
    base = str(make_checkpoint(tmp_path / "base"))
    assert main(["plan", base, "--preset", "fast", *options]) == 1
    assert f"error [SCHEMA.VALUE] {options[0]}: " in capsys.readouterr().err
    assert main(["plan", base, "--preset", "fast", "--calibration-inputs", "paired", "--activation-order"]) == 0


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_an_include_pattern_must_match(make: Make, tmp_path: Path, capsys: Capture, command: str) -> None:
    out = [str(tmp_path / "out"), "--quiet"] if command == "quantize" else []
    base = make({"a.weight": torch.randn(8, 16)})
    assert main([command, str(base), *out, "--include", "*.weight", "--include", "nothing*"]) == 1
    assert "error [SCHEMA.REFERENCE] --include nothing*: no tensor has such a name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
