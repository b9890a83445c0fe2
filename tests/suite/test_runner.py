"""The runner: the protocol against tiny fake adapters, the two adapters that are shipped, the example, the reports."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import ROOT

from conformance import oracle
from conformance.__main__ import main
from conformance.adapters import reference
from conformance.runner import html, run, score
from conformance.runner.describe import describe, judge_write, wrong_repository
from conformance.runner.protocol import Answer, Session, StartError, fault, parse_answer, resident
from conformance.runner.score import Case, judge_load, tensor_bytes
from conformance.runner.weaknesses import ACCEPTS, ENDS, ROUNDS_DOWN, WRONG
from conformance.vectors import ROOT as VECTORS
from conformance.vectors import load_case, materialise

FEATURES = ["trellis", "vector_codebook", "row_codebook", "stages", "column_scale", "tiles"]
FEATURES += ["offsets", "outer_scales", "fine_scales", "dense", "givens", "permutation"]
HEAD = {"status": "results", "protocol": 1, "implementation": "fake", "version": "1", "operations": ["load"]}
VALID, INVALID, ACCEPTABLE = "valid/codes/bits-2", "invalid/json/nan", "acceptable/json/depth-65"
PRODUCTS = "valid/products/trellis-rows"
OTHER, IS_NAN = "invalid/json/comment", "'NaN' in open(request['path'] + '/quant_manifest.json').read()"
PROTOCOL = json.loads((ROOT / "schemas" / "protocol.schema.json").read_text("utf-8"))
REPORT = jsonschema.Draft202012Validator(json.loads((ROOT / "schemas" / "report.schema.json").read_text("utf-8")))


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(PROTOCOL | {"$ref": f"#/$defs/{name}", "$id": f"urn:{name}"})


def case(id: str) -> Case:
    return Case(VECTORS / id, load_case(VECTORS / id))


@pytest.fixture(autouse=True)
def _our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """Makes an adapter whose load is the given lines, with `request`, `answer` and `count` (of loads) at hand."""

    def make(load: str, features: list[str] = FEATURES) -> list[str]:
        path = tmp_path / "fake.py"
        path.write_text(
            textwrap.dedent("""\
            import json, os, sys, time
            def answer(value): print(json.dumps(value), flush=True)
            count = 0
            for line in sys.stdin:
                request = json.loads(line)
                if request["command"] == "start":
                    answer(HEAD)
                elif request["command"] == "stop":
                    break
                else:
                    count += 1
                    exec(LOAD)
            """)
            .replace("HEAD", repr(HEAD | {"features": features}))
            .replace("LOAD", repr(textwrap.dedent(load)))
        )
        return [sys.executable, str(path)]

    return make


def outcomes(command: list[str], *ids: str, slow_factor: float = 4) -> list[Any]:
    return run.run_cases(command, [case(id) for id in ids], slow_factor).outcomes


# ------------------------------------------------------------------------------------------------ the protocol

REJECT = 'answer({"status": "rejection", "code": "JSON.SYNTAX"})'
CRASHES = {
    "os._exit(3)": ("died", "status 3"),
    "sys.stderr.write('last words'); sys.stderr.flush(); os._exit(1)": ("died", "last words"),
    "os.close(1); time.sleep(60)": ("died", "ended"),
    "time.sleep(60)": ("timeout", "no answer in"),
    "print('Loading...', flush=True)": ("malformed", "Loading..."),
    "print('[' * 100000, flush=True)": ("malformed", "deep"),
    "print('{\"status\": NaN}', flush=True)": ("malformed", "NaN"),
    "sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush()": ("malformed", "utf-8"),
    "answer({'status': 'errored', 'message': chr(0xd800)})": ("malformed", "surrogates"),
    "answer([])": ("malformed", "an object"),
    "answer({'status': 'fine'})": ("malformed", "status is one of"),
    "answer({'status': 'results'})": ("malformed", "tensors"),
    "answer({'status': 'rejection'})": ("malformed", "the string code"),
    "answer({'status': 'results', 'tensors': {'w': {'dtype': 'F32', 'shape': [-1], 'base64': ''}}})": (
        "malformed",
        "'w'",
    ),
}


@pytest.mark.parametrize("load", CRASHES)
def test_a_crash_is_no_rejection(load: str, fake: Any) -> None:
    reason, message = CRASHES[load]
    (found,) = outcomes(fake(load), INVALID, slow_factor=0.2 if reason == "timeout" else 4)
    assert (found.answer.status, found.answer.body["reason"]) == ("crash", reason)
    assert message in found.answer.body["message"]
    assert found.scores["safe"] is False and found.scores["stable"] is False and "precise" not in found.scores
    assert found.scores.get("bounded") is (False if reason == "timeout" else None)


def test_after_a_crash_the_runner_goes_on(fake: Any) -> None:
    command = fake(f"os._exit(1) if 'first' in request['path'] or count == 2 else {REJECT}")
    with Session(command) as session:
        session.start()
        request = {"command": "load", "path": "x", "out": "y"}
        statuses = [session.ask(request, 5, 200).status for _ in range(5)]
        assert statuses == ["rejection", "crash", "rejection", "crash", "rejection"]
        assert session.starts == 3


def test_output_between_commands_is_malformed(fake: Any) -> None:
    with Session(fake(f"{REJECT}\nprint('more', flush=True)\ntime.sleep(0.3)")) as session:
        session.start()
        request = {"command": "load", "path": "x", "out": "y"}
        assert session.ask(request, 5, 200).status == "rejection"
        time.sleep(0.2)
        assert session.ask(request, 5, 200).body["reason"] == "malformed"


@pytest.mark.skipif(resident(os.getpid(), "VmRSS") is None, reason="this system does not tell a process's memory")
def test_memory_is_measured_and_bound(fake: Any) -> None:
    command = fake(f"block = bytearray(300 << 20) if {IS_NAN} else b''\ndel block\n{REJECT}")
    before, above, after = outcomes(command, OTHER, INVALID, OTHER)
    if before.answer.megabytes is None:
        pytest.skip("peaks cannot be reset here")
    assert before.answer.megabytes < 50 and after.answer.megabytes < 50  # the peak is that of the case alone
    assert 290 < above.answer.megabytes < 350 and above.scores["bounded"] is False and above.scores["safe"]
    command = fake("blocks = []\nwhile True: blocks.append(bytearray(64 << 20)); time.sleep(0.02)")
    (found,) = outcomes(command, INVALID)
    assert found.answer.body["reason"] == "memory" and found.scores["bounded"] is False


@pytest.mark.skipif(resident(os.getpid(), "VmRSS") is None, reason="this system does not tell a process's memory")
def test_a_case_does_not_pay_for_what_those_before_left(fake: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = fake(f"""\
        if {IS_NAN}:
            garbage = bytearray(300 << 20)  # and kept
        open({str(log)!r}, "a").write(f"{{os.getpid()}} {{os.path.exists(request['out'])}}\\n")
        open(request["out"], "w").close()
        {REJECT}
    """)
    before, bomb, after, last = outcomes(command, OTHER, INVALID, OTHER, OTHER)
    if before.answer.megabytes is None:
        pytest.skip("peaks cannot be reset here")
    assert [o.scores["bounded"] for o in (before, bomb, after, last)] == [True, False, True, True]
    assert after.answer.megabytes < 50
    asked = [line.split() for line in log.read_text().splitlines()]
    processes = list(dict.fromkeys(pid for pid, _ in asked))
    # the bomb is put to a second process, as it was not the first case of its own; the case after it to a third
    assert [processes.index(pid) for pid, _ in asked] == [0, 0, 1, 1, 2, 2]
    assert {exists for _, exists in asked} == {"False"}  # what the first attempt wrote is gone


def test_children_of_the_entry_point_are_measured_and_ended(fake: Any, tmp_path: Path) -> None:
    inner = fake(
        f"block = bytearray(300 << 20)\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{REJECT}"
    )
    with Session(["sh", "-c", f"'{inner[0]}' '{inner[1]}'; exit 0"]) as session:
        session.start()
        answer = session.ask({"command": "load", "path": "x", "out": "y"}, 20, 1000)
        assert answer.megabytes is None or answer.megabytes > 290
        session._end()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its session")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/no/such/program"], "No such file"),
        ([sys.executable, "-c", "pass"], "ended"),
        ([sys.executable, "-c", "print('{}')"], "malformed"),
        ([sys.executable, "-c", 'print(\'{"status": "skipped", "reason": ""}\')'], "start is answered"),
    ],
)
def test_no_start(command: list[str], message: str) -> None:
    with Session(command) as session, pytest.raises(StartError, match=message):
        session.start()


def test_a_process_that_is_faster_than_its_first_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Session._exchange

    def late(self: Session, *arguments: Any) -> Any:
        assert self._process is not None
        self._process.wait()
        time.sleep(0.2)  # for what it said to be read
        return exchange(self, *arguments)

    monkeypatch.setattr(Session, "_exchange", late)
    for program, message in (
        ("pass", "ended with status 0"),
        ("print('{}')", "malformed"),
        ("1/0", "ZeroDivisionError"),
    ):
        with Session([sys.executable, "-c", program]) as session, pytest.raises(StartError, match=message):
            session.start()


def answers() -> Iterator[tuple[str, Any, bool]]:
    start = HEAD | {"features": FEATURES}
    tensor = {"dtype": "F32", "shape": [1], "base64": ""}
    yield "start", start, True
    yield "start", start | {"more": 1}, True
    yield from (("start", start | change, False) for change in (
        {"protocol": 2}, {"protocol": "1"}, {"features": "all"}, {"features": [1]}, {"operations": []}, {"version": 1},
        {"status": "skipped", "reason": ""},
    ))  # fmt: skip
    yield from (("start", {k: v for k, v in start.items() if k != key}, False) for key in start)
    for command in ("load", "product", "write"):
        yield command, {"status": "rejection", "code": "A", "where": "x", "message": "y"}, True
        yield command, {"status": "rejection", "code": "A", "where": 1}, False
        yield command, {"status": "rejection", "code": None}, False
        yield command, {"status": "skipped", "reason": "x"}, True
        yield command, {"status": "skipped"}, False
        yield command, {"status": "errored", "message": "x"}, True
        yield command, {"status": "errored", "message": None}, False
        yield from ((command, value, False) for value in ({}, [], None, "results", {"status": []}, {"status": "crash"}))
    yield "write", {"status": "results"}, True
    product = {"status": "results", "y": tensor, "grade": 7}
    yield "product", product, True
    yield from (("product", product | change, False) for change in (
        {"y": None}, {"y": {}}, {"y": {"dtype": "F32", "shape": [1], "offset": 0}}, {"y": tensor | {"shape": [-1]}},
        {"grade": -1}, {"grade": 1.5}, {"grade": None}, {"grade": True},
    ))  # fmt: skip
    yield "product", {"status": "results", "y": tensor}, False
    yield "load", {"status": "results", "tensors": {}}, True
    yield "load", {"status": "results", "tensors": []}, False
    for value, ok in [
        (tensor, True), ({"dtype": "F32", "shape": [], "offset": 0}, True), (tensor | {"offset": 0}, False), (None, False),
        ({"dtype": "F32", "shape": []}, False), (tensor | {"shape": 1}, False), (tensor | {"shape": [-1]}, False),
        (tensor | {"shape": [True]}, False), (tensor | {"shape": [1.5]}, False), (tensor | {"dtype": 1}, False),
        (tensor | {"base64": 1}, False), ({"dtype": "F32", "shape": [], "offset": -1}, False), ({}, False),
    ]:  # fmt: skip
        yield "load", {"status": "results", "tensors": {"w": value}}, ok


@pytest.mark.parametrize(("command", "body", "ok"), list(answers()))
def test_answers_are_checked_as_the_schema_says(command: str, body: Any, ok: bool) -> None:
    assert (fault(command, body) is None) is ok, fault(command, body)
    assert validator(f"{command.capitalize()}Answer").is_valid(body) is ok
    if ok:
        assert parse_answer(command, json.dumps(body).encode()) == body


def test_requests_are_what_the_schema_says(fake: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = fake(f"open({str(log)!r}, 'a').write(line)\n{REJECT}")
    source = Path(command[1]).read_text()
    Path(command[1]).write_text(source.replace("'operations': ['load']", "'operations': ['load', 'product', 'write']"))
    done = ["load", "product", "product", "write", "load", "write"]
    assert [o.operation for o in outcomes(command, PRODUCTS, VALID)] == done
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [request["command"] for request in requests] == done
    for request in [*requests, {"command": "start", "protocol": 1}, {"command": "stop"}]:
        validator("Request").validate(request)


# ------------------------------------------------------------------------------------------------ scores


def y_answer(value: list[float], dtype: str = "F64", grade: int = 14, **keys: Any) -> Answer:
    data = np.array(value, {"F32": "<f4", "F64": "<f8"}.get(dtype, "<f8")).tobytes()
    y = {"dtype": dtype, "shape": [len(value)], "base64": base64.b64encode(data).decode()} | keys
    return Answer("results", {"status": "results", "y": y, "grade": grade})


def test_products_are_judged_by_the_grade_that_is_stated() -> None:
    subject = case(PRODUCTS)
    product = score.products(subject)[0]
    y, bound = (np.array([float.fromhex(text) for text in product[key]]) for key in ("y", "bound"))

    def judged(answer: Answer) -> Any:
        return score.judge_product(subject, answer, product)

    exact = judged(y_answer(y.tolist()))
    assert (exact.operation, exact.grade, exact.scores["multiplied"]) == ("product", oracle.BEST_GRADE, True)
    assert judged(y_answer(y.tolist(), "F32", 22)).scores["multiplied"]
    off = y.copy()
    off[1] += bound[1] * 1.01 * 2.0**-10
    for grade, ok in ((9, True), (10, False)):
        found = judged(y_answer(off.tolist(), grade=grade))
        assert (found.grade, found.scores["multiplied"]) == (9, ok)
    assert "row 1: grade 9, 10 was stated" in found.notes["multiplied"]
    for wrong in (
        y_answer([float("nan")] * len(y), grade=0),
        y_answer(y[:-1].tolist()),
        y_answer(y.tolist(), "F16"),
        y_answer(y.tolist(), base64="AAAA"),
        Answer("rejection", {"code": "DATA.DECODE"}),
    ):
        assert not judged(wrong).scores["multiplied"]
    skipped = judged(Answer("skipped", {"reason": "trellis"}))
    assert skipped.not_implemented and not skipped.failed


def test_products_are_put_to_who_offers_them(fake: Any) -> None:
    (found,) = outcomes(fake(REJECT), PRODUCTS)
    assert found.operation == "load"  # skipped, not failed
    assert (
        run.as_json(run.Run({"implementation": "", "version": "", "features": [], "operations": []}, [found]))["grade"]
        is None
    )


def test_scores_of_rejections(fake: Any) -> None:
    right, valid, acceptable = outcomes(fake(REJECT), INVALID, VALID, "acceptable/bind/loader-unknown")
    assert right.scores == {"stable": True, "bounded": True, "safe": True, "precise": True}
    assert valid.scores == {"stable": True, "bounded": True, "correct": False}
    assert acceptable.scores == {"stable": True, "bounded": True, "precise": False}
    (other,) = outcomes(fake(REJECT.replace("SYNTAX", "DEPTH")), INVALID)
    assert other.scores["safe"] and not other.scores["precise"] and "expected JSON.SYNTAX" in other.notes["precise"]


def test_errored_is_neither_a_rejection_nor_a_crash(fake: Any) -> None:
    (found,) = outcomes(fake('answer({"status": "errored", "message": "KeyError"})'), INVALID)
    assert found.scores == {"stable": False, "bounded": True, "safe": False}


def test_what_only_validators_reject_is_not_held_against_a_reader(fake: Any) -> None:
    empty = 'answer({"status": "results", "tensors": {}})'
    (found,) = outcomes(fake(empty), "invalid/bind/digest-payload")
    assert found.scores == {"stable": True, "bounded": True}
    (found,) = outcomes(fake(empty), "invalid/json/nan")
    assert found.scores["safe"] is False


def test_a_feature_that_is_not_implemented(fake: Any) -> None:
    trellis, others = "valid/codes/trellis-2-8", [feature for feature in FEATURES if feature != "trellis"]
    for load in (
        REJECT.replace("JSON.SYNTAX", "SCHEMA.UNKNOWN_FEATURE"),
        'answer({"status": "skipped", "reason": "x"})',
    ):
        (found,) = outcomes(fake(load, others), trellis)
        assert found.not_implemented and not found.failed
        (found,) = outcomes(fake(load), trellis)  # it said that it has it
        assert found.scores["correct"] is False
    (found,) = outcomes(fake(REJECT, others), trellis)
    assert found.scores["correct"] is False
    report = run.as_json(run.run_cases(fake(REJECT, others), [case(trellis)]))
    assert report["implementation"]["lacks"] == ["trellis"]


@pytest.fixture(scope="module")
def typical(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The right answer to load for valid/repository/typical, by the reference adapter."""
    out = tmp_path_factory.mktemp("typical") / "out"
    repo = materialise(VECTORS / "valid/repository/typical", out.with_name("repo"))
    answer = reference.load({"path": str(repo), "out": str(out)})
    assert "alias" in answer["tensors"]
    return answer | {"repo": repo, "place": out}


def faults(typical: dict[str, Any], **changes: Any) -> str:
    tensors = {name: t for name, t in (typical["tensors"] | changes).items() if t is not None}
    subject = case("valid/repository/typical")
    found = judge_load(
        subject, Answer("results", {"tensors": tensors}), set(FEATURES), typical["repo"], typical["place"]
    )
    return found.notes.get("correct", "")


def test_wrong_values_are_seen(typical: dict[str, Any]) -> None:
    w, norm = typical["tensors"]["w"], typical["tensors"]["norm"]
    assert faults(typical) == ""
    assert "'alias' is missing" in faults(typical, alias=None)
    assert "'w' is missing" in faults(typical, w=None)
    assert "'new' is no weight" in faults(typical, new=w)
    assert "dtype F16 instead of BF16" in faults(typical, w=w | {"dtype": "F16"})
    assert "shape [64] instead of [4, 16]" in faults(typical, w=w | {"shape": [64]})
    assert "3 bytes instead of 128" in faults(typical, w=w | {"base64": "AAAA"})
    assert "not base64" in faults(typical, w=w | {"base64": "A-"})
    assert "64 of 64 elements are wrong" in faults(typical, w=w | nan(128))
    assert "59 of 64 elements are wrong, the first at [0, 0]: 0 instead of" in faults(typical, alias=w | zero(128))
    assert "other bytes" in faults(typical, norm=norm | zero(32))
    assert "`out` was not written" in faults(typical, w={**without_data(w), "offset": 0})


def without_data(tensor: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tensor.items() if key != "base64"}


def zero(size: int) -> dict[str, str]:
    return {"base64": base64.b64encode(bytes(size)).decode()}


def nan(size: int) -> dict[str, str]:
    return {"base64": base64.b64encode(b"\xc0\x7f" * (size // 2)).decode()}


def test_one_unit_in_the_last_place_is_seen(typical: dict[str, Any]) -> None:
    w = typical["tensors"]["w"]
    data = np.frombuffer(base64.b64decode(w["base64"]), "<u2").copy()
    data[5] += 1
    found = faults(typical, w=w | {"base64": base64.b64encode(data.tobytes()).decode()})
    assert "1 of 64 elements are wrong, the first at [0, 5]" in found


def test_tensors_by_offset(typical: dict[str, Any]) -> None:
    w = typical["tensors"]["w"]
    typical["place"].write_bytes(b"###" + base64.b64decode(w["base64"]))
    by_offset = {**without_data(w), "offset": 3}
    assert faults(typical, w=by_offset, alias=by_offset) == ""
    assert "127 bytes instead of 128" in faults(typical, w=by_offset | {"offset": 4})
    assert "0 bytes instead of 128" in faults(typical, w=by_offset | {"offset": 2**60})
    assert tensor_bytes({"offset": 0}, 0, typical["place"].with_name("none")) == b""
    typical["place"].unlink()


def test_large_tensors_of_the_reference_go_to_the_file(tmp_path: Path) -> None:
    original, reference.INLINE = reference.INLINE, 16
    try:
        repo = materialise(VECTORS / "valid/repository/typical", tmp_path / "repo")
        answer = reference.load({"path": str(repo), "out": str(tmp_path / "out")})
    finally:
        reference.INLINE = original
    assert all("offset" in tensor for tensor in answer["tensors"].values())
    assert faults({"tensors": answer["tensors"], "repo": repo, "place": tmp_path / "out"}) == ""


# ------------------------------------------------------------------------------------------------ writing


def test_descriptions(tmp_path: Path) -> None:
    paths = sorted(VECTORS.glob("valid/*/*/repo"))[::7]
    for path in paths:
        described = describe(path)
        validator("Description").validate(described)
        assert '"codes"' not in json.dumps(described) and '"extra"' not in json.dumps(described["tensors"])
    assert len(paths) > 20


def test_written_repositories_are_judged(tmp_path: Path) -> None:
    subject, done = case("valid/repository/typical"), Answer("results")
    original = materialise(subject.path, tmp_path / "repo")
    (tmp_path / "description").write_text(json.dumps(describe(original)))
    written = tmp_path / "written"
    assert judge_write(subject, done, original, written).notes["written"] == "nothing was written"
    assert reference.write({"description": str(tmp_path / "description"), "path": str(written)}) == {
        "status": "results"
    }
    assert judge_write(subject, done, original, written).scores == {"stable": True, "bounded": True, "written": True}
    other = case("valid/stages/three")
    assert "missing or was added" in " ".join(wrong_repository(other, materialise(other.path, tmp_path / "o"), written))
    (written / "stray.txt").touch()
    assert judge_write(subject, done, original, written).notes["written"].startswith("BIND.EXTRA_FILE")
    skipped = judge_write(subject, Answer("skipped", {"reason": "x"}), original, written)
    assert skipped.not_implemented and not skipped.failed
    rejected = judge_write(subject, Answer("rejection", {"code": "SCHEMA.VALUE"}), original, written)
    assert rejected.scores["written"] is False


# ------------------------------------------------------------------------------------------------ the shipped adapters


def full_run(adapter: str, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    entry = f"'{sys.executable}' -m conformance.adapters.{adapter}"
    files = ["--json", str(report), "--html", str(page), "--jobs", "2"]
    code = main(["run", "--entrypoint", entry, *files, *options])
    return code, json.loads(report.read_text("utf-8")), page.read_text("utf-8")


class Page(HTMLParser):
    """Checks that tags are closed where they must be, and collects what the page asks of others."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.external: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.external += [f"{k}={v}" for k, v in attrs if k in ("src", "href")] + [tag] * (
            tag in ("script", "link", "img")
        )
        if tag in ("html", "details", "summary", "table", "ul", "h1", "h2", "span", "code", "b", "style", "div", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def check_page(text: str) -> None:
    assert Page(text).external == []
    assert "http" not in text and "@import" not in text and "url(" not in text


def test_the_reference_adapter_is_all_green(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, page = full_run("reference", tmp_path)
    REPORT.validate(report)
    check_page(page)
    output = capsys.readouterr().out
    assert code == 0 and report["passed"] and output.splitlines()[-1] == "tqformat 1.0.0: PASS", output
    assert report["weaknesses"] == [] and report["totals"]["crashes"] == report["totals"]["errored"] == 0
    scores = report["scores"]
    assert scores["safe"]["total"] > 480 and scores["correct"]["total"] > 190 and scores["written"]["total"] > 190
    assert report["totals"]["cases"] == len(run.find_cases(VECTORS, [])) and report["totals"]["not_implemented"] <= 1
    assert "Passes all" in page
    assert scores["multiplied"]["total"] > 10 and report["grade"]["reached"] >= report["grade"]["stated"] == 7
    assert f"Products: grade {report['grade']['reached']} reached, 7 stated." in page


NAIVE = [
    "accepts duplicate keys",
    "accepts NaN, Infinity or numbers beyond binary64",
    "accepts integers beyond 2^53 - 1",
    "accepts surrogates",
    "accepts unknown features",
    "accepts other format versions",
    "accepts unknown fields",
    "accepts file names that are paths",
    "accepts overlapping or misplaced offsets",
    "accepts bytes outside every tensor",
    "accepts repeated storage names",
    "accepts payload tensors that nothing names",
    "accepts padding bits that are set",
    "accepts codes beyond the codebook",
    "accepts scales, offsets, levels or angles that are not finite",
    "accepts weights that are not finite",
    "decodes trellis streams wrongly (tail-biting wrap)",
    "builds Paley II matrices wrongly (H_28, H_36, H_76)",
    ROUNDS_DOWN,
    "rejects with another code",
    "meets errors that it did not foresee",
    "hangs",
]


def test_the_naive_adapter_fails_in_named_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, page = full_run("naive", tmp_path, "--slow-factor", "1")
    REPORT.validate(report)
    check_page(page)
    assert code == 1 and not report["passed"] and "FAIL" in capsys.readouterr().out.splitlines()[-1]
    found = {weakness["name"]: weakness["cases"] for weakness in report["weaknesses"]}
    assert set(NAIVE) <= found.keys(), set(NAIVE) - found.keys()
    assert "invalid/bind/digest-payload" in report["beyond_duty"]["accepted"]  # no digest is looked at
    # what it does not get wrong is not named, and ordinary repositories are decoded right
    for name in (
        "orders tiles wrongly",
        "applies Givens rotations wrongly",
        "builds Sylvester matrices or signs wrongly",
    ):
        assert name not in found
    by_id = {entry["id"]: entry for entry in report["cases"]}
    for id in (
        VALID,
        "valid/transforms/hadamard-12",
        "valid/tiles/16x16",
        "valid/codebooks/vector-8",
        "valid/stages/two",
    ):
        assert by_id[id]["scores"]["correct"], by_id[id]
    # each fault is told from the others by its cases
    assert all("trellis" in id for id in found["decodes trellis streams wrongly (tail-biting wrap)"])
    assert "valid/scales/dtype-bf16" in found[ROUNDS_DOWN] and "valid/scales/dtype-f16" not in found[ROUNDS_DOWN]


def test_names_are_of_cases_that_exist() -> None:
    ids = [(found.about["result"], found.about["id"]) for found in run.find_cases(VECTORS, [])]
    for table, results in ((ACCEPTS, ("invalid",)), (WRONG, ("valid", "acceptable"))):
        for name, globs in table.items():
            for glob in globs:
                assert any(result in results and fnmatchcase(id, glob) for result, id in ids), (name, glob)
    assert set(ENDS) == {"died", "timeout", "memory", "malformed"}


def test_the_example_in_the_protocol_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "conformance" / "PROTOCOL.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    entry = f"'{sys.executable}' '{tmp_path / 'example.py'}'"
    assert main(["run", "--entrypoint", entry, "--select", "valid/*", "--jobs", "2"]) == 0, capsys.readouterr().out
    assert main(["run", "--entrypoint", entry, "--select", "invalid/json/duplicate*"]) == 1
    output = capsys.readouterr().out
    assert "not safe" in output and "accepts duplicate keys" in output
    (stage,) = map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    assert np.frombuffer(base64.b64decode(stage["symbols"]["base64"]), "<u2").tolist() == [3, 0, 2, 1]
    assert np.frombuffer(base64.b64decode(stage["scales"]["base64"]), "<f4").tolist() == [0.25]


# ------------------------------------------------------------------------------------------------ command line, reports


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = f"'{sys.executable}' -c pass"
    assert main(["run", "--entrypoint", entry]) == 2
    assert main(["run", "--entrypoint", "/no/such/program"]) == 2
    assert main(["run", "--entrypoint", ""]) == 2
    assert main(["run", "--entrypoint", "'"]) == 2
    assert main(["run", "--entrypoint", entry, "--select", "nothing/*"]) == 2
    assert main(["run", "--entrypoint", entry, "--vectors", str(tmp_path)]) == 2
    assert capsys.readouterr().out == ""
    for wrong in (["--jobs", "0"], ["--slow-factor", "0"], ["--slow-factor", "nan"], ["--jobs", "x"], ["--unknown"]):
        with pytest.raises(SystemExit) as stop:
            main(["run", "--entrypoint", entry, *wrong])
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["run"])
    assert stop.value.code == 2


def test_other_vectors(fake: Any, tmp_path: Path) -> None:
    root = tmp_path / "vectors"
    shutil.copytree(VECTORS / VALID, root / VALID)
    assert [found.id for found in run.find_cases(root, [])] == [VALID]


def test_what_an_implementation_says_does_no_harm(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert(1)</script>\x1b[2J"
    command = fake(f"answer({{'status': 'errored', 'message': {evil!r}}})")
    source = Path(command[1]).read_text()
    Path(command[1]).write_text(source.replace("'fake'", repr(evil)))
    report = run.as_json(run.run_cases(command, [case(INVALID)]))
    REPORT.validate(report)
    assert "<script" not in html.page(report)
    check_page(html.page(report))
    assert "\x1b" not in run.text(report)
