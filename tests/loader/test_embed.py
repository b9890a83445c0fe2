"""The embedded loader: the package's reader byte for byte, and bit for bit in what it decodes, alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, repo_from_checkpoint, run_python

from tqformat import TQFormatError, add_files, load, load_state_dict, open_repo
from tqformat.embed import LOADER, PREFIX, embed, read_stamp, stamped_loader


def test_the_body_is_the_reader() -> None:
    body, prefix, line = stamped_loader().rpartition(PREFIX)
    assert (
        body == (ROOT / "tqformat" / "load_quantized.py").read_bytes()
        and prefix
        and line.endswith(b"\n")
        and line.count(b"\n") == 1
    )
    assert json.loads(line).keys() == {"format", "version", "body_sha256"}
    compile(stamped_loader(), LOADER, "exec")


def test_embed_lists_the_loader(settings_repo: Path) -> None:
    before = load_state_dict(settings_repo)
    assert embed(settings_repo) == settings_repo / LOADER
    assert embed(settings_repo).read_bytes() == stamped_loader()  # once more replaces it
    with open_repo(settings_repo) as repo:
        assert repo.manifest.files[LOADER].role == "code"
        repo.check_roles("code")
    after = load_state_dict(settings_repo)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in settings_repo.iterdir() if path.name.startswith(".")) == []


def test_the_stamp() -> None:
    stamp = read_stamp(stamped_loader())
    assert (stamp.format, stamp.version) == ("1.0", "1.0.0") and len(stamp.body_sha256) == 64


TAMPERED = {
    "a byte of the body": lambda b: (
        b.replace(b"highest", b"HIGHEST") if b"highest" in b else b.replace(b"def ", b"dEf ", 1)
    ),
    "a line before": lambda b: b"import os\n" + b,
    "a line between": lambda b: b.replace(PREFIX, b"import os\n" + PREFIX),
    "a line after": lambda b: b + b"import os\n",
    "no stamp": lambda b: b.rpartition(PREFIX)[0],
    "no JSON": lambda b: b.rpartition(PREFIX)[0] + PREFIX + b"{\n",
    "another key": lambda b: b.replace(b'"body_sha256"', b'"digest"'),
    "a list": lambda b: b.rpartition(PREFIX)[0] + PREFIX + b"[1, 2]\n",
    "numbers": lambda b: b.rpartition(PREFIX)[0] + PREFIX + b'{"format": 1, "version": 2, "body_sha256": 3}\n',
    "a number": lambda b: b.rpartition(PREFIX)[0] + PREFIX + b"7\n",
    "Windows line ends": lambda b: b.replace(b"\n", b"\r\n"),
    "nothing": lambda b: b"",
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_changed_loader_is_noticed(kind: str, settings_repo: Path) -> None:
    changed = TAMPERED[kind](stamped_loader())
    assert changed != stamped_loader()
    with pytest.raises(TQFormatError) as caught:
        read_stamp(changed, "where")
    assert (caught.value.code, caught.value.where) == ("BIND.LOADER", "where")
    add_files(settings_repo, {LOADER: ("code", changed)})  # the digests fit: only the stamp tells
    done = run_python("-m", "tqformat", "verify", "--no-decode", str(settings_repo))
    assert done.returncode == 1 and "BIND.LOADER" in done.stderr and "Traceback" not in done.stderr


ALONE = """
import importlib.util, sys
sys.modules["tqformat"] = None  # the package cannot be imported
try:
    import tqformat
except ImportError:
    pass
else:
    raise SystemExit("tqformat is importable")
spec = importlib.util.spec_from_file_location("load_quantized", sys.argv[1] + "/load_quantized.py")
loader = importlib.util.module_from_spec(spec)
sys.dont_write_bytecode = True
spec.loader.exec_module(loader)
assert "load_quantized" not in sys.modules
import torch
what, repo, out = sys.argv[2], sys.argv[1], sys.argv[3]
if what == "weights":
    torch.save(dict(loader.load_state_dict(repo)), out)
    try:
        loader.open_repo(out)
    except loader.TQFormatError as error:
        assert error.code == "BIND.MISSING_FILE"
else:
    model, manifest = loader.load_quantized_model(repo)
    assert manifest["format"] == "tqformat" and not model.training
    torch.save({"logits": model(torch.tensor([[1, 2, 3]])).logits.detach(), **model.state_dict()}, out)
assert not any(name == "tqformat" or name.startswith("tqformat.") for name in sys.modules if sys.modules[name])
"""


def run_alone(repo: Path, what: str, out: Path) -> dict[str, torch.Tensor]:
    """What a process without tqformat gets from the loader in a repository."""
    files = sorted(path.name for path in repo.iterdir())
    done = run_python("-I", "-c", ALONE, str(repo), what, str(out), cwd=out.parent)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(path.name for path in repo.iterdir()) == files
    return dict(torch.load(out, weights_only=True))


def test_alone_it_decodes_the_same_bits(settings_repo: Path, tmp_path: Path) -> None:
    embed(settings_repo)
    repo = Path(shutil.move(settings_repo, tmp_path / "elsewhere"))
    got, want = run_alone(repo, "weights", tmp_path / "out.pt"), load_state_dict(repo)
    assert got.keys() == want.keys() and len(want) == 20
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


def test_alone_it_builds_the_model(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "checkpoint")
    repo = repo_from_checkpoint(tmp_path / "checkpoint", tmp_path / "repo", "text-generation")
    embed(repo)
    got = run_alone(repo, "model", tmp_path / "out.pt")
    want = load(repo)
    with torch.no_grad():
        assert torch.equal(got.pop("logits"), want(torch.tensor([[1, 2, 3]])).logits)
    state = want.state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


def test_the_package_offers_it_without_torch() -> None:
    """README's `tqformat.embed.stamped_loader()`."""
    code = (
        "import sys, tqformat\n"
        "sys.stdout.buffer.write(tqformat.embed.stamped_loader())\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.encode() == stamped_loader()
