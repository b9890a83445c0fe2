"""The suite is tested: with any single check of the validator switched off, the vectors notice.

A mutant is the validator without one check. A vector kills it if the mutant judges it otherwise than its case says: an
invalid repository that it passes, or whose earliest code is none that the case allows. Checks whose mutants no committed
vector can kill stand in BEYOND_VECTORS, with the reason and with the test that kills them instead.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import conformance.__main__  # noqa: F401 (lists the checks)
from conformance.check import CHECKS, Judgement, judge
from conformance.folder import Folder
from conformance.subject import Options, Subject
from conformance.vectors import cases, load_case, materialise

BEYOND_VECTORS = {
    "json.values": "a limit of this judge's memory, not of the format: test_validator.py",
    "container.values": "the same for a payload header: test_validator.py",
    "decode.loader_release": "depends on the list of releases, not on the repository: test_validator.py",
    "decode.loader_run": "runs a loader, which vectors must not ask for: test_validator_loader.py",
}
BEYOND_VECTORS |= {
    id: "judges what an evaluation wrote, which no reader needs: test_evaluate.py, test_validator_evaluation.py"
    for id in CHECKS
    if id.startswith("evaluation.")
}


def judged(path: Path, skip: frozenset[str] = frozenset(), level: str = "L3") -> Judgement:
    folder = Folder(path, False)
    try:
        return judge(Subject(folder, Options()), level, skip)
    finally:
        folder.close()


def is_right(judgement: Judgement, codes: list[str]) -> bool:
    """Whether an invalid case was judged as it should: rejected, and the earliest code is one of `codes`."""
    return bool(judgement.violations) and judgement.violations[0].code in codes and not judgement.crashed


@functools.cache
def survey() -> dict[str, list[Path]]:
    """For each check the invalid cases in which it finds something, those first in which it alone does."""
    found: dict[str, list[tuple[int, Path]]] = {id: [] for id in CHECKS}
    with tempfile.TemporaryDirectory() as scratch:
        for number, case_dir in enumerate(cases("invalid")):
            judgement = judged(materialise(case_dir, Path(scratch) / str(number)))
            codes = load_case(case_dir)["codes"]
            assert is_right(judgement, codes), (case_dir.name, codes, judgement.violations[:1])
            for id in judgement.counts:
                found[id].append((len(judgement.counts), case_dir))
    return {id: [case_dir for _, case_dir in sorted(hits)] for id, hits in found.items()}


def killers(id: str, scratch: Path) -> Iterator[Path]:
    """The vectors that kill a mutant, which is judged at the level of its missing check: no later level may stand in."""
    for number, case_dir in enumerate(survey()[id]):
        mutant = judged(materialise(case_dir, scratch / str(number)), frozenset({id}), CHECKS[id].level)
        if not is_right(mutant, load_case(case_dir)["codes"]):
            yield case_dir


@pytest.mark.parametrize("id", list(CHECKS))
def test_a_vector_notices_the_missing_check(id: str, tmp_path: Path) -> None:
    killer = next(killers(id, tmp_path), None)
    if id in BEYOND_VECTORS:
        assert killer is None, f"{killer} kills the mutant: take {id} out of BEYOND_VECTORS"
    else:
        assert killer is not None, f"no vector notices that {id} is missing"
