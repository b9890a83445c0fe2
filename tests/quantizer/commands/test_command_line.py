"""The command line of the reference quantizer: usage, hints, what is missing, disks that are full or closed, progress."""

import builtins
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python
from helpers import Lab

from reference_quantizer import __main__ as command_line
from reference_quantizer import disk, progress
from reference_quantizer.libraries import EXTRAS
from reference_quantizer.release import card, figures
from tqformat import writer

MODULE = "python -m reference_quantizer"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# ------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    ("command", "hint", "words"),
    [
        (["quantize", "a", "b", "--bits", "9"], f"{MODULE} quantize --help", "argument --bits: expected an integer"),
        (["quantize", "a"], f"{MODULE} quantize --help", "required: OUT"),
        (["conjure"], f"{MODULE} --help", "invalid choice: 'conjure'"),
    ],
)
def test_usage_errors_are_two_lines(
    command: list[str], hint: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(command)
    first, last = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and first == f"usage: see {hint}" and last.startswith("error: ") and words in last


def test_sizes_have_one_type() -> None:
    parse = command_line._parser().parse_args
    for text, wanted in (("1M", 10**6), ("1500000", 1_500_000), ("2gb", 2 * 10**9)):
        args = parse(["plan", "a", "--target-bytes", text])
        assert args.target_bytes == wanted
        assert parse(["quantize", "a", "b", "--max-shard-size", text]).max_shard_size == wanted
    for bad in ("0", "-1", "1.5G", "much"):
        with pytest.raises(SystemExit):
            parse(["plan", "a", "--target-bytes", bad])


@pytest.mark.parametrize("command", ["evaluate", "release", "card", "push"])
def test_help_teaches_by_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main([command, "--help"])
    examples = re.findall(rf"^  {MODULE} ({command} .*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        assert command_line._parser().parse_args(shlex.split(example)).command == command


@pytest.mark.parametrize("name", [MODULE, "tqformat-quantize"])
def test_hints_name_the_program_as_it_was_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = "__main__.py" if name == MODULE else "/somewhere/bin/tqformat-quantize"
    monkeypatch.setattr(sys, "argv", [started, "--help"])
    for command in ([], *([command] for command in command_line.LIBRARIES)):
        with pytest.raises(SystemExit):
            command_line.main([*command, "--help"])
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {' '.join([name, *command])} ")
        assert (MODULE in out) == (name == MODULE)
    assert progress.program() == name


@pytest.mark.parametrize(("command", "again"), [("evaluate", "continues where it stopped"), ("import", "begins anew")])
def test_what_an_interrupted_command_does_next_time(
    command: str, again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.evaluate, "run_evaluate", stopped)
    monkeypatch.setattr(command_line.import_packed, "run_import", stopped)
    assert command_line.main([command, "a", "b"]) == 130
    assert capsys.readouterr().err == f"\ninterrupted; the same command {again}\n"


# ------------------------------------------------------------------------------------------------ libraries


def test_every_command_says_at_once_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extras = {module: extra for extra, modules in EXTRAS.items() for module in modules}
    count = 0
    for command, modules in command_line.LIBRARIES.items():
        paths = [str(tmp_path / "a"), *([str(tmp_path / "b")] if command not in ("plan", "card") else [])]
        paths += [str(tmp_path / "c")] if command == "tune" else []
        for module in modules:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                assert command_line.main([command, *paths]) == 1
            package = "pyyaml" if module == "yaml" else module
            wanted = f"{package} cannot be imported; it comes with the extra `{extras[module]}` of tqformat"
            assert capsys.readouterr().err == f"error [UNSUPPORTED.LIBRARY] {command}: {wanted}\n"
            count += 1
    assert count > 10


def test_the_extras_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra, modules in EXTRAS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{extra} = ["))
        packages = set(re.findall(r'"([a-z0-9_-]+)[>"]', line))
        names = {"yaml": "pyyaml", "lm_eval": "lm-eval"}
        assert {names.get(name, name) for name in modules} <= packages, extra


@pytest.mark.parametrize("command", ["evaluate", "release"])
def test_an_unreachable_data_set_is_one_line(lab: Lab, command: str) -> None:
    """With nobody listening at the Hub's address, and with the Hub switched off."""
    for offline in ("0", "1"):
        env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(lab.path / "hf"), "NO_PROXY": "*"}
        arguments = [command, str(lab.base), str(lab.path / "out" if command == "release" else lab.repo), "--quiet"]
        done = run_python("-m", "reference_quantizer", *arguments, env={**env, "HF_HUB_OFFLINE": offline})
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error [BIND.MISSING_FILE] Salesforce/wikitext: the data set cannot be fetched")
        assert "--dataset FILE" in done.stderr


# ------------------------------------------------------------------------------------------------ disks


def failing(number: int, *suffixes: str) -> Any:
    """`open` for which the device is full, or read-only, where a file of these endings is written."""
    real = builtins.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            raise OSError(number, os.strerror(number))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        concerned = mode[0] in "wa" and str(path).endswith(suffixes)
        if concerned and number == errno.EROFS:
            raise OSError(number, os.strerror(number), str(path))
        file = real(path, mode, *rest, **options)
        return Full(file) if concerned else file

    return opened


def message(place: Path, number: int) -> str:
    advice = "free some space or choose another place, and the same command goes on"
    if number == errno.EROFS:
        advice = "choose another place, or allow this one to be written to"
    return f"error: {place}: {os.strerror(number)}; {advice}\n"


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_repository_that_cannot_be_written(
    lab: Lab, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(lab.base), str(lab.path / "out"), "--quiet", "--bits", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "open", failing(number, "turboquant_weights.safetensors"), raising=False)
        assert command_line.main(command) == 1
    place = lab.path / ".out.partial/release/turboquant_weights.safetensors"
    assert capsys.readouterr().err.splitlines(keepends=True)[-1] == message(place, number)
    assert not (lab.path / "out").exists()
    assert command_line.main(command) == 0  # and goes on when there is space


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("what", ["partial", "cache", "repository"])
def test_an_evaluation_that_cannot_be_written(
    lab: Lab, number: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reference_quantizer.evaluation import evaluate

    before, cache = files(lab.repo), lab.path / "cache"
    with monkeypatch.context() as patch:
        if what == "partial":
            patch.setattr(evaluate, "open", failing(number, ".partial"), raising=False)
        elif what == "cache":
            patch.setattr(
                evaluate.np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
            )
        else:
            patch.setattr(writer, "open", failing(number, "sample_generations.json.new"), raising=False)
        command = [
            "evaluate",
            str(lab.base),
            str(lab.repo),
            "--dataset",
            str(lab.text),
            "--quiet",
            "--max-length",
            "32",
        ]
        command += ["--stride", "16", "--max-windows", "3", "--cache-dir", str(cache)]
        assert command_line.main(command) == 1
    err = capsys.readouterr().err
    if what == "repository":
        assert err == message(lab.repo / ".sample_generations.json.new", number)
    else:
        (place,) = re.findall(rf"error: ({re.escape(str(cache))}/\S+): ", err)
        assert err == message(Path(place), number) and place.endswith(".partial" if what == "partial" else ".npz")
    assert files(lab.repo) == before and not list(cache.glob(".*"))
    assert command_line.main(command) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("what", ["figures", "page"])
def test_a_card_that_cannot_be_written(
    lab: Lab, number: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(lab.repo)
    with monkeypatch.context() as patch:
        if what == "figures":
            patch.setattr(writer, "open", failing(number, f"{figures.STORAGE}.new"), raising=False)
        else:
            full = OSError(number, os.strerror(number))
            patch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(full))
        assert command_line.main(["card", str(lab.repo)]) == 1
    err = capsys.readouterr().err
    assert os.strerror(number) in err and "INTERNAL" not in err and str(lab.repo) in err and err.count("\n") == 1
    assert not (lab.repo / card.CARD).exists() and not list(lab.repo.glob(".*"))
    assert what == "page" or files(lab.repo) == before
    assert command_line.main(["card", str(lab.repo)]) == 0


def test_a_report_that_cannot_be_written(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check runs in a process of its own, which a full temporary directory ends; the program is not at fault."""
    done = subprocess.CompletedProcess([], 1, "", f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}\n")
    monkeypatch.setattr(card.subprocess, "run", lambda *_, **__: done)
    assert command_line.main(["card", str(lab.repo)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and f"report.json: {os.strerror(errno.ENOSPC)}; free some space" in err


def test_a_target_that_is_read_only(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.mkdir

    def closed(self: Path, *rest: Any, **options: Any) -> None:
        if self.name.endswith(".partial"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        real(self, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", closed)
    assert command_line.main(["quantize", str(lab.base), str(lab.path / "out"), "--quiet"]) == 1
    assert message(lab.path / ".out.partial", errno.EROFS) in capsys.readouterr().err


def test_what_torch_and_safetensors_say_of_a_full_disk(tmp_path: Path) -> None:
    """The real errors, of a process whose files may not grow."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    from safetensors.torch import save_file

    data, place = torch.zeros(100_000), tmp_path / "file"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    jobs = {
        "safetensors": lambda: save_file({"a": data}, place),
        "torch.save": lambda: torch.save(data, place),
        "torch.from_file": lambda: torch.from_file(str(place), shared=True, size=10**6),
        "numpy": lambda: __import__("numpy").memmap(place, "uint8", "w+", shape=(10**6,)),
        "python": lambda: place.write_bytes(b"x" * 10**6),
    }
    found = {}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        for name, job in jobs.items():
            with pytest.raises(OSError) as caught, disk.writing(place):
                job()
            found[name] = disk.describe(caught.value, "elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    advice = "; free some space or choose another place, and the same command goes on"
    wanted = dict.fromkeys(jobs, f"{place}: {os.strerror(errno.EFBIG)}{advice}")
    wanted["torch.save"] = f"{place}: it could not be written in full{advice}"
    assert found == wanted


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (KeyError("x"), RuntimeError("(28)"), OSError(errno.EIO, "Input/output error"), OSError("ours")):
        with pytest.raises(type(error)) as caught, disk.writing(tmp_path):
            raise error
        assert caught.value is error
    assert disk.describe(OSError("ours"), "here") == "ours"
    assert disk.describe(OSError(errno.EIO, "Input/output error"), "here") == "here: Input/output error"


# ------------------------------------------------------------------------------------------------ progress


def test_progress_ends_at_100_percent(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.Progress(10, every=0, action="working", unit="step")
    shown.advance(4)  # of an earlier run
    shown.advance(1)
    shown.close()
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "working: 4 of 10 steps, 40 %",
        "working: 5 of 10 steps, 50 %",
        "working: 10 of 10 steps, 100 %",
    ]
    quiet = progress.Progress(10, quiet=True, every=0)
    quiet.advance(3)
    quiet.close()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_ends_at_100_percent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = progress.Progress(10, action="working", unit="step")
    shown.advance(4)
    shown.close()
    assert "100%" in capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    plain = progress.Progress(10, every=0, action="working", unit="step")
    plain.advance(5)
    assert "50 %" in capsys.readouterr().err
