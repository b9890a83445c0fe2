"""Evaluation: window arithmetic, figures, resuming, the cache, and that a tampered file is noticed."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, new_writer
from helpers import WORDS, Lab, make_text, make_tokenizer, timeless

from conformance.check import CHECKS, Judgement, judge
from conformance.folder import Folder
from conformance.subject import Subject
from reference_quantizer import __main__ as command_line
from reference_quantizer.evaluation import evaluate, samples
from reference_quantizer.evaluation.windows import batches, sliding_windows
from reference_quantizer.model.text import join_rows, read_corpus, same_data
from tqformat.load_quantized import MANIFEST, TQFormatError
from tqformat.writer import add_files

FILES = (evaluate.SUMMARY, evaluate.SAMPLES)
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


# ------------------------------------------------------------------------------------------------ windows


def test_window_arithmetic_of_a_full_pass() -> None:
    windows = sliding_windows(297_053, 512, 256)
    assert len(windows) == 1160
    assert sum(w.scored for w in windows) == 295_893
    assert sum(w.predicted for w in windows) == 297_052
    assert [(w.begin, w.end, w.new) for w in (windows[0], windows[1], windows[-1])] == [
        (0, 512, 512),
        (256, 768, 256),
        (296_704, 297_053, 93),
    ]


def published_loop(tokens: int, max_length: int, stride: int) -> tuple[int, int, int]:
    """Windows, loss tokens and labels of the loop in the transformers documentation, with labels as lists."""
    count = scored = labels = before = 0
    for begin in range(0, tokens, stride):
        end = min(begin + max_length, tokens)
        target = [-100] * (end - begin - (end - before)) + [1] * (end - before)
        scored += sum(label != -100 for label in target) - 1
        labels += sum(label != -100 for label in target[1:])  # the shift drops the first
        count, before = count + 1, end
        if end == tokens:
            break
    return count, scored, labels


@pytest.mark.parametrize("tokens", [2, 3, 7, 8, 9, 15, 16, 17, 100, 101])
@pytest.mark.parametrize(("max_length", "stride"), [(8, 4), (8, 8), (8, 3), (2, 1), (2, 2), (8, 7)])
def test_windows_are_those_of_the_published_loop(tokens: int, max_length: int, stride: int) -> None:
    from conformance.checks_evaluation import _counts, _weights

    windows = sliding_windows(tokens, max_length, stride)
    counts = len(windows), sum(w.scored for w in windows), sum(w.predicted for w in windows)
    assert counts == published_loop(tokens, max_length, stride)
    for limit in (None, 1, 2, 5):
        some = sliding_windows(tokens, max_length, stride, limit)
        assert some == windows[:limit]
        settings = {"max_length": max_length, "stride": stride, "max_windows": limit}
        summary: dict[str, Any] = {"dataset": {"tokens": tokens}, "settings": settings}
        found = len(some), sum(w.scored for w in some), sum(w.predicted for w in some)
        assert _counts(summary) == found  # the judge's closed form
        summary |= {"windows": found[0], "scored_tokens": found[1]}
        assert _weights(summary) == ([w.scored for w in some], [w.predicted for w in some])


def test_batches_hold_windows_of_one_form() -> None:
    windows = sliding_windows(103, 8, 4)
    groups = list(batches(windows, 4))
    assert [i for group in groups for i in group] == list(range(len(windows)))
    assert groups[0] == [0] and groups[1] == [1, 2, 3, 4] and groups[-1] == [len(windows) - 1]
    assert all(len({(windows[i].length, windows[i].new) for i in group}) == 1 for group in groups)


@pytest.mark.parametrize(("max_length", "stride"), [(8, 9), (8, 0), (1, 1)])
def test_impossible_windows_are_refused(max_length: int, stride: int) -> None:
    with pytest.raises(TQFormatError, match="stride"):
        sliding_windows(100, max_length, stride)


def test_corpus(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b" = A = \r\n\n   \nb c\n\n")
    corpus = read_corpus(str(file))
    assert (corpus.text, corpus.rows, corpus.id) == (" = A = \n\nb c", 2, "text.txt")
    assert corpus.sha256 == hashlib.sha256(b" = A = \n\nb c").hexdigest()
    assert join_rows(["a\n", "", "\n", "b"]) == ("a\n\nb", 2)
    with pytest.raises(TQFormatError, match=r"BIND\.MISSING_FILE"):
        read_corpus(str(tmp_path / "nothing.txt"))


def test_corpus_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    contents = {"c/test-00000-of-00002.jsonl": '{"text": "a\\n"}\n{"text": ""}\n', "c/train.jsonl": '{"text": "x"}'}
    contents |= {"c/test-00001-of-00002.jsonl": '{"text": "b"}\n', "test.txt": "d\n\ne\n", "README.md": ""}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    info = SimpleNamespace(sha="1" * 40, siblings=[SimpleNamespace(rfilename=name) for name in contents])
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: str(tmp_path / name))
    corpus = read_corpus("owner/name:c")
    assert (corpus.text, corpus.rows, corpus.config, corpus.split, corpus.revision) == (
        "a\n\nb",
        2,
        "c",
        "test",
        "1" * 40,
    )
    assert read_corpus("owner/name").text == "d\n\ne"
    with pytest.raises(TQFormatError, match=r"BIND\.MISSING_FILE"):
        read_corpus("owner/name:c", "validation")


def test_corpus_of_the_hub_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of most data sets there, in two parts, with an empty value and a further column."""
    import huggingface_hub

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = [f"c/test-0000{i}-of-00002.parquet" for i in range(2)]
    (tmp_path / "c").mkdir()
    for name, rows in zip(names, ([" = A = \n", "", "b"], [None, "c\n"]), strict=True):
        parquet.write_table(pyarrow.table({"text": rows, "label": [0] * len(rows)}), tmp_path / name)
    siblings = [SimpleNamespace(rfilename=name) for name in [*names, "c/train-00000-of-00001.parquet"]]
    info = SimpleNamespace(sha="1" * 40, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: str(tmp_path / name))
    corpus = read_corpus("owner/name:c")
    assert (corpus.text, corpus.rows) == (" = A = \n\nb\n\nc", 3)
    entry = corpus.to_dict() | {"tokens": 5}
    assert same_data(entry, "owner/name:c") and same_data(entry, "owner/name:c", revision="1" * 40)
    others = [
        ("owner/name", "test", None),
        ("owner/name:c", "train", None),
        ("owner/name:c", "test", "main"),
        ("?", "test", None),
    ]
    assert not any(same_data(entry, *other) for other in others)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TQFormatError, match="pyarrow cannot be imported; it comes with the extra `quantizer`"):
        read_corpus("owner/name:c")


# ------------------------------------------------------------------------------------------------ tiny models


def make_same(checkpoint: Path, out: Path) -> Path:
    """A repository with the weights of a checkpoint as they are."""
    from safetensors.torch import load_file

    with new_writer(out) as writer:
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            writer.add_passthrough(name, tensor)
        for file in sorted(checkpoint.glob("*.json")):
            writer.add_file(file, "support")
        return writer.finish()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def read(repo: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((repo / name).read_text("utf-8")))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


FIGURES = (
    "base",
    "quantized",
    "perplexity_delta",
    "perplexity_ratio",
    "kl_divergence",
    "top1_agreement",
    "window_results",
)


def figures(summary: dict[str, Any]) -> list[float]:
    return numbers([summary[key] for key in FIGURES])


# ------------------------------------------------------------------------------------------------ figures


def test_the_figures_are_those_of_a_plain_computation(lab: Lab) -> None:
    import transformers

    import tqformat

    summary = lab.run()
    base = transformers.AutoModelForCausalLM.from_pretrained(lab.base).eval()
    model = tqformat.load(lab.repo)
    ids = torch.tensor(tqformat.load_tokenizer(lab.repo)(lab.text.read_text())["input_ids"])
    assert len(ids) == 300 == summary["dataset"]["tokens"]
    nll = np.zeros(2)
    divergences, agreeing, weights, before = [], 0, 0, 0
    nll_delta: list[float] = []
    p_delta: list[float] = []
    for begin in range(0, 300, 16):
        end = min(begin + 32, 300)
        window, target = ids[None, begin:end], ids[None, begin:end].clone()
        target[:, : end - begin - (end - before)] = -100
        weight = int((target != -100).sum()) - 1
        with torch.no_grad():
            outputs = [m(input_ids=window, labels=target) for m in (base, model)]
        nll += [output.loss.item() * weight for output in outputs]
        place = target[0, 1:] != -100
        p, q = (output.logits[0, :-1][place].double().log_softmax(-1) for output in outputs)
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        right = [x.gather(1, target[0, 1:][place, None])[:, 0] for x in (p, q)]
        nll_delta += (right[0] - right[1]).tolist()
        p_delta += (right[1].exp() - right[0].exp()).tolist()
        weights, before = weights + weight, end
        if end == 300:
            break
    nll /= weights
    assert summary["scored_tokens"] == weights and summary["positions"] == len(divergences) == 299
    assert [summary[m]["average_nll"] for m in ("base", "quantized")] == pytest.approx(nll.tolist(), rel=1e-5)
    assert summary["perplexity_ratio"] == pytest.approx(math.exp(nll[1] - nll[0]), rel=1e-5)
    kl = summary["kl_divergence"]
    assert kl["mean"] == pytest.approx(np.mean(divergences), rel=1e-4) and kl["mean"] > 1e-4
    assert kl["median"] == pytest.approx(np.median(divergences), rel=1e-3)
    assert kl["p99"] == pytest.approx(np.quantile(divergences, 0.99), rel=1e-3)
    assert kl["p999"] == pytest.approx(np.quantile(divergences, 0.999), rel=1e-3)
    edges = [0.0, *((4 + i % 4) * 2.0 ** (i // 4 - 26) for i in range(128)), math.inf]
    counts = np.histogram(divergences, edges)[0]
    assert np.abs(np.array(kl["histogram"]) - counts[: len(kl["histogram"])]).sum() <= 2  # one may cross an edge
    assert summary["top1_agreement"]["agreeing"] == agreeing < 299
    error = np.std(nll_delta, ddof=1) / math.sqrt(299) * summary["perplexity_ratio"]
    assert summary["perplexity_ratio_standard_error"] == pytest.approx(error, rel=1e-4)
    assert summary["p_delta"]["mean"] == pytest.approx(np.mean(p_delta), rel=1e-3)
    assert summary["p_delta"]["rms"] == pytest.approx(math.sqrt(np.mean(np.square(p_delta))), rel=1e-4)


def test_full_pass_over_as_many_tokens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "base"
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=600, **sizes)).save_pretrained(path)
    make_tokenizer(path)
    repo, text = make_same(path, tmp_path / "repo"), make_text(tmp_path / "long.txt", 297_053)
    summary = evaluate.evaluate(
        str(path), repo, [str(text)], evaluate.Settings(batch=16), cache_dir=tmp_path / "cache", quiet=True
    )
    assert (summary["dataset"]["tokens"], summary["windows"], summary["scored_tokens"]) == (297_053, 1160, 295_893)
    assert summary["settings"]["max_windows"] is None and summary["role"] == "sanity-test"
    assert len(summary["window_results"]["kl"]) == 1160
    assert violations(repo) == []


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_weights_show_no_difference(lab: Lab, device: str) -> None:
    repo = make_same(lab.base, lab.path / "same")
    summary = lab.run(repo=repo, device=device, dtype="float32")
    assert summary["kl_divergence"] == {"mean": 0, "median": 0, "p99": 0, "p999": 0, "max": 0, "histogram": [299]}
    assert (summary["p_delta"], summary["perplexity_ratio_standard_error"]) == ({"mean": 0, "rms": 0}, 0)
    assert (summary["perplexity_ratio"], summary["perplexity_delta"]) == (1, 0)
    assert summary["top1_agreement"]["rate"] == 1
    assert summary["logit_cosine"]["mean"] == pytest.approx(1, abs=1e-12)
    assert violations(repo) == []


def test_several_texts(lab: Lab) -> None:
    """Each has the figures that it has alone; the same one twice is refused."""
    other = make_text(lab.path / "other.txt", 100)
    both = lab.run(texts=[lab.text, other])
    first, second = lab.run(texts=[lab.text]), lab.run(texts=[other])
    (further,) = both["further_texts"]
    assert further == {key: second[key] for key in further}
    assert {key: both[key] for key in further} == {key: first[key] for key in further}
    assert "further_texts" not in first and first["dataset"]["id"] != further["dataset"]["id"] == "other.txt"
    assert "other.txt (sanity-test): 100 tokens" in evaluate.describe(both)
    lab.run(texts=[lab.text, other])
    wanted = {"max_length": 32, "stride": 16}
    current = [
        evaluate.is_current(lab.repo, both["base_weights_sha256"], [str(text) for text in texts], settings)
        for settings in (evaluate.Settings(**wanted), evaluate.Settings(**wanted, floor=True))
        for texts in ([lab.text, other], [other, lab.text], [lab.text], [lab.text, other, other])
    ]
    assert current == [True] + [False] * 7
    with pytest.raises(TQFormatError, match=r"SCHEMA\.VALUE.*a second time"):
        lab.run(texts=[other, lab.text, other])


def test_the_floor_is_the_base_in_bfloat16(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    summary = lab.run(max_windows=2, floor=True)
    ids = torch.tensor(evaluate.load_tokenizer(lab.repo)(lab.text.read_text())["input_ids"])
    divergences: list[float] = []
    for span, new in ((slice(0, 32), 31), (slice(16, 48), 16)):
        p, q = (
            transformers.AutoModelForCausalLM.from_pretrained(lab.base, dtype=dtype)(ids[None, span])
            .logits[0, -new - 1 : -1]
            .double()
            .log_softmax(-1)
            for dtype in (torch.float32, torch.bfloat16)
        )
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
    floor = summary["floor"]
    # within what the order of bfloat16 sums, one window or a batch, changes in itself
    assert floor["kl_divergence"]["mean"] == pytest.approx(np.mean(divergences), rel=0.1)
    assert 0 < floor["kl_divergence"]["mean"] < summary["kl_divergence"]["mean"]
    assert "the base in bfloat16 against itself in float32:" in evaluate.describe(summary)
    assert violations(lab.repo) == []
    real = evaluate.load_base
    monkeypatch.setattr(
        evaluate, "load_base", lambda *given: pytest.fail("loaded") if "bfloat16" in given else real(*given)
    )
    assert lab.run(max_windows=2, floor=True)["floor"] == floor  # kept
    assert "floor" not in lab.run(max_windows=2)


def test_the_stride_is_half_a_window_unless_it_is_given() -> None:
    strides = [evaluate.Settings(max_length=n).complete().stride for n in (512, 2048, 3, 2)]
    assert strides == [256, 1024, 1, 1] and evaluate.Settings(stride=7).complete().stride == 7


def test_loops_are_told(lab: Lab) -> None:
    from conformance.checks_evaluation import _repetition

    prose = "It is late; a colourless green idea sleeps furiously while the kettle sings."
    table = {
        "": 0,
        "x" * 15: 0,
        "x" * 16: 0,
        "x" * 64: 48 / 49,
        prose: 0,
        "no, " * 16: 45 / 49,
        f"{prose}{prose}": 61 / 137,
    }
    for text, wanted in table.items():
        assert samples.repetition(text) == _repetition(text) == pytest.approx(wanted, abs=1e-12), text
    summary = lab.run(max_windows=2)
    loop, sound = {"prompt": "Say no.", "repetition": 0.9}, {"prompt": "Say yes.", "repetition": 0.1}
    told = evaluate.describe(summary, {"samples": [sound, loop, loop | {"base": loop}, sound | {"base": loop}]})
    assert [text for text in told.splitlines() if "repeats itself" in text] == [
        "note          the answer to 'Say no.' repeats itself",
        "note          the answer to 'Say no.' repeats itself; so does the base's",
    ]
    assert evaluate.read_samples(lab.repo)["samples"][0]["repetition"] >= 0


def test_the_batch_does_not_matter(lab: Lab) -> None:
    single, several = lab.run(batch=1), lab.run(batch=5)
    assert figures(single) == pytest.approx(figures(several), rel=1e-4, abs=1e-6)


def test_bos(tmp_path: Path) -> None:
    lab = Lab(tmp_path, bos=True)
    auto, never = lab.run(), lab.run(bos="never")
    assert (auto["settings"]["bos_token_id"], never["settings"]["bos_token_id"]) == (1, None)
    assert [auto[k] for k in ("windows", "scored_tokens", "positions")] == [
        never[k] for k in ("windows", "scored_tokens", "positions")
    ]
    assert auto["dataset"] == never["dataset"]  # tokenised without special tokens
    assert auto["base"] != never["base"]


def test_no_bos_where_the_tokenizer_puts_none(lab: Lab) -> None:
    assert lab.run(max_windows=2)["settings"]["bos_token_id"] is None


def test_files_and_schemas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path, chat=True)
    arguments = ["evaluate", str(lab.base), str(lab.repo), "--dataset", str(lab.text), "--max-length", "32"]
    arguments += ["--stride", "16", "--max-windows", "3", "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    assert command_line.main(arguments) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "bits per quantized weight" in out and "per weight of the whole payload" in out
    for name in FILES:
        schema = json.loads((ROOT / "schemas" / name.replace(".json", ".schema.json")).read_text("utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(read(lab.repo, name), schema)
        assert str(tmp_path) not in (lab.repo / name).read_text("utf-8")
    manifest = read(lab.repo, MANIFEST)
    assert {manifest["files"][name]["role"] for name in FILES} == {"document"}
    summary, generations = (read(lab.repo, name) for name in FILES)
    assert (summary["windows"], summary["dataset"]["id"], summary["dataset"]["rows"]) == (3, "text.txt", 30)
    assert summary["hardware"]["device"] == "cpu" and "thread" in summary["hardware"]["description"]
    assert generations["decoding"]["chat_template"] is True
    assert [s["input"] for s in generations["samples"]] == [f"w1 {p} w2" for p in samples.SAMPLE_PROMPTS]
    assert violations(lab.repo) == []
    assert command_line.main(arguments) == 0  # once more, in their place
    assert read(lab.repo, evaluate.SAMPLES) == generations
    assert timeless(read(lab.repo, evaluate.SUMMARY)) == timeless(summary)
    assert violations(lab.repo) == []


def test_errors(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    make_text(lab.text, 700)
    with pytest.raises(TQFormatError, match="the model takes 600"):
        lab.run(max_length=601, stride=1, max_windows=2)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(lab.path / "other")
    with pytest.raises(TQFormatError, match="another model"):
        lab.run(base=lab.path / "other")
    assert command_line.main(["evaluate", str(lab.base), str(lab.repo), "--dataset", "no.txt"]) == 1
    assert "BIND.MISSING_FILE" in capsys.readouterr().err
    data = ["--dataset", str(lab.text), "--max-length", "512"]
    assert command_line.main(["evaluate", str(lab.base), str(lab.repo), "--revision", "main", *data]) == 1
    assert "error [SCHEMA.VALUE] --revision" in capsys.readouterr().err
    assert not (lab.repo / evaluate.SUMMARY).exists()


@pytest.mark.parametrize(("stride", "tokens"), [(16, 32), (32, 32), (1, 2)])
def test_a_text_of_one_window_is_refused(
    lab: Lab, stride: int, tokens: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded, and nothing is replaced."""
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(evaluate, "load_base", lambda *_: pytest.fail("loaded"))
    before = {path.name: path.read_bytes() for path in lab.repo.iterdir()}
    make_text(lab.text, tokens)
    command = ["evaluate", str(lab.base), str(lab.repo), "--dataset", str(lab.text), "--max-length", "32"]
    assert command_line.main([*command, "--stride", str(stride)]) == 1
    wanted = f"error [SCHEMA.VALUE] text.txt: two windows of --max-length 32 and --stride {stride} take at least 33 tokens, the text has {tokens}; "
    assert capsys.readouterr().err.startswith(wanted)
    assert {path.name: path.read_bytes() for path in lab.repo.iterdir()} == before
    with pytest.raises(TQFormatError, match="--max-windows"):
        lab.run(max_windows=1)


@pytest.mark.parametrize("stride", [16, 32])
def test_the_shortest_text_of_two_windows(lab: Lab, stride: int) -> None:
    """With a stride of the whole length its last window is a single token, which nothing predicts."""
    make_text(lab.text, 33)
    summary = lab.run(stride=stride)
    assert (summary["windows"], summary["scored_tokens"]) == (2, 31)
    assert "fewer than 20 windows: the figures are rough" in evaluate.describe(summary)
    assert "rough" not in evaluate.describe(summary | {"windows": 20})
    assert violations(lab.repo) == []


def test_the_base_answers_beside_the_samples(lab: Lab) -> None:
    same = make_same(lab.base, lab.path / "same")
    lab.run(repo=same, max_windows=2)
    found = read(same, evaluate.SAMPLES)["samples"]
    assert [{key: sample[key] for key in sample["base"]} for sample in found] == [sample["base"] for sample in found]
    assert {*found[0]["base"]} == {"tokens", "stopped", "raw", "cleaned", "repetition"}
    lab.run(max_windows=2)
    answers = [sample["base"] for sample in read(lab.repo, evaluate.SAMPLES)["samples"]]
    assert answers == [sample["base"] for sample in found]
    lab.run(max_windows=2, kl=False)  # the base's results are kept, so it is not loaded
    assert all("base" not in sample for sample in read(lab.repo, evaluate.SAMPLES)["samples"])
    assert violations(lab.repo) == []


def test_infinite_logits_and_masked_entries() -> None:
    base, quantized = torch.zeros(2, 4), torch.zeros(2, 4)
    base[:, 3] = quantized[:, 3] = -math.inf  # an entry that the model never gives
    found = evaluate.compare(base, quantized, torch.tensor([0, 1]), True)
    assert found["base_nll"] == pytest.approx(math.log(3), rel=1e-6) and found["kl"].tolist() == [0, 0]


def test_clean() -> None:
    from conformance.checks_evaluation import _clean

    raw = "<s> \r\n a\t \n\n\n \nb\x07\ufffd <e><s> c \n"
    for function in (samples.clean, _clean):
        assert function(raw, ["<e>", "<s>"]) == "a\n\nb  c"
        assert function("", []) == ""
        assert function("\n\n\n", []) == ""


# ------------------------------------------------------------------------------------------------ cache and resuming


def test_the_base_is_not_loaded_where_its_results_are_kept(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    full = lab.run()
    monkeypatch.setattr(evaluate, "load_base", lambda *_: pytest.fail("loaded"))
    alone = lab.run(kl=False)
    assert alone["kl_divergence"] is None and alone["window_results"]["kl"] is None
    for key in ("base", "quantized", "top1_agreement", "logit_cosine", "perplexity_ratio"):
        assert alone[key] == full[key], key
    assert violations(lab.repo) == []
    monkeypatch.undo()
    shape = next(iter(lab.base.glob("*.safetensors")))
    data = bytearray(shape.read_bytes())
    data[-1] ^= 1  # other content under the same name
    shape.write_bytes(data)
    monkeypatch.setattr(evaluate, "load_base", lambda *_: (_ for _ in ()).throw(KeyError("loaded")))
    with pytest.raises(KeyError):
        lab.run(kl=False)


def test_a_damaged_cache_is_no_cache(lab: Lab) -> None:
    first = lab.run(max_windows=2)
    (kept,) = (lab.path / "cache").glob("base-*.npz")
    for content in (b"", kept.read_bytes()[:100], b"PK\x03\x04 nothing"):
        kept.write_bytes(content)
        assert timeless(lab.run(max_windows=2, kl=False))["base"] == first["base"]


@pytest.mark.parametrize("batch", [1, 4])
def test_an_interrupted_run_continues(lab: Lab, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lab.run(batch=batch)
    scored, real = [], evaluate.Runner.score

    def stop_at_third(self: evaluate.Runner, group: list[int]) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(group)
        return real(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Runner, "score", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            lab.run(batch=batch)
    (partial,) = (lab.path / "cache").glob("*.partial")
    with open(partial, "ab") as file:
        file.write(b'{"base_nll": 1.0, "quan')  # torn
    again: list[list[int]] = []
    monkeypatch.setattr(evaluate.Runner, "score", lambda self, group: (again.append(group), real(self, group))[1])
    assert timeless(lab.run(batch=batch)) == timeless(whole)
    assert again[0][0] == scored[-1][-1] + 1
    assert not list((lab.path / "cache").glob("*.partial"))


def test_a_killed_run_continues(lab: Lab) -> None:
    make_text(lab.text, 1500)
    settings = ["--max-length", "32", "--stride", "16", "--quiet", "--cache-dir"]
    command = [sys.executable, "-m", "reference_quantizer", "evaluate", str(lab.base), str(lab.repo), *settings]
    command += [str(lab.path / "cache"), "--dataset", str(lab.text)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other on a busy machine are slow
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(p.stat().st_size > 2000 for p in (lab.path / "cache").glob("*.partial")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (lab.repo / evaluate.SUMMARY).exists() or process.returncode == 0
    continued = timeless(lab.run())
    shutil.rmtree(lab.path / "cache")
    assert timeless(lab.run()) == continued


# ------------------------------------------------------------------------------------------------ conformance


@pytest.fixture(autouse=True)
def _checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checks of evaluation files are listed for these tests, whether or not the command line lists them."""
    import conformance.__main__  # noqa: F401 (lists the other checks)

    before = dict(CHECKS)
    from conformance import checks_evaluation  # noqa: F401 (lists its checks, the first time)

    LISTED.update({id: each for id, each in CHECKS.items() if id.startswith("evaluation.")})
    CHECKS.update(LISTED)
    yield
    CHECKS.clear()
    CHECKS.update(before)


LISTED: dict[str, Any] = {}


def judged(repo: Path) -> Judgement:
    folder = Folder(repo)
    try:
        return judge(Subject(folder), "L1")
    finally:
        folder.close()


def violations(repo: Path) -> list[tuple[str, str, str | None]]:
    judgement = judged(repo)
    assert not judgement.crashed, judgement.violations
    return [(v.check, v.code, v.pointer) for v in judgement.violations]


def tamper(repo: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a file as a forger would: with the size and digest in the manifest."""
    value = read(repo, name)
    change(value)
    add_files(repo, {name: ("document", evaluate.to_text(value))})


def scaled(summary: dict[str, Any]) -> None:
    """A lower perplexity, consistently: only the windows tell."""
    nll = summary["quantized"]["average_nll"] - 0.01
    summary["quantized"] = {"average_nll": nll, "perplexity": math.exp(nll)}
    summary["perplexity_delta"] = math.exp(nll) - summary["base"]["perplexity"]
    summary["perplexity_ratio"] = math.exp(nll) / summary["base"]["perplexity"]


def fewer_tokens(summary: dict[str, Any]) -> None:
    summary["dataset"]["tokens"] -= 1


def never_with_bos(summary: dict[str, Any]) -> None:
    summary["settings"] |= {"bos": "never", "bos_token_id": 1}


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(entry: Any) -> None:
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value(entry[path[-1]]) if callable(value) else value

    return change


TAMPERED: list[tuple[str, Callable[[dict[str, Any]], Any], str, str, str]] = [
    (evaluate.SUMMARY, put("quantized", "perplexity", value=lambda x: x * 1.00001), "metrics", "EVAL.METRIC", "/quantized/perplexity"),
    (evaluate.SUMMARY, scaled, "metrics", "EVAL.METRIC", "/quantized/average_nll"),
    (evaluate.SUMMARY, put("perplexity_delta", value=0.0), "metrics", "EVAL.METRIC", "/perplexity_delta"),
    (evaluate.SUMMARY, put("perplexity_ratio", value=1.0), "metrics", "EVAL.METRIC", "/perplexity_ratio"),
    (evaluate.SUMMARY, put("kl_divergence", "mean", value=lambda x: x / 2), "metrics", "EVAL.METRIC", "/kl_divergence/mean"),
    (evaluate.SUMMARY, put("kl_divergence", "p99", value=lambda _: 0.0), "metrics", "EVAL.METRIC", "/kl_divergence/p99"),
    (evaluate.SUMMARY, put("kl_divergence", "p999", value=lambda x: x / 2), "metrics", "EVAL.METRIC", "/kl_divergence/p999"),
    (evaluate.SUMMARY, put("kl_divergence", "histogram", 0, value=lambda x: x + 1), "metrics", "EVAL.METRIC", "/kl_divergence/histogram"),
    (evaluate.SUMMARY, put("perplexity_ratio_standard_error", value=lambda x: x * 1.00001), "metrics", "EVAL.METRIC", "/perplexity_ratio_standard_error"),
    (evaluate.SUMMARY, put("p_delta", "mean", value=lambda x: -x), "metrics", "EVAL.METRIC", "/p_delta/mean"),
    (evaluate.SUMMARY, put("p_delta", "rms", value=lambda x: x / 2), "metrics", "EVAL.METRIC", "/p_delta/rms"),
    (evaluate.SUMMARY, put("window_results", "p_delta_squared", 2, value=0), "metrics", "EVAL.METRIC", "/window_results/p_delta_squared/2"),
    (evaluate.SUMMARY, put("floor", "kl_divergence", "p99", value=1.0), "metrics", "EVAL.METRIC", "/floor/kl_divergence/p99"),
    (evaluate.SUMMARY, put("floor", "p_delta", "rms", value=0.0), "metrics", "EVAL.METRIC", "/floor/p_delta/rms"),
    (evaluate.SUMMARY, put("floor", "window_results", "p_delta", value=lambda x: x[1:]), "windows", "EVAL.WINDOWS", "/floor/window_results/p_delta"),
    (evaluate.SUMMARY, put("floor", "kl_divergence", value=None), "shape", "SCHEMA.TYPE", "/floor/kl_divergence"),
    (evaluate.SUMMARY, put("further_texts", 0, "perplexity_ratio", value=1.0), "metrics", "EVAL.METRIC", "/further_texts/0/perplexity_ratio"),
    (evaluate.SUMMARY, put("further_texts", 0, "top1_agreement", "agreeing", value=lambda x: x + 1), "metrics", "EVAL.METRIC", "/further_texts/0/top1_agreement/agreeing"),
    (evaluate.SUMMARY, put("further_texts", 0, "floor", "p_delta", "rms", value=0.0), "metrics", "EVAL.METRIC", "/further_texts/0/floor/p_delta/rms"),
    (evaluate.SUMMARY, put("further_texts", 0, "windows", value=1), "windows", "EVAL.WINDOWS", "/further_texts/0/windows"),
    (evaluate.SAMPLES, put("samples", 0, "repetition", value=lambda x: 1 - x), "samples", "EVAL.SAMPLE", "/samples/0/repetition"),
    (evaluate.SAMPLES, put("samples", 1, "base", "repetition", value=lambda x: 1 - x), "samples", "EVAL.SAMPLE", "/samples/1/base/repetition"),
    (evaluate.SUMMARY, put("kl_divergence", value=None), "metrics", "EVAL.METRIC", "/kl_divergence"),
    (evaluate.SUMMARY, put("top1_agreement", "agreeing", value=lambda x: x + 1), "metrics", "EVAL.METRIC", "/top1_agreement/agreeing"),
    (evaluate.SUMMARY, put("top1_agreement", "rate", value=1.0), "metrics", "EVAL.METRIC", "/top1_agreement/rate"),
    (evaluate.SUMMARY, put("window_results", "agreeing", 0, value=32), "metrics", "EVAL.METRIC", "/window_results/agreeing/0"),
    (evaluate.SUMMARY, put("logit_cosine", "mean", value=0.5), "metrics", "EVAL.METRIC", "/logit_cosine/mean"),
    (evaluate.SUMMARY, put("windows", value=19), "windows", "EVAL.WINDOWS", "/windows"),
    (evaluate.SUMMARY, fewer_tokens, "windows", "EVAL.WINDOWS", "/scored_tokens"),
    (evaluate.SUMMARY, put("settings", "stride", value=33), "windows", "EVAL.WINDOWS", "/settings"),
    (evaluate.SUMMARY, put("settings", "max_windows", value=3), "windows", "EVAL.WINDOWS", "/windows"),
    (evaluate.SUMMARY, put("window_results", "kl", value=lambda x: x[1:]), "windows", "EVAL.WINDOWS", "/window_results/kl"),
    (evaluate.SUMMARY, put("base_model", value="org/other"), "subject", "EVAL.SUBJECT", "/base_model"),
    (evaluate.SUMMARY, put("payload", "turboquant_weights.safetensors", value="0" * 64), "subject", "EVAL.SUBJECT", "/payload"),
    (evaluate.SUMMARY, put("payload", value={"other.safetensors": "0" * 64}), "subject", "EVAL.SUBJECT", "/payload"),
    (evaluate.SUMMARY, never_with_bos, "windows", "EVAL.WINDOWS", "/settings/bos_token_id"),
    (evaluate.SAMPLES, put("samples", 0, "tokens", value=63), "samples", "EVAL.SAMPLE", "/samples/0/tokens"),
    (evaluate.SUMMARY, put("role", value="benchmark"), "shape", "SCHEMA.VALUE", "/role"),
    (evaluate.SUMMARY, put("dataset", "id", value="/root/text.txt"), "shape", "SCHEMA.VALUE", "/dataset/id"),
    (evaluate.SUMMARY, put("note", value=1), "shape", "SCHEMA.UNKNOWN_FIELD", ""),
    (evaluate.SUMMARY, put("windows", value="19"), "shape", "SCHEMA.TYPE", "/windows"),
    (evaluate.SUMMARY, lambda summary: summary.pop("hardware"), "shape", "SCHEMA.MISSING_FIELD", ""),
    (evaluate.SAMPLES, put("samples", 1, "cleaned", value="42."), "samples", "EVAL.SAMPLE", "/samples/1/cleaned"),
    (evaluate.SAMPLES, put("samples", 2, "raw", value="42."), "samples", "EVAL.SAMPLE", "/samples/2/cleaned"),
    (evaluate.SAMPLES, put("samples", 0, "input", value="w3"), "samples", "EVAL.SAMPLE", "/samples/0/input"),
    (evaluate.SAMPLES, put("samples", 1, "base", "cleaned", value="42."), "samples", "EVAL.SAMPLE", "/samples/1/base/cleaned"),
    (evaluate.SAMPLES, put("samples", 2, "base", "raw", value="42."), "samples", "EVAL.SAMPLE", "/samples/2/base/cleaned"),
    (evaluate.SAMPLES, put("samples", 0, "base", "tokens", value=63), "samples", "EVAL.SAMPLE", "/samples/0/base/tokens"),
    (evaluate.SAMPLES, put("samples", 0, "base", value="42."), "shape", "SCHEMA.TYPE", "/samples/0/base"),
    (evaluate.SAMPLES, put("base_model", value="org/other"), "subject", "EVAL.SUBJECT", "/base_model"),
    (evaluate.SAMPLES, lambda value: value["samples"].pop(), "shape", "SCHEMA.VALUE", "/samples"),
]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.run(texts=[lab.text, make_text(lab.path / "other.txt", 100)], floor=True)
    return lab.repo


@pytest.mark.parametrize(("name", "change", "check", "code", "pointer"), TAMPERED)
def test_a_tampered_file_is_noticed(
    evaluated: Path,
    name: str,
    change: Callable[[dict[str, Any]], Any],
    check: str,
    code: str,
    pointer: str,
    tmp_path: Path,
) -> None:
    repo = shutil.copytree(evaluated, tmp_path / "repo")
    tamper(repo, name, change)
    found = violations(repo)
    assert (f"evaluation.{check}", code, pointer) in found, found
    assert {id for id, _, _ in found} == {f"evaluation.{check}"}


TEXTS = {
    "JSON.SYNTAX": b'{"a": NaN}',
    "JSON.DUPLICATE_KEY": b'{"a": 1, "a": 2}',
    "JSON.NUMBER": b'{"a": 1e999}',
    "JSON.ENCODING": b'\xef\xbb\xbf{"a": 1}',
    "JSON.DEPTH": b"[" * 100,
    "LIMIT.SIZE": b" " * (2**24 + 1),
}


@pytest.mark.parametrize("code", TEXTS)
def test_a_file_that_is_no_strict_json_is_noticed(evaluated: Path, code: str, tmp_path: Path) -> None:
    repo = shutil.copytree(evaluated, tmp_path / "repo")
    add_files(repo, {evaluate.SUMMARY: ("document", TEXTS[code])})
    assert [(check, found) for check, found, _ in violations(repo)] == [("evaluation.json", code)]


def test_a_file_of_another_role_is_noticed(evaluated: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(evaluated, tmp_path / "repo")
    add_files(repo, {evaluate.SUMMARY: ("support", (repo / evaluate.SUMMARY).read_bytes())})
    assert violations(repo) == [("evaluation.shape", "SCHEMA.VALUE", "/files/eval_summary.json/role")]


def test_evaluation_files_are_judged_last(evaluated: Path, tmp_path: Path) -> None:
    """Whatever is wrong with them, a fault that readers meet comes first [TQ-ERR-2]."""
    repo = shutil.copytree(evaluated, tmp_path / "repo")
    add_files(repo, {evaluate.SUMMARY: ("document", b"{"), "extra.txt": ("document", b"")})
    (repo / "extra.txt").unlink()
    assert [v.stage for v in judged(repo).violations] == ["FILES", "EVAL"]
    assert [v.code for v in judged(repo).violations] == ["BIND.MISSING_FILE", "JSON.SYNTAX"]


def test_a_changed_byte_is_noticed_by_its_digest(evaluated: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(evaluated, tmp_path / "repo")
    text = (repo / evaluate.SUMMARY).read_text("utf-8")
    (repo / evaluate.SUMMARY).write_text(text.replace('"seconds": ', '"seconds": 1'), "utf-8")
    assert "BIND.DIGEST" in [code for _, code, _ in violations(repo)]


def test_repositories_without_these_files_are_not_concerned(lab: Lab) -> None:
    assert violations(lab.repo) == []
