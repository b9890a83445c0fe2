"""`python -m conformance run`: all cases put to an implementation, and the reports."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from conformance.findings import named, tell
from conformance.runner import describe, html
from conformance.runner.protocol import Answer, Json, Session, StartError
from conformance.runner.score import SCORES, Case, Outcome, judge_load, judge_product, products, said
from conformance.runner.weaknesses import weaknesses
from conformance.vectors import ROOT, load_case, materialise

GREEN, RED, USAGE = range(3)
SHOWN = 10  # cases of one score in the text report

DESCRIPTION = """\
Put an implementation of tqformat to the conformance vectors. It is started as a child process and answers
lines of JSON; conformance/PROTOCOL.md tells its author how, with a complete example.

scores, each over the cases where it applies:
  safe      invalid input is rejected
  precise   rejections carry an allowed code
  bounded   time and memory stay within the case's limits (memory where the system tells it)
  correct   decoded values are right by [TQ-NUM-5], passthrough bytes equal, no weight is missing
  stable    every answer is one: no crash, no hang, no malformed line, nothing errored
  multiplied  (implementations that multiply without decoding) products are as near as they state [TQ-FUSE-2]
  written   (implementations that write) what is written passes L2 and decodes to the same weights
"""

EPILOG = """\
exit status:
  0  every score that applies is given
  1  something failed, or a report could not be written
  2  usage: a wrong option, no case selected, or EXE does not start

examples:
  %(prog)s --entrypoint "python -m conformance.adapters.reference" --html report.html
  %(prog)s --entrypoint ./my-adapter --select "valid/*" --select "invalid/json/*"
"""


@dataclass
class Run:
    """What an implementation said about itself, and what came of the cases, in the order of the cases."""

    about: Json
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not any(outcome.failed for outcome in self.outcomes)


def find_cases(root: Path, globs: list[str]) -> list[Case]:
    """The cases below `root` whose id `<result>/<area>/<name>` matches one of the globs, or all of them."""
    found = [Case(path.parent, load_case(path.parent)) for path in sorted(root.glob("*/*/*/case.json"))]
    return [case for case in found if not globs or any(fnmatchcase(case.id, glob) for glob in globs)]


def put(session: Session, request: Json, seconds: float, megabytes: int) -> Answer:
    """The answer to load, product or write. If it seems to take too much memory, a fresh process is asked, whose answer counts:
    one that collects its garbage late may have paid for what the cases before left in it."""
    answer = session.ask(request, seconds, megabytes)
    if session.asked > 1 and answer.megabytes is not None and answer.megabytes > megabytes:
        session.stop()
        if request["command"] == "load":
            Path(request["out"]).unlink(missing_ok=True)
        elif request["command"] == "write":
            shutil.rmtree(request["path"], ignore_errors=True)
        answer = session.ask(request, seconds, megabytes)
    return answer


def run_case(session: Session, case: Case, slow_factor: float) -> Iterator[Outcome]:
    """Puts one case to the implementation: load, and product and write where it can and the case is a valid repository."""
    limits, features = case.about["limits"], set(session.about["features"])
    seconds = limits["seconds"] * slow_factor
    with tempfile.TemporaryDirectory(prefix="tqformat-") as directory, named(directory):
        place = Path(directory)
        repo, out = materialise(case.path, place / "repo"), place / "out"
        request: Json = {"command": "load", "path": str(repo), "out": str(out)}
        answer = put(session, request, seconds, limits["megabytes"])
        yield judge_load(case, answer, features, repo, out)
        if case.about["result"] != "valid" or not set(case.about["features"]) <= features:
            return
        for product in products(case) if "product" in session.about["operations"] else []:
            x = np.array([float.fromhex(text) for text in product["x"]], "<f4")
            request = {"command": "product", "path": str(repo), "weight": product["weight"]}
            request["x"] = describe.tensor("F32", x.shape, x.tobytes())
            yield judge_product(case, put(session, request, seconds, limits["megabytes"]), product)
        if "write" in session.about["operations"]:
            description, written = place / "description.json", place / "written"
            description.write_text(json.dumps(describe.describe(repo)), "utf-8")
            request = {"command": "write", "description": str(description), "path": str(written)}
            answer = put(session, request, seconds, limits["megabytes"])
            yield describe.judge_write(case, answer, repo, written)


def run_cases(command: list[str], cases: list[Case], slow_factor: float = 4.0, jobs: int = 1) -> Run:
    """Puts all cases to `jobs` sessions of the implementation; raises StartError if it does not start."""
    start = time.monotonic()
    found: dict[int, list[Outcome]] = {}
    left, lock = iter(enumerate(cases)), threading.Lock()
    sessions = [Session(command) for _ in range(max(1, min(jobs, len(cases))))]

    def work(session: Session) -> None:
        while True:
            with lock:
                index, case = next(left, (-1, None))
            if case is None:
                return
            found[index] = list(run_case(session, case, slow_factor))
            progress.update()

    try:
        for session in sessions:
            session.start()
        with (
            tqdm.tqdm(total=len(cases), unit="case", disable=not sys.stderr.isatty()) as progress,
            ThreadPoolExecutor(len(sessions)) as pool,
        ):
            for done in [pool.submit(work, session) for session in sessions]:
                done.result()
    finally:
        for session in sessions:
            session.stop()
    outcomes = [outcome for index in sorted(found) for outcome in found[index]]
    return Run(sessions[0].about, outcomes, time.monotonic() - start)


# Reports ---------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """`text` without anything that a terminal could take for more than text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def tally(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """For each score that applies somewhere, in how many cases it was given and in how many it applies."""
    given = {score: [o.scores[score] for o in outcomes if score in o.scores] for score in SCORES}
    return {score: {"passed": sum(oks), "total": len(oks)} for score, oks in given.items() if oks}


def as_json(run: Run) -> dict[str, Any]:
    """The report for programs (schemas/report.schema.json)."""
    areas: dict[str, list[Outcome]] = {}
    for outcome in sorted(run.outcomes, key=lambda o: ["valid", "acceptable", "invalid"].index(o.case.about["result"])):
        areas.setdefault(f"{outcome.case.about['result']}/{outcome.case.area}", []).append(outcome)
    needed = {feature for outcome in run.outcomes for feature in outcome.case.about["features"]}
    others = [o for o in run.outcomes if o.case.about["result"] == "invalid" and o.case.about["judge"] == "validator"]
    return {
        "report_version": 1,
        "passed": run.passed,
        "implementation": {key: run.about[key] for key in ("implementation", "version", "features", "operations")}
        | {"lacks": sorted(needed - set(run.about["features"]))},
        "totals": {
            "cases": len({outcome.case.id for outcome in run.outcomes}),
            "failed": len({outcome.case.id for outcome in run.outcomes if outcome.failed}),
            "not_implemented": sum(outcome.not_implemented for outcome in run.outcomes),
            "crashes": sum(outcome.answer.status == "crash" for outcome in run.outcomes),
            "errored": sum(outcome.answer.status == "errored" for outcome in run.outcomes),
            "memory_measured": any(outcome.answer.megabytes is not None for outcome in run.outcomes),
            "seconds": round(run.seconds, 3),
        },
        "scores": tally(run.outcomes),
        "grade": lowest_grade(run.outcomes),
        # [TQ-ERR-3] what a reader may leave to validators
        "beyond_duty": {
            "passed": sum(o.answer.status == "rejection" for o in others),
            "total": len(others),
            "accepted": [o.case.id for o in others if o.answer.status == "results"],
        },
        "weaknesses": [{"name": name, "cases": ids} for name, ids in weaknesses(run.outcomes).items()],
        "areas": {area: tally(outcomes) for area, outcomes in areas.items()},
        "cases": [case_as_json(outcome) for outcome in run.outcomes],
    }


def lowest_grade(outcomes: list[Outcome]) -> dict[str, int] | None:
    """The lowest grade that the products state and reach [TQ-FUSE-2]; None without products."""
    grades = [(outcome.answer.body["grade"], outcome.grade) for outcome in outcomes if outcome.grade is not None]
    if not grades:
        return None
    return {"stated": min(stated for stated, _ in grades), "reached": min(reached for _, reached in grades)}


def case_as_json(outcome: Outcome) -> Json:
    about, answer = outcome.case.about, outcome.answer
    return {
        "id": outcome.case.id,
        "operation": outcome.operation,
        "judge": about["judge"],
        "reason": about["reason"],
        "status": answer.status,
        "code": answer.body.get("code") if answer.status == "rejection" else None,
        "answer": said(answer),
        "allowed_codes": about["codes"],
        "seconds": round(answer.seconds, 4),
        "megabytes": None if answer.megabytes is None else round(answer.megabytes, 1),
        "limits": about["limits"],
        "not_implemented": outcome.not_implemented,
        "scores": outcome.scores,
        "grade": outcome.grade,
        "notes": outcome.notes,
    }


def text(report: dict[str, Any]) -> str:
    """The report for people on a terminal: failures by score, names for them, then the table."""
    lines = []
    for score, meaning in SCORES.items():
        failing = [case for case in report["cases"] if score in case["notes"]]
        if failing:
            lines += [f"not {score} ({meaning}): {len(failing)}"]
            for case in failing[:SHOWN]:
                label = case["id"] + (f" ({case['operation']})" if case["operation"] != "load" else "")
                lines.append(f"  {label}: {plain(case['notes'][score])[:200]}")
            lines += [f"  and {len(failing) - SHOWN} more"] * (len(failing) > SHOWN) + [""]
    if report["weaknesses"]:
        lines += ["in short:"]
        lines += [f"  {len(found['cases']):4}  {found['name']}" for found in report["weaknesses"]] + [""]
    about, totals = report["implementation"], report["totals"]
    for score, count in report["scores"].items():
        share = f"{count['passed']} of {count['total']}"
        lines.append(
            f"{'ok  ' if count['passed'] == count['total'] else 'FAIL'} {score:10} {share:>12}  {SCORES[score]}"
        )
    if report["grade"]:
        lines.append(f"grade of products: {report['grade']['reached']} reached, {report['grade']['stated']} stated")
    beyond = report["beyond_duty"]
    if beyond["total"]:
        lines.append(
            f"     {'(extra)':10} {beyond['passed']} of {beyond['total']:<6} of what only validators must reject"
        )
    lines.append(
        f"{totals['crashes']} crashes, {totals['errored']} errored; {totals['not_implemented']} not implemented"
    )
    if about["lacks"]:
        lines.append(f"not implemented: {plain(', '.join(about['lacks']))}")
    if not totals["memory_measured"]:
        lines.append("memory was not measured: this system does not tell it")
    verdict = "PASS" if report["passed"] else f"FAIL ({totals['failed']} of {totals['cases']} cases)"
    return "\n".join([*lines, f"{plain(about['implementation'])} {plain(about['version'])}: {verdict}"])


# The command line ------------------------------------------------------------------------------------------------------


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand `run`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "run", help="judge an implementation", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    parser.add_argument("--entrypoint", metavar="EXE", required=True, help="the command that starts the implementation")
    parser.add_argument("--vectors", metavar="DIR", type=Path, default=ROOT, help="other vectors than the suite's")
    parser.add_argument(
        "--select", metavar="GLOB", action="append", default=[], help="only cases like this, e.g. 'valid/codes/*'"
    )
    parser.add_argument("--json", metavar="F", type=Path, help="write the report as JSON to F")
    parser.add_argument("--html", metavar="F", type=Path, help="write the report as one HTML page to F")
    parser.add_argument("--jobs", metavar="N", type=_at_least_one, default=1, help="sessions side by side (1)")
    parser.add_argument(
        "--slow-factor", metavar="X", type=_positive, default=4.0, help="what the cases' seconds are multiplied by (4)"
    )


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    if not 0 < float(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1000, got {text}")
    return float(text)


def run(arguments: argparse.Namespace) -> int:
    """The subcommand `run`; returns the exit status."""
    try:
        command = shlex.split(arguments.entrypoint)
        cases = find_cases(arguments.vectors, arguments.select)
        if not command or not cases:
            raise ValueError("EXE is empty" if not command else f"no case is selected in {arguments.vectors}")
        report = as_json(run_cases(command, cases, arguments.slow_factor, arguments.jobs))
    except (ValueError, StartError) as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return USAGE
    tell(text(report))
    if arguments.json:
        with named(str(arguments.json)):
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.html:
        with named(str(arguments.html)):
            arguments.html.write_text(html.page(report), encoding="utf-8")
    return GREEN if report["passed"] else RED
