"""Tasks through lm-eval: counts, both models, what is missing. What needs lm-eval is skipped without it."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import make_checkpoint, make_text

from reference_quantizer import libraries
from reference_quantizer.__main__ import main
from reference_quantizer.evaluation import tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["w3", "w4"]
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.5}}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `base`, its repository `repo` at 2 bits, `text.txt`, and 24 questions in `tasks`."""
    path = tmp_path_factory.mktemp("tasks")
    make_checkpoint(path / "base")
    make_text(path / "text.txt", 1200)
    options = ["--bits", "2", "--uniform", "--quiet"]
    assert main(["quantize", str(path / "base"), str(path / "repo"), *options]) == 0
    (path / "tasks").mkdir()
    documents = [{"text": f"w{5 + k} w{9 + k}", "label": k % 2} for k in range(24)]
    (path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, kind, metric in (("toy", "multiple_choice", "acc"), ("odd", "loglikelihood_rolling", "word_perplexity")):
        text = TASK.format(name=name, data=path / "data.jsonl", kind=kind, metric=metric)
        (path / "tasks" / f"{name}.yaml").write_text(text)
    return path


def run(lab: Path, *options: str) -> int:
    command = [
        "evaluate",
        str(lab / "base"),
        str(lab / "repo"),
        "--dataset",
        str(lab / "text.txt"),
        "--max-windows",
        "2",
    ]
    return main([*command, "--max-length", "64", "--cache-dir", str(lab / "cache"), "--quiet", *options])


def test_without_the_library_it_is_told_before_any_work(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libraries, "is_installed", lambda module: module != "lm_eval")
    assert run(lab, "--tasks", "toy") == 1
    assert "[UNSUPPORTED.LIBRARY] --tasks: lm-eval cannot be imported" in capsys.readouterr().err
    assert not (lab / "repo" / "eval_summary.json").exists()


def test_the_line_of_a_task() -> None:
    found: dict[str, Any] = {"task": "toy", "metric": "acc", "documents": 100, "base": 60, "quantized": 58}
    line = tasks.describe([found | {"gained": 3, "lost": 5}])
    # of 100 changes 3 are +1 and 5 are -1: mean -0.02, standard deviation sqrt(0.08 - 0.0004)
    assert line == (
        "toy: acc base 60.00%, quantized 58.00%, change -2.00% ± 2.82%; of 100 answers 3 became right, 5 wrong"
    )


def test_both_models_are_asked_the_same(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert run(lab, "--tasks", "toy", "--tasks-dir", str(lab / "tasks"), "--tasks-limit", "20") == 0
    assert "toy: acc base" in capsys.readouterr().out
    (found,) = json.loads((lab / "repo" / tasks.RESULTS).read_text())["tasks"]
    assert (found["task"], found["metric"], found["version"], found["documents"]) == ("toy", "acc", "1.5", 20)
    assert found["quantized"] == found["base"] + found["gained"] - found["lost"] and 0 < found["base"] < 20
    same = tasks.evaluate_tasks(
        str(lab / "base"), lab / "repo", tasks.find_tasks(["toy"], lab / "tasks"), tasks.Settings(), cache_dir=lab
    )
    assert same[0]["documents"] == 24 and same[0]["gained"] + same[0]["lost"] >= found["gained"] + found["lost"]


@pytest.mark.parametrize("option", [["--tasks-limit", "5"], ["--tasks-dir", "here"]])
def test_options_of_tasks_need_tasks(lab: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    assert run(lab, *option) == 1
    assert f"[SCHEMA.VALUE] {option[0]}: no task is asked for; add --tasks" in capsys.readouterr().err


@pytest.mark.parametrize("name, reason", [("unknown", "tasks that lm-eval knows"), ("odd", "one of the metrics")])
def test_tasks_that_cannot_be_put(lab: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str) -> None:
    pytest.importorskip("lm_eval")
    assert run(lab, "--tasks", name, "--tasks-dir", str(lab / "tasks")) == 1
    assert reason in capsys.readouterr().err
