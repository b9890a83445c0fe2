"""Recovery tuning: the replaced layers compute the same, training helps, and the result is a repository with the same codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_evaluate import make_checkpoint, make_text

from reference_quantizer import tune
from reference_quantizer.__main__ import main
from tqformat import load, open_repo
from tqformat.load_quantized import MANIFEST

IDS = torch.arange(24)[None] % 19


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `base`, its repository `repo` at 2 bit with a trellis, and `text.txt`."""
    path = tmp_path_factory.mktemp("tune")
    make_checkpoint(path / "base")
    make_text(path / "text.txt", 20000)
    command = ["quantize", str(path / "base"), str(path / "repo"), "--bits", "2", "--preset", "best", "--window", "6"]
    assert main([*command, "--calibration", str(path / "text.txt"), "--calibration-tokens", "2048", "--quiet"]) == 0
    return path


def run(lab: Path, out: Path, *options: str) -> int:
    command = [
        "tune",
        str(lab / "base"),
        str(lab / "repo"),
        str(out),
        "--calibration",
        str(lab / "text.txt"),
        "--quiet",
    ]
    return main([*command, "--calibration-tokens", "8192", "--steps", "12", "--batch", "2", *options])


def test_replaced_layers_compute_the_same(lab: Path) -> None:
    model = load(lab / "repo", dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(input_ids=IDS).logits
    with open_repo(lab / "repo") as repo:
        scaled = tune.replace_layers(model, repo, "cpu")
    assert len(scaled) == 16  # 2 blocks of 7, the embedding and the head
    with torch.inference_mode():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))  # bf16 weights, here unrounded
    assert not torch.equal(found, wanted)


def test_tuning_lowers_the_divergence_and_keeps_the_codes(lab: Path, tmp_path: Path) -> None:
    assert run(lab, tmp_path / "out") == 0
    before, after = (json.loads((path / MANIFEST).read_text()) for path in (lab / "repo", tmp_path / "out"))
    record = after["quantization"]["extra"]["tuning"]
    assert record["held_out_kl"][1] < 0.97 * record["held_out_kl"][0]
    assert record["tokens"] == 12 * 2 * 512 and {*after["features"]} == {*before["features"], "column_scale"}
    changed = 0
    with open_repo(lab / "repo") as old, open_repo(tmp_path / "out") as new:
        for name, entry in after["tensors"].items():
            if entry["kind"] == "passthrough":
                changed += not torch.equal(old.dequantize(name), new.dequantize(name))
                continue
            (stage,) = entry["stages"]
            assert torch.equal(old._read(stage["codes"]), new._read(stage["codes"]))
            changed += not torch.equal(old._read(stage["scales"]), new._read(stage["scales"]))
    assert changed > 15
    command = [sys.executable, "-m", "conformance", "check", str(tmp_path / "out")]
    judged = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert "PASS L3" in judged.stdout, judged.stdout


def test_what_is_written_computes_what_was_trained(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    plain = tune._train

    def train(base: Any, model: Any, *rest: Any) -> None:
        plain(base, model, *rest)
        with torch.no_grad():
            kept.append(model(input_ids=IDS).logits)

    monkeypatch.setattr(tune, "_train", train)
    assert run(lab, tmp_path / "out") == 0
    with torch.inference_mode():
        found = load(tmp_path / "out", dtype=torch.float32)(input_ids=IDS).logits
    assert torch.allclose(found, kept[0], rtol=0, atol=0.02 * float(kept[0].abs().max()))


def test_nothing_is_written_unless_it_gets_better(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lab, tmp_path / "out", "--learning-rate", "3") == 1
    assert "lower --learning-rate" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_interrupted_run_continues_with_the_same_bytes(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(lab, tmp_path / "whole") == 0
    monkeypatch.setattr(tune, "SAVE_SECONDS", 0.0)
    plain, calls = tune.divergence, 0

    def stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 + 15:  # two held-out sequences, then 7 of 12 steps of two
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(tune, "divergence", stop)
    assert run(lab, tmp_path / "out") == 130
    assert (tmp_path / ".out.tuning").is_file() and not (tmp_path / "out").exists()
    calls = 100
    assert run(lab, tmp_path / "out") == 0
    assert not (tmp_path / ".out.tuning").exists()
    assert calls == 100 + 2 + 10 + 2, "seven steps were not taken again"
    assert not (tmp_path / ".out.tuning").exists()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_a_tuned_repository_can_be_tuned_again(lab: Path, tmp_path: Path) -> None:
    assert run(lab, tmp_path / "once") == 0
    command = ["tune", str(lab / "base"), str(tmp_path / "once"), str(tmp_path / "twice"), "--quiet", "--steps", "4"]
    assert main([*command, "--calibration", str(lab / "text.txt"), "--calibration-tokens", "8192"]) == 0
