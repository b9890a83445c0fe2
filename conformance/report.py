"""What a judgement looks like: for people, as JSON, as JUnit XML."""

from __future__ import annotations

import itertools
from typing import Any
from xml.etree import ElementTree

from conformance.check import CHECKS, LEVELS, STAGES, Judgement, Violation
from conformance.findings import brief
from conformance.subject import Subject

MARKS = ("<!-- tqformat verdict -->", "<!-- end of tqformat verdict -->")
SHOWN = 10  # different violations of one check in the text report


def verdict(judgement: Judgement, version: str) -> str:
    """One line, fit for a model card: the highest level that passed, and what stands in the way of the next."""
    failed = next((level for level in LEVELS if judgement.state(level) == "FAIL"), None)
    if judgement.crashed:
        return f"tqformat {version}: ERROR (a defect of the validator, see INTERNAL.ERROR)"
    if failed:
        first, total = judgement.violations[0].code, sum(judgement.counts.values())
        return f"tqformat {version}: FAIL {failed} ({total} violation{'s' if total > 1 else ''}, first {first})"
    passed = judgement.passed
    if passed == judgement.level:
        return f"tqformat {version}: PASS {passed}"
    missing = next(level for level in LEVELS if judgement.state(level) != "PASS")
    reason = _plain(str(judgement.reason(missing)).partition("; ")[0])  # what to do about it is said above
    return f"tqformat {version}: INCOMPLETE ({missing} not judged: {reason}{f'; {passed} passed' if passed else ''})"


def with_verdict(card: str, line: str) -> str:
    """The text of a model card with the verdict `line` in it, in place of the one that it may state already."""
    block = f"{MARKS[0]}\nConformance, by `python -m conformance check`: **{line}**\n{MARKS[1]}"
    before, mark, rest = card.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return before + block + after if mark and end else f"{card.rstrip()}\n\n{block}\n".lstrip()


def text(judgement: Judgement, version: str) -> str:
    """The report for people: violations by stage, then the levels, then the verdict."""
    lines = []
    for stage in STAGES:
        found = [violation for violation in judgement.violations if violation.stage == stage]
        if found:
            lines += [stage, ""]
        for id, group in itertools.groupby(found, key=lambda violation: violation.check):
            alike: dict[tuple[str, str], list[Violation]] = {}
            for violation in group:
                alike.setdefault((violation.code, violation.message), []).append(violation)
            shown = list(alike.values())[:SHOWN]
            for first, *others in shown:
                more = f" and {len(others)} more places" if others else ""
                lines += [f"  {first.code}  {place(first)}{more}  [{first.rule}]", f"    {_plain(first.message)}"]
            left = judgement.counts[id] - sum(map(len, shown))
            lines += [f"  and {left} more of this kind"] * (left > 0)
            lines += [f"    -> {shown[0][0].advice}", ""]
    for level, name in LEVELS.items():
        count = sum(n for id, n in judgement.counts.items() if CHECKS[id].level == level)
        state, why = judgement.state(level), judgement.reason(level)
        note = f"{count} violation{'s' if count > 1 else ''}" if count else ""
        if state == "INCOMPLETE":
            note = _plain(why or _not_asked(judgement, level))
        lines.append(f"{level} {name:<10} {state:<11} {note}".rstrip())
    return "\n".join([*lines, verdict(judgement, version)])


def _not_asked(judgement: Judgement, level: str) -> str:
    return "not asked for" if level > judgement.level else "a level below it did not pass"


def place(violation: Violation) -> str:
    """Where a violation is, as one word each: file, byte, JSON pointer."""
    parts = [violation.file]
    if violation.offset is not None:
        parts.append(f"byte {violation.offset}")
    if violation.pointer:
        parts.append(_plain(violation.pointer))
    return " ".join(parts)


def _plain(text: str) -> str:
    """`text` without anything that a terminal or an XML reader could take for more than text."""
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )


def as_json(judgement: Judgement, subject: Subject, version: str, exit_code: int) -> dict[str, Any]:
    """The report for programs; its keys are stable."""
    return {
        "report_version": 1,
        "repository": str(subject.folder.path),
        "format_version": version,
        "verdict": verdict(judgement, version),
        "exit_code": exit_code,
        "level_requested": judgement.level,
        "level_passed": judgement.passed,
        "levels": {level: {"state": judgement.state(level), "reason": judgement.reason(level)} for level in LEVELS},
        "violations": [vars(violation) for violation in judgement.violations],
        "counts": judgement.counts,
        "not_run": judgement.unreached,
        "totals": _totals(judgement, subject),
        "seconds": {"total": sum(judgement.seconds.values()), **judgement.seconds},
    }


def _totals(judgement: Judgement, subject: Subject) -> dict[str, int]:
    """Sizes of what was judged; empty where the manifest could not be trusted."""
    blocked = {*judgement.counts, *judgement.unreached}
    if any(id.startswith(("manifest.", "json.", "version.", "schema.shape.", "container.")) for id in blocked):
        return {}
    return {
        "files": len(subject.file_names),
        "weights": len(subject.manifest["tensors"]),
        "payload_tensors": len(subject.payload),
        "payload_bytes": sum(stored.size for stored in subject.payload.values()),
    }


def as_junit(judgement: Judgement, subject: Subject) -> str:
    """One test suite a level, one test case a check."""
    root = ElementTree.Element("testsuites", name=_plain(f"tqformat check {subject.folder.path}"))
    for level, name in LEVELS.items():
        checks = [each for each in CHECKS.values() if each.level == level and level <= judgement.level]
        suite = ElementTree.SubElement(root, "testsuite", name=f"{level} {name}", tests=str(len(checks)))
        failed = skipped = 0
        for each in checks:
            seconds = f"{judgement.seconds.get(each.id, 0):.3f}"
            case = ElementTree.SubElement(suite, "testcase", classname=f"tqformat.{level}", name=each.id, time=seconds)
            found = [violation for violation in judgement.violations if violation.check == each.id]
            if found:
                failed += 1
                failure = ElementTree.SubElement(
                    case, "failure", type=found[0].code, message=brief(_plain(found[0].message), 300)[1:-1]
                )
                failure.text = "\n".join(f"{v.code} {place(v)} [{v.rule}] {_plain(v.message)}" for v in found)
            elif each.id in judgement.unreached:
                skipped += 1
                ElementTree.SubElement(case, "skipped", message=_plain(judgement.unreached[each.id]))
        suite.set("failures", str(failed))
        suite.set("skipped", str(skipped))
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"
