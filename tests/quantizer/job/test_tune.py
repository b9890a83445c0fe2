"""Recovery tuning: the replaced layers compute the same, training helps, the result is as large; also as the end of a preset."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, new_writer, random_stage
from helpers import make_checkpoint, make_text, make_twins

from reference_quantizer.__main__ import main
from reference_quantizer.commands import settings as choices
from reference_quantizer.disk import add_documents
from reference_quantizer.job import tune
from reference_quantizer.planning import plan
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
    command += ["--tune-steps", "0", "--calibration", str(path / "text.txt"), "--calibration-tokens", "2048", "--quiet"]
    assert main(command) == 0
    return path


def run(lab: Path, out: Path, *options: str, repo: Path | None = None) -> int:
    command = [
        "tune",
        str(lab / "base"),
        str(repo or lab / "repo"),
        str(out),
        "--calibration",
        str(lab / "text.txt"),
        "--quiet",
    ]
    command += ["--calibration-tokens", "8192", "--steps", "12", "--batch", "2", "--learning-rate", "0.05"]
    return main([*command, *options])


def test_replaced_layers_compute_the_same(lab: Path) -> None:
    model = load(lab / "repo", dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(input_ids=IDS).logits
    with open_repo(lab / "repo") as repo:
        factors = tune.scale_rows(model, repo)
    assert len(factors) == 16 and sum(".layers." in name for name in factors) == 14  # 2 blocks of 7; embedding, head
    with torch.inference_mode():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_factors_are_those_of_the_rows(tmp_path: Path, tied: bool) -> None:
    """Of an embedding and of an output layer, too, be they one matrix or two: as if the weights had been multiplied."""
    source, repo_dir = make_checkpoint(tmp_path / "base", tied=tied), tmp_path / "repo"
    assert main(["quantize", str(source), str(repo_dir), "--bits", "4", "--preset", "fast", "--quiet"]) == 0
    model, wanted = (load(repo_dir, dtype=torch.float32) for _ in range(2))
    with open_repo(repo_dir) as repo:
        factors = tune.scale_rows(model, repo)
    assert len(factors) == 16 - tied
    generator, ids = torch.Generator().manual_seed(0), IDS % 7 + 3
    with torch.no_grad():
        for name, factor in factors.items():
            factor.uniform_(0.5, 2, generator=generator)
            wanted.get_parameter(name).mul_(factor[:, None])
        found, logits = model(input_ids=ids).logits, wanted(input_ids=ids).logits
    assert torch.allclose(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    model(input_ids=ids).logits.square().sum().backward()
    used = factors["model.embed_tokens.weight"].grad.nonzero().flatten().tolist()
    assert used == ([0, 1, *range(3, 64)] if tied else [*range(3, 10)])  # row 2, of padding, is zeros


def test_what_is_stored_once_has_one_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices of a model that is not tied, but has the same bytes in both."""
    monkeypatch.setattr(plan, "LARGE", 16)
    source, repo_dir = make_checkpoint(tmp_path / "base"), tmp_path / "repo"
    make_twins(source)
    assert main(["quantize", str(source), str(repo_dir), "--preset", "fast", "--quiet"]) == 0
    model, wanted, ids = load(repo_dir, dtype=torch.float32), load(repo_dir, dtype=torch.float32), IDS % 7 + 3
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with open_repo(repo_dir) as repo, torch.no_grad():
        factor = tune.scale_rows(model, repo)["model.embed_tokens.weight"]
        factor.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        for weight in (wanted.model.embed_tokens.weight, wanted.lm_head.weight):
            weight.mul_(factor[:, None])
        found, logits = model(input_ids=ids).logits, wanted(input_ids=ids).logits
    assert torch.allclose(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_tuning_lowers_the_divergence_and_keeps_codes_and_size(lab: Path, tmp_path: Path, device: str) -> None:
    assert run(lab, tmp_path / "out", "--device", device) == 0
    before, after = (json.loads((path / MANIFEST).read_text()) for path in (lab / "repo", tmp_path / "out"))
    record = after["quantization"]["extra"]["tuning"]
    assert record["held_out_kl"][1] < 0.97 * record["held_out_kl"][0]
    assert record["tokens"] == 12 * 2 * 512
    assert after["features"] == before["features"] and after["accounting"] == before["accounting"]
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

    def train(targets: Any, held_out: int, model: Any, *rest: Any) -> Any:
        found = plain(targets, held_out, model, *rest)
        with torch.no_grad():
            kept.append(model.model(input_ids=IDS).logits)
        return found

    monkeypatch.setattr(tune, "_train", train)
    assert run(lab, tmp_path / "out") == 0
    with torch.inference_mode():
        found = load(tmp_path / "out", dtype=torch.float32)(input_ids=IDS).logits
    assert torch.allclose(found, kept[0], rtol=0, atol=0.02 * float(kept[0].abs().max()))


def test_nothing_is_written_unless_it_gets_better(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lab, tmp_path / "out", "--learning-rate", "30") == 1
    assert "lower --learning-rate" in capsys.readouterr().err and not (tmp_path / "out").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, sequence: int) -> list[int]:
    """Interrupts tuning before the sequence of this number; later it goes on. The sequences that were gone through."""
    monkeypatch.setattr(tune, "SAVE_SECONDS", 0.0)
    plain, seen = tune.divergence, []

    def stop(targets: Any, k: int, *args: Any) -> float:
        seen.append(k)
        if len(seen) == sequence:
            raise KeyboardInterrupt
        return plain(targets, k, *args)

    monkeypatch.setattr(tune, "divergence", stop)
    return seen


def same_files(a: Path, b: Path) -> None:
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


def test_an_interrupted_run_continues_with_the_same_bytes(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(lab, tmp_path / "whole") == 0
    seen = stop_at(monkeypatch, 2 + 15)  # two held-out sequences, then 7 of 12 steps of two
    assert run(lab, tmp_path / "out") == 130
    assert (tmp_path / ".out.tuning").is_dir() and not (tmp_path / "out").exists()
    del seen[:]
    seen.extend(range(100))
    assert run(lab, tmp_path / "out") == 0
    assert len(seen) == 100 + 10 + 2 + 2, "neither the first divergence nor seven steps were computed again"
    assert not (tmp_path / ".out.tuning").exists()
    same_files(tmp_path / "whole", tmp_path / "out")


def test_a_state_of_another_job_is_not_used(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(lab, tmp_path / "whole", "--seed", "1") == 0
    seen = stop_at(monkeypatch, 2 + 15)
    assert run(lab, tmp_path / "out") == 130
    assert run(lab, tmp_path / "out", "--seed", "1") == 0
    assert len(seen) == 17 + 2 + 24 + 2 + 2
    same_files(tmp_path / "whole", tmp_path / "out")


def test_the_best_parameters_are_kept_and_hopeless_steps_left_out(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes after them, interrupted or not: as if the tuning had ended at its best."""
    monkeypatch.setattr(tune, "CHECK", 2)
    monkeypatch.setattr(tune, "PATIENCE", 2)
    seen = stop_at(monkeypatch, 9)  # in the fifth step
    told = iter([1.0, 0.5, 0.6, 0.7])  # before, after 2 and 4 steps, and of the run that goes on after 6
    monkeypatch.setattr(tune, "mean_divergence", lambda *_: next(told))
    assert run(lab, tmp_path / "out") == 130 and run(lab, tmp_path / "out") == 0
    assert len(seen) == 9 + 4
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())["quantization"]["extra"]["tuning"]
    assert (record["best_step"], record["tokens"], record["held_out_kl"]) == (2, 2 * 2 * 512, [1.0, 0.5])

    parameters: list[list[torch.Tensor]] = []
    plain = tune.write_tuned
    monkeypatch.setattr(tune, "write_tuned", lambda *a, **k: (parameters.append([*a[4].values()]), plain(*a, **k)))
    told = iter([1.0, 0.5, 0.6, 0.7])
    assert run(lab, tmp_path / "again") == 0
    told = iter([1.0, 0.5, 0.4, 0.7, 0.7])
    assert run(lab, tmp_path / "other") == 0
    same_files(tmp_path / "out", tmp_path / "again")
    assert not all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


def test_what_was_measured_of_the_repository_before_is_left_out(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(lab / "repo", tmp_path / "repo")
    measured = ("eval_summary.json", "sample_generations.json", "task_results.json")
    add_documents(tmp_path / "repo", dict.fromkeys((*measured, "notes.txt"), b"{}"))
    assert run(lab, out, repo=tmp_path / "repo") == 0
    assert (out / "notes.txt").is_file() and not any((out / name).exists() for name in measured)


def test_a_tuned_repository_can_be_tuned_again(lab: Path, tmp_path: Path) -> None:
    assert run(lab, tmp_path / "once", "--steps", "2") == 0
    command = ["tune", str(lab / "base"), str(tmp_path / "once"), str(tmp_path / "twice"), "--quiet", "--steps", "12"]
    assert (
        main(
            [
                *command,
                "--learning-rate",
                "0.05",
                "--calibration",
                str(lab / "text.txt"),
                "--calibration-tokens",
                "8192",
            ]
        )
        == 0
    )


def test_steps_are_relative_to_what_is_trained() -> None:
    gains = torch.tensor([0.0, 0.5, -0.93, -1.0, 300.0])  # with 1 + p the third one is 0.07, the fourth nothing at all
    bias = torch.tensor([3.0, -3.0, 3.0])
    small = {"norm.weight": torch.nn.Parameter(gains.clone()), "proj.bias": torch.nn.Parameter(bias.clone())}
    factor = torch.nn.Parameter(torch.ones(2))
    optimizer = tune.make_optimizer({"proj.weight": factor}, small)
    for group in optimizer.param_groups:
        group["lr"] = 0.001
        group["params"][0].grad = torch.logspace(-3, 3, len(group["params"][0]))  # Adam's first step is 1 for any
    optimizer.step()
    floor = tune.LEAST_SIZE
    wanted = [(factor, torch.ones(2), torch.ones(2)), (small["proj.bias"], bias, torch.full((3,), 3.0))]
    wanted += [(small["norm.weight"], gains, torch.tensor([floor, 0.5, 0.07, floor, 300.0]))]
    for found, before, size in wanted:
        assert torch.allclose(found.detach(), before - 0.001 * size, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------ the divergence


def make_targets(lab: Path, path: Path, ids: torch.Tensor) -> tuple[tune.Targets, tune.Halves]:
    base = load(lab / "repo", dtype=torch.float32).requires_grad_(False)
    model = load(lab / "repo", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    halves = tune.Halves(base, torch.float32), tune.Halves(model, torch.float32)
    return tune.Targets(halves[0], ids, path / "targets"), halves[1]


@pytest.mark.parametrize("logits", [2**24, 64 * 5])  # at once, and by five positions
def test_the_divergence_and_its_gradient_are_those_of_the_whole_model(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    monkeypatch.setattr(tune, "LOGITS", logits)
    targets, model = make_targets(lab, tmp_path, IDS)
    model.check(IDS[0])
    p, q = (half.model(input_ids=IDS).logits[0].log_softmax(-1) for half in (targets.base, model))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    wanted.backward()
    gradients = {name: x.grad for name, x in model.model.named_parameters()}
    model.model.zero_grad(set_to_none=True)
    assert tune.divergence(targets, 0, model) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert tune.divergence(targets, 0, model, 2.0) == pytest.approx(float(wanted.detach()), rel=1e-4)
    for name, x in model.model.named_parameters():
        assert torch.allclose(x.grad, 2 * gradients[name], rtol=1e-3, atol=1e-6), name


def test_the_base_runs_once_for_each_sequence(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.cat([IDS, IDS + 1])
    targets, model = make_targets(lab, tmp_path, ids)
    first = [tune.divergence(targets, k, model) for k in (0, 1)]
    monkeypatch.setattr(targets.base, "hidden", None)
    assert [tune.divergence(targets, k, model) for k in (0, 1)] == first and first[0] != first[1]


def tiny_models() -> dict[str, Any]:
    """Models whose heads do more than multiply, or whose bodies lie elsewhere."""
    import transformers as t

    torch.manual_seed(0)
    few = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = few | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    both = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    return {
        "a cap on logits": t.Gemma2ForCausalLM(t.Gemma2Config(**text, final_logit_softcapping=0.5)),
        "a scale of logits": t.GraniteForCausalLM(t.GraniteConfig(**text, logits_scaling=8.0)),
        "a decoder in the model": t.OPTForCausalLM(t.OPTConfig(**few, ffn_dim=24, word_embed_proj_dim=16)),
        "a transformer": t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)),
        "images too": t.Gemma3ForConditionalGeneration(both),
    }


def test_halves_give_what_the_whole_gives() -> None:
    for what, model in tiny_models().items():
        halves = tune.Halves(model.eval(), torch.float32)
        halves.check(IDS[0])
        with torch.no_grad():
            assert halves.hidden(IDS[0]).shape == (24, 16), what
            assert torch.allclose(halves.logits(halves.hidden(IDS[0])), model(input_ids=IDS).logits[0], atol=1e-5), what


def test_a_model_with_more_above_its_last_states_is_refused(lab: Path, tmp_path: Path) -> None:
    _, model = make_targets(lab, tmp_path, IDS)
    plain, calls = model.model.forward, iter([1.0, 2.0, 3.0])

    def forward(**inputs: Any) -> Any:
        out, factor = plain(**inputs), next(calls)  # something that the halves cannot know
        out.logits = out.logits * factor
        return out

    model.model.forward = forward
    with pytest.raises(tune.TQFormatError, match=r"BIND\.MODEL.*last hidden states"):
        model.check(IDS[0])


# ------------------------------------------------------------------------------------------------ layouts


def test_stages_and_groups_of_scales_take_the_factor_of_their_row(lab: Path, tmp_path: Path) -> None:
    name, rng = "model.layers.0.mlp.up_proj.weight", np.random.default_rng(0)
    data = json.loads((lab / "repo" / MANIFEST).read_text())
    with open_repo(lab / "repo") as old, new_writer(tmp_path / "repo") as writer:
        writer.add_transform("i", "identity", 1)
        writer.add_codebook("c", [-1.5, -0.5, 0.5, 1.5])
        writer.add_codebook("v", torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
        for other, entry in data["tensors"].items():
            if other != name:
                writer.add_passthrough(other, old.dequantize(other))
                continue
            keys = {"transform": "i", "scale_dtype": torch.float16}
            stages = [
                random_stage(rng, entry["shape"], bits=2, codebook="c", vector_length=8, **keys),
                random_stage(rng, entry["shape"], p=2, bits=4, codebook="v", **keys),
            ]
            writer.add_quantized(other, entry["shape"], entry["dtype"], stages, torch.full((32,), 1.25).half())
        for file in sorted((lab / "base").glob("*.json")):
            writer.add_file(file, "support")
        writer.finish()
    command = ["tune", str(lab / "base"), str(tmp_path / "repo"), str(tmp_path / "out"), "--quiet", "--steps", "4"]
    assert main([*command, "--calibration", str(lab / "text.txt"), "--calibration-tokens", "8192"]) == 0
    with open_repo(tmp_path / "repo") as old, open_repo(tmp_path / "out") as new:
        ratios = [
            new._read(b.scales).float() / old._read(a.scales).float()
            for a, b in zip(old.manifest.tensors[name].stages, new.manifest.tensors[name].stages, strict=True)
        ]
        assert torch.allclose(ratios[0], ratios[1].expand(-1, 4), rtol=0.002) and ratios[1].std() > 1e-4


def test_every_setting_takes_the_factor_of_its_row(settings_repo: Path, tmp_path: Path) -> None:
    """Whatever a stage is made of: scales and offsets of 8 bits with outer ones, permutations, codebooks of any dtype."""
    factor = torch.tensor([0.5, 2.0, 1.0, 0.25, 4.0, 0.0])  # powers of two: exact, but for what F16 rounds
    with open_repo(settings_repo) as old:
        names = [n for n, w in old.manifest.tensors.items() if w.stages and np.prod(w.shape[:-1]) == 6]
        parts = {name: torch.nn.Parameter(factor.clone()) for name in names}
        calibration: Any = SimpleNamespace(to_dict=lambda: {"source": "none"})
        tune.write_tuned(old, settings_repo, tmp_path / "out", parts, {}, {}, calibration)
        with open_repo(tmp_path / "out") as new:
            assert len(names) > 10 and new.names() == old.names() and new.manifest.features == old.manifest.features
            for name in new.names():
                was, now = old.dequantize(name).double(), new.dequantize(name).double()
                want = (was.reshape(6, 48) * factor[:, None]).reshape(was.shape) if name in names else was
                assert torch.allclose(now, want, rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize("option", ["--spill", "--output-feedback", "--calibration-inputs=paired"])
def test_options_of_feedback_are_none_of_tuning(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "base", "repo", "out", option])
    assert option in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ as the end of a preset


def best(lab: Path, out: Path, *options: str) -> int:
    command = ["quantize", str(lab / "base"), str(out), "--bits", "2", "--preset", "best", "--window", "6", "--quiet"]
    return main([*command, "--calibration", str(lab / "text.txt"), "--calibration-tokens", "2048", *options])


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "TUNING_TOKENS", 8192)


@pytest.mark.usefixtures("few_tokens")
def test_the_preset_best_ends_with_tuning(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "TUNING_STEPS", 6)
    assert best(lab, tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    plain, tuned = (json.loads((path / MANIFEST).read_text()) for path in (lab / "repo", tmp_path / "out"))
    record = tuned["quantization"]["extra"]["tuning"]
    assert record["steps"] == 6 and record["held_out_kl"][1] < record["held_out_kl"][0]
    assert tuned["accounting"] == plain["accounting"], "what `plan` says holds after tuning"
    assert tuned["quantization"]["calibration"] == plain["quantization"]["calibration"]


@pytest.mark.usefixtures("few_tokens")
def test_a_preset_interrupted_in_its_tuning_continues_with_the_same_bytes(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best(lab, tmp_path / "whole", "--tune-steps", "6") == 0
    stop_at(monkeypatch, 12)
    assert best(lab, tmp_path / "out", "--tune-steps", "6") == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(tune, "quantize", None)  # that phase is over
    assert best(lab, tmp_path / "out", "--tune-steps", "6") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.usefixtures("few_tokens")
def test_where_tuning_is_of_no_use_the_repository_before_it_stays(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "mean_divergence", lambda *_: 1.0)
    assert best(lab, tmp_path / "out", "--tune-steps", "2") == 0
    shown = capsys.readouterr().err  # an advice that names the command which has the option
    assert "note: not tuned: the divergence on held-out text, 1 nats, did not fall" in shown
    assert "the command `tune` with a lower --learning-rate" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    same_files(lab / "repo", tmp_path / "out")


@pytest.mark.usefixtures("few_tokens")
def test_an_error_while_tuning_is_an_error(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise tune.TQFormatError("BIND.DIGEST", "a file", "expected another")

    monkeypatch.setattr(tune, "load_base", broken)
    assert best(lab, tmp_path / "out", "--tune-steps", "2") == 1
    assert "BIND.DIGEST" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("few_tokens")
def test_a_target_still_holds_after_tuning(lab: Path, tmp_path: Path) -> None:
    command = ["quantize", str(lab / "base"), str(tmp_path / "out"), "--preset", "best", "--window", "6", "--quiet"]
    command += ["--target-bytes", "12000", "--candidate-bits", "2,3,4", "--tune-steps", "3"]
    assert main([*command, "--calibration", str(lab / "text.txt"), "--calibration-tokens", "2048"]) == 0
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert "tuning" in manifest["quantization"]["extra"]
    allocation = manifest["quantization"]["allocation"]["extra"]
    assert manifest["accounting"]["stored_bytes"] == allocation["stored_bytes"] <= 12000


def test_what_cannot_be_tuned_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, preset, wanted in ((None, "best", 100), (0, "best", 0), (None, "balanced", 0), (5, "balanced", 5)):
        chosen = choices.Settings(preset=preset)
        assert choices.tuning_steps(argparse.Namespace(tune_steps=steps), chosen, "text-generation") == wanted
    args = argparse.Namespace(tune_steps=5)
    assert choices.tuning_steps(args, choices.Settings(preset="best"), "fill-mask") == 0
    assert "note: not tuned: a model for fill-mask does not predict the next token" in capsys.readouterr().err
    with pytest.raises(tune.TQFormatError, match=r"SCHEMA\.VALUE.*--preset balanced or best"):
        choices.tuning_steps(args, choices.Settings(), "text-generation")


# ------------------------------------------------------------------------------------------------ what is held out


def rows_of(ids: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


def test_what_feedback_saw_is_not_held_out() -> None:
    ids = torch.arange(64 * 3).reshape(64, 3)
    for seen, count in ((ids[:60], 4), (ids[:8], 8), (ids, 8), (None, 8)):
        order, held_out = tune.hold_out(ids, seen, 0)
        assert held_out == count and sorted(rows_of(order)) == rows_of(ids)
        if seen is not None and len(seen) < 64:
            assert not {*rows_of(order[:held_out])} & {*rows_of(seen)}
    assert tune.hold_out(ids[:1], None, 0)[1] == 1, "and nothing is left to train on, which `tune` refuses"
    assert not torch.equal(tune.hold_out(ids, None, 0)[0], tune.hold_out(ids, None, 1)[0])


@pytest.mark.parametrize("own", [False, True])
def test_both_commands_hold_out_other_text_than_that_of_the_codes(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Of a text, and of text that the model writes itself: the codes of `repo` are fitted to 4 sequences of it."""
    monkeypatch.setattr(choices, "TUNING_TOKENS", 10240)  # 20 sequences, five times as many: the 4 are among them
    monkeypatch.setitem(choices.FEEDBACK_TOKENS, "self", 2048)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, found = tune.hold_out, []

    def hold_out(ids: torch.Tensor, seen: torch.Tensor | None, seed: int) -> tuple[torch.Tensor, int]:
        order, count = plain(ids, seen, seed)
        found.append((seen, rows_of(order), count))
        return order, count

    monkeypatch.setattr(tune, "hold_out", hold_out)
    text = [] if own else ["--calibration", str(lab / "text.txt")]
    command = ["quantize", str(lab / "base"), str(tmp_path / "one"), "--bits", "2", "--preset", "best", "--window", "6"]
    assert main([*command, *text, "--calibration-tokens", "2048", "--tune-steps", "2", "--quiet"]) == 0
    command = ["tune", str(lab / "base"), str(tmp_path / "one"), str(tmp_path / "two"), "--steps", "2", *text]
    main([*command, "--calibration-tokens", "2048" if own else "10240", "--quiet"])
    assert len(found) == 2
    for seen, order, count in found:
        assert seen is not None and len(seen) == 4 and count < len(order) - 4
        assert not {*order[:count]} & {*rows_of(seen)} and {*rows_of(seen)} <= {*order[count:]}
