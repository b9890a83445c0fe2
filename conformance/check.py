"""The table of checks, and the run that judges a repository by it.

A check is a small generator of findings with a stable id such as `bind.digest`. `CHECKS` lists all of them in the order
in which they are run; leaving one out of a run (`skip`) switches that check off and nothing else, which is how the test
suite proves that each of them is needed.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field

from conformance.findings import MANIFEST, Finding, NotReachedError, brief, said
from conformance.subject import Subject

# [TQ-ERR-2] the stages of judgement; where several codes apply, those of the earliest come first
STAGES = ("PATH", "JSON", "SCHEMA", "FILES", "CONTAINER", "BIND", "PACK", "DATA", "EVAL")
# what the manifest's table of files says comes behind SCHEMA and before the content of a payload
FILES = ("path.type", "container.absent", "bind.missing_file", "bind.size", "bind.shards")
LEVELS = {"L0": "structure", "L1": "binding", "L2": "data", "L3": "decode"}
BLOCKED = "blocked by "
MAX_VIOLATIONS = 1000  # kept of each check; the rest are counted

Find = Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """One rule put to the test. It is run if every check whose id begins with one of `needs` was run without findings."""

    id: str
    level: str
    code: str
    rule: str
    needs: tuple[str, ...]
    advice: str
    find: Find

    @property
    def stage(self) -> str:
        """The stage of the check's code; LIMIT takes the place of the stage in which it is met, EVAL that of every code."""
        if self.id.startswith("evaluation."):
            return "EVAL"
        if self.id in FILES:
            return "FILES"
        prefix = self.code.partition(".")[0]
        named = self.id.partition(".")[0].upper()
        return prefix if prefix in STAGES else named if named in STAGES else STAGES[-1]


CHECKS: dict[str, Check] = {}


def check(
    id: str, level: str, code: str, rule: str, advice: str, needs: tuple[str, ...] = ()
) -> Callable[[Find], Find]:
    """Lists a generator of findings in CHECKS; the order of definition is the order of judgement."""

    def listed(find: Find) -> Find:
        assert id not in CHECKS, f"two checks are called {id}"
        CHECKS[id] = Check(id, level, code, rule, needs, advice, find)
        return find

    return listed


@dataclass(frozen=True)
class Violation:
    """A finding with its verdict."""

    check: str
    code: str
    stage: str
    level: str
    rule: str
    file: str
    pointer: str | None
    offset: int | None
    message: str
    advice: str


@dataclass
class Judgement:
    """What a run found. `counts` counts all violations of a check, `violations` holds the first MAX_VIOLATIONS."""

    level: str  # the one that was asked for
    violations: list[Violation] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)  # check -> why it was not run
    seconds: dict[str, float] = field(default_factory=dict)
    crashed: bool = False

    def state(self, level: str) -> str:
        """PASS, FAIL or INCOMPLETE; a level passes only if those below it do."""
        if any(violation.level == level for violation in self.violations):
            return "FAIL"
        levels = list(LEVELS)
        if levels.index(level) > levels.index(self.level) or self.reason(level) is not None:
            return "INCOMPLETE"
        below = levels[levels.index(level) - 1] if level != levels[0] else None
        return "PASS" if below is None or self.state(below) == "PASS" else "INCOMPLETE"

    def reason(self, level: str) -> str | None:
        """Why `level` was not judged in full, if it was not."""
        reasons = [why for id, why in self.unreached.items() if CHECKS[id].level == level]
        return min(reasons, key=lambda why: why.startswith(BLOCKED), default=None)

    @property
    def passed(self) -> str | None:
        """The highest level that passed."""
        return max((level for level in LEVELS if self.state(level) == "PASS"), default=None)


def judge(subject: Subject, level: str = "L3", skip: Set[str] = frozenset()) -> Judgement:
    """Puts `subject` to every check up to `level`, but for those in `skip`."""
    judgement = Judgement(level)
    wanted = [each for id, each in CHECKS.items() if each.level <= level and id not in skip]
    with subject.loader_waiting(), subject.progress("checks", len(wanted), "check") as bar:
        for each in wanted:
            bar.set_description(each.id)
            _judge(judgement, each, subject)
            bar.update()
    order = list(CHECKS)
    judgement.violations.sort(key=lambda v: (STAGES.index(v.stage), order.index(v.check)))
    return judgement


def _judge(judgement: Judgement, each: Check, subject: Subject) -> None:
    """Runs one check, unless one that it needs stands in its way."""
    obstacle = _obstacle(each, judgement)
    if obstacle:
        blocked = f"{BLOCKED}{CHECKS[obstacle].code} ({obstacle})"
        judgement.unreached[each.id] = judgement.unreached.get(obstacle, blocked)
        return
    start = time.perf_counter()
    try:
        for finding in each.find(subject):
            _note(judgement, each, finding)
    except NotReachedError as reason:
        judgement.unreached[each.id] = str(reason)
    except OSError as error:  # what the system refuses is no verdict on the repository
        judgement.unreached[each.id] = said(error)
    except MemoryError:
        _note(judgement, each, Finding(f"the check {each.id} ran out of memory"), "LIMIT.MEMORY")
    except Exception as error:  # a defect of the validator must not hide what the other checks find
        judgement.crashed = True
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__} in {place.name}, line {place.lineno}: {brief(str(error), 200)}"
        _note(judgement, each, Finding(message), "INTERNAL.ERROR")
    judgement.seconds[each.id] = time.perf_counter() - start


def _obstacle(each: Check, judgement: Judgement) -> str | None:
    """The first check that `each` needs and that found something or was not run."""
    for id in (*judgement.counts, *judgement.unreached):
        if id.startswith(each.needs) and id != each.id:
            return id
    return None


def _note(judgement: Judgement, each: Check, finding: Finding, code: str | None = None) -> None:
    judgement.counts[each.id] = count = judgement.counts.get(each.id, 0) + 1
    if count <= MAX_VIOLATIONS:
        rule, advice = finding.rule or each.rule, each.advice
        if code == "INTERNAL.ERROR":
            advice = "This is a defect of the validator: please report it, with the repository."
        judgement.violations.append(
            Violation(
                *(each.id, finding.code or code or each.code, each.stage, each.level, rule),
                *(finding.file or MANIFEST, finding.pointer, finding.offset, finding.message, advice),
            )
        )
