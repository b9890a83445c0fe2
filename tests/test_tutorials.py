"""The tutorials: their code is run as it stands, in order, in a directory with a tiny model and two texts; offline."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import SPECIAL, byte_level_tokenizer, llama
from transformers import PreTrainedTokenizerFast

import tqformat

TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = [
    "water",
    "is",
    "what",
    "rivers",
    "carry",
    "to",
    "the",
    "sea",
    "and",
    "rain",
    "brings",
    "back",
    "over",
    "hills",
    "and",
    "fields",
    "in",
    "spring",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory `model` with a checkpoint, and beside it text.txt and test.txt."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("tutorial")
    llama(vocab_size=320, hidden_size=64, max_position_embeddings=1024).bfloat16().save_pretrained(place / "model")
    PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL).save_pretrained(place / "model")
    for name, count in (("text.txt", 500), ("test.txt", 400)):
        rows = [" ".join(WORDS[(i * k + count) % len(WORDS)] for k in range(1, 12)) for i in range(1, count // 10)]
        (place / name).write_text("\n".join(rows) + "\n", "utf-8")
    return place


def run_tutorial(name: str, place: Path) -> str:
    """Runs a tutorial in `place`: a block of Python is the file that its first line names. What the commands printed."""
    tools = place / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (tools / "python").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    printed, blocks = [], BLOCK.findall((TUTORIALS / name).read_text("utf-8"))
    assert blocks
    for language, code in blocks:
        if language == "python":
            file = re.match(r"# (\w+\.py)\n", code)
            assert file, code
            (place / file[1]).write_text(code, "utf-8")
            continue
        assert language == "sh"
        command = ["bash", "-e", "-c", code]
        done = subprocess.run(
            command, cwd=place, env=variables, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return "\n".join(printed)


pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the tutorials' commands are for a shell")


def test_publish_and_consume(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    place = Path(shutil.copytree(model, tmp_path / "place"))
    text = run_tutorial("publish.md", place)
    assert "tqformat 1.0: PASS L3" in text and "README.md" in text
    assert {"README.md", "load_quantized.py", "eval_summary.json"} <= {p.name for p in (place / "model-4bit").iterdir()}
    lines = run_tutorial("consume.md", place).splitlines()
    answers = [line for line in lines if "Water is" in line]
    assert len(answers) == 3 and answers[1] == answers[2]  # decoded, packed, from_pretrained, which is packed
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # texts of random weights may part at near ties: logits say whether the models are the same
        first, second = (tqformat.load(place / "model-4bit", packed=p)(ids).logits.float() for p in (False, True))
    assert (first - second).abs().max() <= 2**-5 * first.abs().max()  # some roundings to bfloat16
    assert any(line.startswith("4 bits, ") for line in lines)
    assert (place / "plain" / "model.safetensors").is_file() and (place / "model.gguf").is_file()


def test_implement(model: Path, tmp_path: Path) -> None:
    text = run_tutorial("implement.md", Path(shutil.copytree(model, tmp_path / "place")))
    assert "14 cases decoded right" in text and "tqformat 1.0: PASS L3" in text


def test_the_reader_of_the_tutorial_is_judged(model: Path, tmp_path: Path) -> None:
    """With an error in it, its check fails."""
    place = Path(shutil.copytree(model, tmp_path / "place"))
    text = (TUTORIALS / "implement.md").read_text("utf-8")
    wrong = text.replace('bitorder="little"', 'bitorder="big"')
    assert wrong != text
    (place / "wrong.md").write_text(wrong, "utf-8")
    with pytest.raises(AssertionError, match="AssertionError"):
        run_tutorial(str(place / "wrong.md"), place)
