"""The benchmark of loading: what its measures count, that both states of the page cache go, and what the report says."""

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, benchmark, repo_from_checkpoint
from helpers import make_checkpoint

from tqformat import open_repo

load, measures = benchmark("load"), benchmark("load_measures")
OURS = ("decode", "load_state_dict", "tqformat.load")
PLAIN = ("bf16 from_pretrained", "bf16 from_pretrained, weights read", "bf16 safetensors, copied")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("load") / "base")


@pytest.fixture(scope="module")
def repo(checkpoint: Path) -> Path:
    return repo_from_checkpoint(checkpoint, checkpoint.parent / "repo", "text-generation")


@pytest.mark.parametrize("name", (*OURS, *PLAIN))
def test_a_measure_counts_every_weight(name: str, checkpoint: Path, repo: Path) -> None:
    with open_repo(repo) as opened:
        expected = sum(opened.dequantize(weight).numel() for weight in opened.names())
    found = measures.measure(name, str(repo if name in OURS else checkpoint))
    assert found["weights"] == expected
    assert found["seconds"] > 0 and found["processor"] > 0


def test_tied_weights_count_once() -> None:
    weight = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert measures.held({"a": weight, "b": weight, "c": torch.zeros(5)}) == (17, 44) and measures.held(7) == (7, 0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    before = measures.peak_memory(reset=True)
    torch.ones(2**25)  # 128 MiB
    peak = measures.peak_memory()
    assert 2**26 < peak - before < 2**28
    assert measures.peak_memory(reset=True) < peak - 2**26


PEERS = {"HQQ": "hqq", "NF4": "nf4", "torchao": "torchao", "compressed-tensors": "compressed_tensors"}


@pytest.mark.parametrize("peer", PEERS)
def test_peers_give_the_weights_back(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not load.installed(load.PACKAGES[peer]):
        pytest.skip(f"the peer's package {load.PACKAGES[peer]} is not installed")
    weight = (torch.randn(64, 192, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    back = []
    monkeypatch.setattr(measures, "from_memory", lambda encode, decode: lambda _: back.append(decode(encode(weight))))
    getattr(measures, PEERS[peer])("", "cpu")
    assert back[0].dtype == weight.dtype and back[0].shape == weight.shape
    assert 0 < (back[0].float() - weight.float()).square().sum() / weight.float().square().sum() < 0.02


def test_many_tiny_weights(tmp_path: Path) -> None:
    spent = measures.many(str(tmp_path / "many"), 30)
    assert spent.keys() == {"write", "read_manifest", "open_repo", "one weight"} and all(s > 0 for s in spent.values())


def test_candidates_take_turns_in_fresh_processes(repo: Path) -> None:
    cold = load.Candidate("tiny", "4 bit", "load_state_dict", str(repo), cold=True)
    process = load.Candidate("", "", "an empty Python", str(repo), command=[sys.executable, "-c", "pass"])
    first, second = load.take_turns([cold, process], runs=1)
    assert first["cold"] and first["count"] > 0 and first["ns"] == first["seconds"] / first["count"] * 1e9
    assert second["range"] == [second["seconds"]] * 2 and "ns" not in second


def test_what_is_measured_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "installed", lambda package: package == "hqq")
    left_out: list[str] = []
    repos = {"4 bit": Path("a"), "2 bit": Path("b")}
    found = load.list_candidates("smollm2", Path("base"), repos, busy=True, judge=True, left_out=left_out)
    known = [c.what for c in found if not c.command]
    assert set(known) == {*OURS, *PLAIN, "HQQ decode"} and set(known) <= set(measures.MEASURES)
    assert sum(c.busy for c in found) == 2
    assert sorted(c.path for c in found if c.command) == ["a", "a", "a", "b", "base"]  # two judges', each one's process
    assert [line.partition(":")[0] for line in left_out] == ["GGUF", "NF4", "torchao", "compressed-tensors"]


def report() -> dict[str, Any]:
    row = {
        "size": "tiny",
        "weights": "bf16",
        "what": "bf16 from_pretrained, weights read",
        "cold": False,
        "busy": False,
    }
    row |= {"seconds": 0.25, "range": [0.2, 0.3], "processor": 0.4, "over": 3 << 20, "count": 10**8, "ns": 2.5}
    ours = row | {"weights": "4 bit", "what": "tqformat.load", "seconds": 0.5}
    rows = [row, ours, ours | {"cold": True}, ours | {"what": "decode", "busy": True}]
    once = {"quantize": 12.0}
    return {"machine": "M", "date": "today", "runs": 1, "rows": rows, "once": once, "left_out": ["HQQ: not there"]}


def test_the_report_as_a_table() -> None:
    table = load.to_markdown(report())
    read = "| tiny | bf16 | bf16 from_pretrained, weights read | 0.25 (0.2 to 0.3) | 2.50 | 3 | 0.4 |"
    assert read in table and "tqformat.load, cold" in table and "decode, beside two busy processes" in table
    assert "| quantize | 12 |" in table and table.endswith("Left out: HQQ: not there.\n")


def test_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (tmp_path / load.FILE).write_text(json.dumps(report()))
    for name in ("a.svg", "b.svg"):
        monkeypatch.setattr(sys, "argv", ["load.py", str(tmp_path), "--plot", str(tmp_path / name)])
        load.main()
    drawn = (tmp_path / "a.svg").read_text("utf-8")
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and drawn == (tmp_path / "b.svg").read_text("utf-8")
    assert ">tqformat.load, 4 bit</text>" in drawn and ">0.50</text>" in drawn


def test_a_run_writes_both_reports(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = [], []
    monkeypatch.setattr(load, "run", lambda *command: made.append(command) or 12.0)
    monkeypatch.setattr(load, "child", lambda *_: {"write": 3.0})
    monkeypatch.setattr(load, "take_turns", lambda candidates, runs: seen.append(candidates) or report()["rows"])
    arguments = ["load.py", str(tmp_path), "--checkpoint", str(checkpoint), "--repo", "TRELLIS", "--many", "30"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--runs", "1", "--device", "meta"])
    load.main()
    assert [command[1:3] for command in made] == [("reference_quantizer", "quantize")] * 2  # and no checkpoint
    assert {c.weights for c in seen[0]} >= {"4 bit", "2 bit", "TRELLIS"} and {c.device for c in seen[0]} == {"meta"}
    assert [c.what for c in seen[1]][1:] == ["import tqformat, the process", "inspect of many weights, the process"]
    saved = json.loads((tmp_path / load.FILE).read_text("utf-8"))
    assert len(saved["rows"]) == 8 and saved["once"] == {
        "quantize smollm2 to 4 bit": 12.0,
        "quantize smollm2 to 2 bit": 12.0,
        "30 weights: write": 3.0,
    }
    assert (tmp_path / "load.md").read_text("utf-8") == load.to_markdown(saved)
