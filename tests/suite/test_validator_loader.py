"""L3: the embedded loader, by its digest and by running it in isolation."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest
from test_validator import ROOT, Repo, judged, repo, stamped

from conformance import isolate
from conformance.__main__ import main
from conformance.check import Judgement

# decodes with the oracle and answers as open_repo() does; `spoil` is what a test puts in its place
HONEST = f"""
import contextlib, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import torch
from conformance import oracle

DTYPES = {{"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}}

class Repo:
    def __init__(self, path):
        self.decoded = oracle.decode_repo(path)
    def names(self):
        return list(self.decoded)
    def dequantize(self, name):
        d = self.decoded[name]
        if d.data is not None:
            return torch.frombuffer(bytearray(d.data), dtype=DTYPES[d.dtype]).reshape(d.shape)
        return torch.from_numpy(oracle.round_to(d.exact, d.dtype)).to(DTYPES[d.dtype])

def spoil(repo):
    pass

@contextlib.contextmanager
def open_repo(path):
    print("loading")  # standard output is not the pipe
    repo = Repo(path)
    spoil(repo)
    yield repo
"""


def run(path: Path, text: str, change: str = "", **options: object) -> Judgement:
    r = repo()
    r.files["load_quantized.py"] = text.replace(
        "def spoil(repo):\n    pass\n", change or "def spoil(repo): pass\n"
    ).encode()
    return judged(r.write(path / "r"), run_loader=True, **options)


def codes(judgement: Judgement) -> list[tuple[str, str | None]]:
    assert not judgement.crashed
    return [(violation.code, violation.pointer) for violation in judgement.violations]


def test_an_honest_loader_reaches_l3(tmp_path: Path) -> None:
    judgement = run(tmp_path, HONEST)
    assert codes(judgement) == []
    assert judgement.passed == "L3"


def test_wrong_values_are_found(tmp_path: Path) -> None:
    change = """
def spoil(repo):
    right = repo.dequantize
    def wrong(name):
        t = right(name)
        if name in "bn":
            t.view(torch.int16).reshape(-1)[5 % t.numel()] += 1  # one unit in the last place
        return t
    repo.dequantize = wrong
"""
    judgement = run(tmp_path, HONEST, change)
    assert codes(judgement) == [("DATA.DECODE", "/tensors/b"), ("DATA.DECODE", "/tensors/n")]
    assert "row 0, column 5" in judgement.violations[0].message
    assert judgement.state("L3") == "FAIL"


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ("def spoil(repo): del repo.decoded['c']", "/tensors/c"),
        ("def spoil(repo): repo.decoded['z'] = repo.decoded['c']", None),
        ("def spoil(repo): repo.names = lambda: ['c', 'c']", None),
        ("def spoil(repo): right = repo.dequantize; repo.dequantize = lambda n: right(n).float()", "/tensors/a"),
        ("def spoil(repo): right = repo.dequantize; repo.dequantize = lambda n: right(n).reshape(-1)", "/tensors/a"),
        ("def spoil(repo): raise ValueError('no')", None),
    ],
)
def test_wrong_answers_are_found(change: str, pointer: str | None, tmp_path: Path) -> None:
    assert codes(run(tmp_path, HONEST, change)) == [("DATA.DECODE", pointer)]


def test_a_crash_is_found(tmp_path: Path) -> None:
    assert codes(run(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")) == [("DATA.DECODE", None)]


def test_an_endless_loop_is_stopped(tmp_path: Path) -> None:
    assert codes(run(tmp_path, "import time\ntime.sleep(60)\n", loader_seconds=1)) == [("LIMIT.TIME", None)]
    assert codes(run(tmp_path / "b", "while True: pass\n", loader_seconds=1)) == [("LIMIT.TIME", None)]


def test_the_limit_of_processor_time_is_told_from_other_ends() -> None:
    program = "import loader_driver as d\nd.os.cpu_count = lambda: 1\nd.set_limits({'memory': 2**32, 'seconds': 1})\nwhile 1: 0"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(isolate.__file__).parent)
    assert -done.returncode == signal.SIGXCPU


def test_memory_is_limited(tmp_path: Path) -> None:
    assert codes(run(tmp_path, "bytearray(2**31)\n", loader_memory=2**30)) == [("LIMIT.MEMORY", None)]


def test_a_library_that_does_not_fit_is_a_limit(tmp_path: Path) -> None:
    (code, _), *_ = codes(run(tmp_path, HONEST, loader_memory=300 * 2**20))  # torch's libraries alone take more
    assert code == "LIMIT.MEMORY"


def test_a_loader_that_closes_its_pipe_and_lives_on_is_found() -> None:
    receive, send = os.pipe()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process, TemporaryFile() as errors:
        os.close(send)
        loader = isolate.Loader(process, Path(), receive, 0.1, errors, bytearray())
        with pytest.raises(isolate.LoaderError, match="closed its pipe") as failed:
            loader.event()
        process.kill()
    os.close(receive)
    assert failed.value.code == "DATA.DECODE"


def test_a_missing_library_is_no_verdict(tmp_path: Path) -> None:
    judgement = run(tmp_path, "import no_such_library\n")
    assert codes(judgement) == []
    assert (judgement.passed, judgement.state("L3")) == ("L2", "INCOMPLETE")
    assert "UNSUPPORTED.LIBRARY" in (judgement.reason("L3") or "")


PROBE = """
import os, socket, subprocess, sys
from pathlib import Path
found = []
def attempt(what, act):
    try:
        act()
        found.append(what)
    except (OSError, subprocess.CalledProcessError):
        pass
here = Path({repository!r})
attempt("network", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
attempt("socket", lambda: socket.socket(socket.AF_UNIX).connect({unix!r}))
attempt("write", lambda: (here / "new").write_text("x"))
attempt("delete", lambda: (here / "config.json").unlink())
attempt("remount", lambda: subprocess.run(["mount", "-o", "remount,rw", "/"], check=True, capture_output=True) if Path("/bin/mount").exists() else os.stat("/nowhere"))
attempt("signal", lambda: os.kill({parent}, 0))
if "TQ_SECRET" in os.environ: found.append("environment")
if os.listdir("."): found.append("directory")
if os.path.exists({outside!r}) and os.access({outside!r}, os.W_OK): found.append("outside")
raise ValueError(f"could {{found}}")
"""


def test_the_loader_is_isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQ_SECRET", "x")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as service,  # such as the session bus, which starts programs
        TemporaryDirectory() as short,
    ):
        service.bind(f"{short}/s")
        service.listen()
        probe = PROBE.format(
            repository=str(tmp_path / "r"),
            port=server.getsockname()[1],
            unix=f"{short}/s",
            parent=os.getpid(),
            outside=str(tmp_path),
        )
        judgement = run(tmp_path, probe)
    reason = judgement.reason("L3") or ""
    if "network cannot be shut off" in reason:
        pytest.skip(reason)
    assert codes(judgement) == [("DATA.DECODE", None)]
    assert "could []" in judgement.violations[0].message
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        *("config.json", "load_quantized.py", "quant_manifest.json", "turboquant_weights.safetensors")
    ]


def with_loader(text: bytes) -> Repo:
    r = repo()
    r.files["load_quantized.py"] = text
    return r


def test_a_known_release_reaches_l3_without_being_run(tmp_path: Path) -> None:
    body = b"raise SystemExit('never run')\n"
    known = {"1.0.0": ["0" * 64, hashlib.sha256(body).hexdigest()]}
    assert judged(with_loader(stamped(body)).write(tmp_path / "a"), known_loaders=known).passed == "L3"
    # unknown: no verdict
    other = with_loader(stamped(b"pass\n", "7.0")).write(tmp_path / "b")
    judgement = judged(other, known_loaders=known)
    assert (codes(judgement), judgement.passed, judgement.state("L3")) == ([], "L2", "INCOMPLETE")
    # a stamp that is not the text's, or that claims a release
    changed = with_loader(stamped(body).replace(b"never", b"often")).write(tmp_path / "c")
    assert {code for code, _ in codes(judged(changed, known_loaders=known))} == {"BIND.LOADER"}
    twice = stamped(body).replace(b'"version":', b'"version": "7.0", "version":')  # which of the two is it?
    assert b"7.0" in twice
    assert {code for code, _ in codes(judged(with_loader(twice).write(tmp_path / "t"), known_loaders=known))} == {
        "BIND.LOADER"
    }
    claimed = with_loader(stamped(b"pass\n", "1.0.0")).write(tmp_path / "d")
    assert codes(judged(claimed, known_loaders=known)) == [("BIND.LOADER", None)]


def test_a_loader_that_was_changed_and_hashed_anew_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released = stamped((ROOT / "tqformat" / "load_quantized.py").read_bytes())
    assert main(["check", str(with_loader(released).write(tmp_path / "a"))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tqformat 1.0: PASS L3"
    changed = with_loader(released + b"print('mine')\n").write(tmp_path / "b")
    for arguments in ([], ["--level", "L3"]):
        assert main(["check", str(changed), *arguments]) == 1
        *_, level, verdict = capsys.readouterr().out.splitlines()
        assert level.startswith("L3 decode     INCOMPLETE  load_quantized.py is no known release")
        assert all(remedy in level for remedy in ("embed one", "--run-loader", "--level L2"))
        reason = "load_quantized.py is no known release, and nobody knows what it does"
        assert verdict == f"tqformat 1.0: INCOMPLETE (L3 not judged: {reason}; L2 passed)"
    assert main(["check", str(changed), "--level", "L2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tqformat 1.0: PASS L2"


def test_asking_to_run_what_cannot_be_run_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = repo().write(tmp_path / "a")
    assert (main(["check", str(without)]), main(["check", str(without), "--run-loader"])) == (0, 1)
    assert "embeds no load_quantized.py; leave out --run-loader" in capsys.readouterr().out
    # a known release, and a system that cannot isolate it
    released = with_loader(stamped((ROOT / "tqformat" / "load_quantized.py").read_bytes())).write(tmp_path / "b")
    monkeypatch.setattr(isolate.Loader, "event", lambda self: {"event": "isolated", "given_up": []})
    assert (main(["check", str(released)]), main(["check", str(released), "--run-loader"])) == (0, 1)
    assert "the network cannot be shut off here" in capsys.readouterr().out.splitlines()[-1]


def test_the_table_of_releases_has_its_shape() -> None:
    table = json.loads((ROOT / "conformance" / "known_loaders.json").read_text("utf-8"))
    for version, digests in table.items():
        assert isinstance(version, str)
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
