"""From a checkpoint to a finished release: stages, what is skipped and what is repeated, interruptions, verdicts."""

import argparse
import ast
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_python
from helpers import make_checkpoint, make_text, timeless

from reference_quantizer.__main__ import _parser, main
from reference_quantizer.checkpoint import support
from reference_quantizer.commands import release
from reference_quantizer.evaluation import evaluate
from reference_quantizer.release import base, card, report
from reference_quantizer.release.push import check_release
from tqformat import add_files, open_repo
from tqformat.load_quantized import MANIFEST

PAYLOAD = "turboquant_weights.safetensors"
STAGES = ("quantize", "evaluate", "card")


class Lab:
    """A tiny model, a text of 300 tokens, and the command that makes a release of them."""

    def __init__(self, path: Path) -> None:
        self.path, self.out = path, path / "out"
        self.base = make_checkpoint(path / "base")
        self.text = make_text(path / "text.txt", 300)

    def command(self, *options: Any, out: Path | None = None) -> list[str]:
        settings = [
            "--bits",
            "4",
            "--preset",
            "fast",
            "--max-length",
            "32",
            "--stride",
            "16",
            "--max-windows",
            "5",
            "--quiet",
        ]
        paths = ["--dataset", str(self.text), "--cache-dir", str(self.path / "cache")]
        return ["release", str(self.base), str(out or self.out), *settings, *paths, *map(str, options)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, str]]:
    """A whole release by the command line, with the real card and check; and what it printed."""
    lab = Lab(tmp_path_factory.mktemp("release"))
    done = run_python("-m", "reference_quantizer", *lab.command("--repo-id", "owner/name"))
    assert done.returncode == 0, done.stderr
    yield lab, done.stdout


@pytest.fixture
def lab(finished: tuple[Lab, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Its copy, for tests that change it; card and check are told apart from the other stages, and are quick."""
    copy = Lab.__new__(Lab)
    copy.path, copy.out, copy.base = tmp_path, tmp_path / "out", tmp_path / "base"
    for name in ("out", "base", "cache"):
        shutil.copytree(finished[0].path / name, tmp_path / name)
    copy.text = Path(shutil.copy(finished[0].text, tmp_path / "text.txt"))
    monkeypatch.setattr(card.figures, "draw", lambda facts: {})
    verdict = {"verdict": "tqformat 1.0: PASS L3", "level_passed": "L3", "violations": [], "counts": {}}
    real = card.conformance(finished[0].out)
    monkeypatch.setattr(card, "conformance", lambda repo: real | verdict)
    return copy


def run(lab: Lab, capsys: pytest.CaptureFixture[str], *options: Any) -> tuple[int, set[str], str]:
    """Exit status, the stages that were carried out and not skipped, and the errors."""
    capsys.readouterr()
    code = main(lab.command("--repo-id", "owner/name", *options))
    out, err = capsys.readouterr()
    parts = re.split(r"=== \d/4 (\w+).*\n", out)[1:]
    told = dict(zip(parts[::2], parts[1::2], strict=True))
    return code, {name for name in STAGES if name in told and not told[name].startswith(("complete", "skipped"))}, err


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


# ------------------------------------------------------------------------------------------------ a whole release


def test_one_command_makes_a_release(finished: tuple[Lab, str]) -> None:
    lab, out = finished
    assert re.findall(r"^=== (\d/4 \w+)  \[\d+ s\]$", out, re.MULTILINE) == [
        *("1/4 quantize", "2/4 evaluate", "3/4 card", "4/4 check")
    ]
    summary, manifest = read(lab.out / "eval_summary.json"), read(lab.out / MANIFEST)
    assert f"ratio {summary['perplexity_ratio']:.4f}" in out and f"mean {summary['kl_divergence']['mean']:.5f}" in out
    with open_repo(lab.out) as repo:
        scalars = sum(repo.manifest.accounting[key] for key in ("quantized_scalars", "passthrough_scalars"))
    assert f"{8 * (lab.out / PAYLOAD).stat().st_size / scalars:.3f} per weight of the whole payload" in out
    assert "PASS L3" in out and f"push {lab.out} owner/name" in out
    names = {item.name for item in check_release(lab.out)}  # what is needed to push it
    assert {"README.md", "eval_summary.json", "sample_generations.json", "requirements.txt", PAYLOAD} <= names
    assert "PASS L3" in (card_text := (lab.out / "README.md").read_text("utf-8")) and "owner/name" in card_text
    assert manifest["extra"]["release"]["base_weights_sha256"] == summary["base_weights_sha256"]
    assert card.STATE not in names


def test_the_same_command_again_does_nothing(
    finished: tuple[Lab, str], lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(lab.out)
    assert before == digests(finished[0].out)
    for options in ([], ["--overwrite"], ["--skip-evaluation"]):
        assert run(lab, capsys, *options)[:2] == (0, set())
        assert digests(lab.out) == before


def test_a_release_with_the_preset_best_is_tuned(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    text = make_text(lab.path / "calibration.txt", 8000)
    options = ["--preset", "best", "--window", "6", "--calibration", text, "--tune-steps", "4", "--overwrite"]
    options += ["--protect-fragment", "embed_tokens.weight", "--protected-bits", "8"]  # tuning finds something
    code, stages, err = run(lab, capsys, *options)
    assert "takes: about 1 min on" in err and "takes: about 1 min more for the evaluation" in err
    assert (code, stages) == (0, {"quantize", "evaluate", "card"}), err
    assert read(lab.out / MANIFEST)["quantization"]["extra"]["tuning"]["steps"] == 4
    assert run(lab, capsys, *options)[:2] == (0, set())
    assert run(lab, capsys, *options, "--tune-steps", "5")[1] >= {"quantize"}


def test_a_release_is_the_quantized_checkpoint(finished: tuple[Lab, str], tmp_path: Path) -> None:
    lab = finished[0]
    assert main(["quantize", str(lab.base), str(tmp_path / "plain"), "--preset", "fast", "--quiet"]) == 0
    assert (tmp_path / "plain" / PAYLOAD).read_bytes() == (lab.out / PAYLOAD).read_bytes()
    assert "extra" not in read(tmp_path / "plain" / MANIFEST)


# ------------------------------------------------------------------------------------------------ stale stages


def test_changed_options_repeat_their_stages(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(lab.out)
    for options in (["--max-windows", "4"], ["--max-windows", "4", "--bos", "never"], ["--no-kl"]):
        assert run(lab, capsys, *options)[:2] == (0, {"evaluate", "card"})
        assert run(lab, capsys, *options)[:2] == (0, set())
    make_text(lab.text, 300, seed=1)  # another text under the same name
    assert run(lab, capsys)[:2] == (0, {"evaluate", "card"})
    assert main(lab.command()) == 0  # without --repo-id the card's stays
    assert run(lab, capsys)[:2] == (0, set())
    assert run(lab, capsys, "--repo-id", "owner/other")[:2] == (0, {"card"})
    assert run(lab, capsys)[:2] == (0, {"card"})
    (lab.out / "README.md").unlink()
    assert run(lab, capsys)[:2] == (0, {"card"})
    assert digests(lab.out)[PAYLOAD] == before[PAYLOAD]


def test_another_job_is_not_taken_for_this_one(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(lab.out)
    code, stages, err = run(lab, capsys, "--bits", "3")
    assert (code, stages) == (1, {"quantize"}) and "PATH.COLLISION" in err and "--overwrite" in err
    assert digests(lab.out) == before
    assert run(lab, capsys, "--bits", "3", "--overwrite")[:2] == (0, set(STAGES))
    assert digests(lab.out)[PAYLOAD] != before[PAYLOAD]
    assert run(lab, capsys, "--bits", "3", "--overwrite")[:2] == (0, set())  # the same command: nothing is stale

    config = lab.base / "config.json"  # another checkpoint under the same name
    config.write_text(config.read_text().replace("0.02", "0.03"))
    code, _, err = run(lab, capsys, "--bits", "3")
    assert code == 1 and "another checkpoint" in err


def test_evaluation_files_of_other_weights_are_stale(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read(lab.out / "eval_summary.json")
    summary["payload"][PAYLOAD] = "0" * 64
    add_files(lab.out, {"eval_summary.json": ("document", json.dumps(summary).encode())})
    code, stages, _ = run(lab, capsys)  # the card is stale only if this run took other seconds than the first one
    assert code == 0 and "evaluate" in stages
    (lab.out / "sample_generations.json").write_text("{}")  # half written
    code, stages, _ = run(lab, capsys)
    assert code == 0 and "evaluate" in stages
    assert run(lab, capsys)[:2] == (0, set())


def test_an_evaluation_by_other_code_or_of_another_configuration_is_stale(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "code_version", lambda: "0" * 16)  # another checkout's
    assert run(lab, capsys)[:2] == (0, {"evaluate", "card"})
    assert run(lab, capsys)[:2] == (0, set())
    monkeypatch.undo()
    assert re.fullmatch("[0-9a-f]{16}", evaluate.code_version())

    before, config = read(lab.out / "eval_summary.json"), read(lab.out / "config.json")
    assert {"config.json", "tokenizer.json"} <= before["support"].keys()
    content = json.dumps(config | {"rms_norm_eps": 1.0}).encode()
    add_files(lab.out, {"config.json": ("support", content)})
    assert not release.is_evaluated(_parser().parse_args(lab.command()))
    assert run(lab, capsys)[1] >= {"evaluate"}
    after = read(lab.out / "eval_summary.json")
    assert after["support"]["config.json"] == hashlib.sha256(content).hexdigest()
    assert after["quantized"] != before["quantized"]  # no window of the run before was taken


def test_every_option_that_decides_what_is_written_is_part_of_the_job(lab: Lab) -> None:
    def job(*options: str) -> str:
        command = lab.command(*options)
        if {"--target-bpw", "--target-bytes", "--stages"} & {*options}:  # they exclude --bits
            del command[command.index("--bits") : command.index("--bits") + 2]
        return release.job_digest(_parser().parse_args(command))

    actions = argparse.ArgumentParser()
    release.add_quantization_arguments(actions)
    changed = {}
    for action in (a for a in actions._actions if a.dest not in ("help", "overwrite", "spill")):
        name, value = action.option_strings[-1], "2,2" if action.dest == "stages" else "5"  # the last is --no-...
        value = next((str(choice) for choice in action.choices or () if choice != action.default), value)
        value = "best" if action.dest == "preset" else value  # the command names fast
        changed[name] = job(name, *([] if action.nargs == 0 else [value]))
    assert {"--bits", "--seed", "--protect", "--revision", "--license", "--calibration"} <= changed.keys()
    assert len({job(), job("--device", "cuda"), *changed.values()}) == len(changed) + 2
    texts = [job("--calibration", str(make_text(lab.path / "calibration.txt", 10, seed))) for seed in (0, 1)]
    assert texts[0] != texts[1]  # a file's content, not its name
    for same in (["--overwrite"], ["--spill"], ["--max-windows", "2"], ["--batch", "2"], ["--repo-id", "a/b"]):
        assert job(*same) == job()


def test_a_card_that_was_edited_is_kept(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    readme = lab.out / "README.md"
    readme.write_text(edited := readme.read_text("utf-8") + "\nOur own words.\n", "utf-8")
    assert run(lab, capsys)[:2] == (0, set())
    code, _, err = run(lab, capsys, "--max-windows", "3")
    assert code == 1 and "PATH.COLLISION" in err and "README.md" in err and "edited" in err
    assert readme.read_text("utf-8") == edited
    assert run(lab, capsys, "--max-windows", "3", "--overwrite")[:2] == (0, {"card"})
    assert "Our own words" not in readme.read_text("utf-8")


def test_without_evaluation(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(lab.out)
    assert run(lab, capsys, "--skip-evaluation", "--dataset", "nowhere.txt")[:2] == (0, {"quantize", "card"})
    assert not (lab.out / "eval_summary.json").exists()
    assert run(lab, capsys)[:2] == (0, {"evaluate", "card"})


def test_the_base_model_is_asked_for(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal by questions, elsewhere by lines that name the options; the answers make no other job."""
    shutil.rmtree(lab.out)
    code, _, err = run(lab, capsys, "--skip-evaluation")
    assert (
        code == 0 and "note: the base model is recorded as base, " in err and "; --base-model gives its Hub id" in err
    )
    assert "note: no licence of the base model was found" in err and "; --license gives it" in err
    options = ["--skip-evaluation", "--license", "mit", "--base-model", "org/base"]
    code, _, err = run(lab, capsys, *options, "--overwrite")
    assert code == 0 and "note: the base" not in err and "licence" not in err

    asked: list[str] = []
    shutil.rmtree(lab.out)
    monkeypatch.setattr(base, "_ask", lambda question: (asked.append(question), f"a/{len(asked)}")[1])
    assert run(lab, capsys, "--skip-evaluation")[0] == 0
    assert len(asked) == 2 and "[base]: " in asked[0] and "licence" in asked[1]
    assert read(lab.out / MANIFEST)["base_model"] == {"id": "a/1", "license": "a/2", "revision": None}
    assert run(lab, capsys, "--skip-evaluation")[:2] == (0, set()) and len(asked) == 2


def test_questions_need_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stdin = io.StringIO("org/model\n\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert base.complete("model", "mit", "-b", "-l") == ("model", "mit") and stdin.tell() == 0
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    capsys.readouterr()
    assert base.complete("model", None, "-b", "-l") == ("org/model", None)
    err = capsys.readouterr().err
    assert (
        err.startswith("Hub id of the base model, such as owner/name [model]: licence of the base model")
        and "-l gives it" in err
    )
    assert base.complete("org/model", "mit", "-b", "-l") == ("org/model", "mit") and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------ honest size


def test_stored_bytes_are_those_of_the_payload(settings_repo: Path) -> None:
    """Of every kind of weight: tiles, windows, several stages, column scales, scales of each dtype."""
    rows = {row.name: row for row in report.repo_rows(settings_repo)}
    accounting = read(settings_repo / MANIFEST)["accounting"]
    assert rows["plain"].stored == 6 * 48 * 2 // 8 + 6 * 2
    assert rows["hadamard"].stored == 6 * 48 * 2 // 8 + 6 * 2 * 2
    assert rows["trellis"].stored == 6 * 48 * 2 // 8 + 6 * 4
    assert rows["vector"].stored == 6 * 48 // 8 + 6 * 4
    assert rows["stages"].stored == 2 * (6 * 48 * 2 // 8 + 6 * 4) + 48 * 2
    assert rows["norm"].stored == rows["norm"].original == 96
    with open_repo(settings_repo) as repo:
        tables = [span.end - span.begin for name, span in repo.spans.items() if name.split(".")[0] in ("q", "g", "p")]
        tables += [span.end - span.begin for name, span in repo.spans.items() if name.endswith(".levels")]
    assert sum(row.stored for row in rows.values()) + sum(tables) == accounting["stored_bytes"]
    quantized = [row for row in rows.values() if row.kind == "quantized"]
    per = 8 * sum(r.stored for r in quantized) / sum(r.scalars for r in quantized)
    size = (settings_repo / PAYLOAD).stat().st_size
    whole = 8 * size / sum(r.scalars for r in rows.values())
    wanted = f"{per:.3f} bits per quantized weight, {whole:.3f} per weight of the whole payload ({size:,} bytes)"
    assert report.size_line(settings_repo) == wanted and whole > per


def test_both_sizes_stand_beside_every_bit_width(finished: tuple[Lab, str], capsys: pytest.CaptureFixture[str]) -> None:
    from tqformat.__main__ import main as tqformat

    lab = finished[0]
    for program, command in (
        (main, ["plan", str(lab.base), "--bits", "4"]),
        (main, ["push", str(lab.out), "owner/name", "--dry-run", "--license-unknown"]),
        (tqformat, ["inspect", str(lab.out)]),
    ):
        assert program(command) == 0
        out = capsys.readouterr().out
        assert "bits per quantized weight" in out and "per weight of the whole payload" in out, command


# ------------------------------------------------------------------------------------------------ errors


def test_a_failed_check_fails_the_release(finished: tuple[Lab, str], tmp_path: Path) -> None:
    lab = finished[0]
    repo = Path(shutil.copytree(lab.out, tmp_path / "damaged"))
    data = bytearray((repo / PAYLOAD).read_bytes())
    data[-1] ^= 1
    (repo / PAYLOAD).write_bytes(data)
    (repo / "stray.txt").write_text("x")
    done = run_python("-m", "reference_quantizer", *lab.command("--repo-id", "owner/name", out=repo))
    assert done.returncode == 1 and "push" not in done.stdout and "Traceback" not in done.stderr
    assert "BIND.DIGEST" in done.stderr and "BIND.EXTRA_FILE stray.txt [TQ-REPO-5]" in done.stderr
    assert "error: expected a release that passes L3, got tqformat 1.0: FAIL L1" in done.stderr


def test_what_cannot_succeed_is_told_at_once(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(lab.out)

    def expect(code: str, *options: str) -> None:
        status, _, err = run(lab, capsys, *options)
        assert status == 1 and f"error [{code}]" in err and not lab.out.exists(), err

    expect("BIND.MISSING_FILE", "--dataset", "nowhere.txt")
    expect("SCHEMA.VALUE", "--max-length", "300", "--max-windows", "2")  # the text has as many tokens
    expect("SCHEMA.VALUE", "--loader-kind", "feature-extraction")
    expect("SCHEMA.VALUE", "--protected-bits", "8")
    expect("SCHEMA.VALUE", "--repo-id", "no-owner")
    lab.out.mkdir()
    (lab.out / "precious").write_text("x")
    assert run(lab, capsys, "--overwrite")[0] == 1 and (lab.out / "precious").exists()


def test_missing_libraries_are_told_at_once(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, stages, err = run(lab, capsys, "--bits", "3", "--overwrite")
    wanted = "error [UNSUPPORTED.LIBRARY] release: pyyaml cannot be imported; it comes with the extra `quantizer` of tqformat\n"
    assert (code, stages, err) == (1, set(), wanted)


def test_requirements_are_what_the_loader_imports() -> None:
    """Every library that the loader imports, in the versions that this package asks for, and no other."""
    tree = ast.parse((ROOT / "tqformat" / "load_quantized.py").read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    libraries = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    lines = support.REQUIREMENTS.splitlines()
    assert {re.split("[<>=]", line)[0] for line in lines} == libraries
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(f'"{line}"' in text for line in lines)


# ------------------------------------------------------------------------------------------------ kill -9

KILLED = """
import importlib, os, signal, sys
from reference_quantizer.__main__ import main

place, count, calls = sys.argv[1], int(sys.argv[2]), 0
module, _, name = place.rpartition(".")
owner = importlib.import_module(module) if module.islower() else None
if owner is None:
    module, _, kind = module.rpartition(".")
    owner = getattr(importlib.import_module(module), kind)
original = getattr(owner, name)

def dying(*args, **kwargs):
    global calls
    calls += 1
    result = original(*args, **kwargs)
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, dying)
main(sys.argv[3:])
"""


def test_killed_in_every_stage_it_goes_on(finished: tuple[Lab, str], tmp_path: Path) -> None:
    """One release, killed while it quantizes, evaluates, adds the evaluation's files, and writes the card."""
    lab, out = finished[0], tmp_path / "out"
    command = lab.command("--repo-id", "owner/name", "--cache-dir", str(tmp_path / "cache"), out=out)
    points = [
        ("reference_quantizer.job.encoding.encode_stages", 3, lambda: not out.exists()),
        ("reference_quantizer.evaluation.evaluate.Runner.score", 2, lambda: not (out / "eval_summary.json").exists()),
        ("reference_quantizer.evaluation.evaluate.add_documents", 1, lambda: (out / "eval_summary.json").exists()),
        ("reference_quantizer.release.card.replace_text", 1, lambda: not (out / card.STATE).exists()),
    ]
    for place, count, reached in points:
        arguments = [sys.executable, "-c", KILLED, place, str(count), *command]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        killed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=env, check=False)
        assert killed.returncode == -signal.SIGKILL, (place, killed.stderr)
        assert reached(), place
    assert main(command) == 0
    found, expected = digests(out), digests(lab.out)
    timed = {"eval_summary.json", MANIFEST, "README.md", card.STATE}  # these hold, or follow from, seconds
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= timed
    assert timeless(read(out / "eval_summary.json")) == timeless(read(lab.out / "eval_summary.json"))
