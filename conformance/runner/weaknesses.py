"""Names for what an implementation gets wrong: the failures of related cases, as one sentence each.

Each entry names a score and the cases, as globs over `<area>/<name>`, whose failures it stands for. Failures
that nothing here names are still in the report, under their score.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from conformance.runner.score import Outcome

ACCEPTS = {  # of invalid input
    "accepts duplicate keys": ["json/duplicate-*"],
    "accepts NaN, Infinity or numbers beyond binary64": ["json/nan", "json/*infinity", "json/number-*1e999"],
    "accepts integers beyond 2^53 - 1": ["json/number-*"],
    "accepts surrogates": ["json/*surrogate*"],
    "accepts numbers that are no integers": ["json/not-integer-*"],
    "accepts unknown features": ["schema/unknown-feature*"],
    "accepts other format versions": ["schema/version-*", "schema/format-*"],
    "accepts unknown fields": ["schema/unknown-*"],
    "accepts manifests without required fields": ["schema/missing-*"],
    "accepts values of the wrong JSON type": ["schema/type-*", "schema/feature*", "schema/*-null"],
    "accepts keys that exclude each other": ["schema/ambiguous-*"],
    "accepts values outside their range": ["schema/*"],
    "accepts file names that are paths": ["path/name-*"],
    "accepts links and special files": ["path/link-*", "path/fifo-*", "path/directory-*"],
    "accepts impossible header lengths": ["container/length-*", "container/file-*"],
    "accepts bytes outside every tensor": ["container/tail", "container/gap*", "bind/size-*"],
    "accepts overlapping or misplaced offsets": [
        "container/overlap",
        "container/beyond*",
        "container/empty-*",
        "container/short",
        "container/reversed",
        "container/offsets-*",
    ],
    "accepts repeated storage names": ["container/name-*twice*", "container/name-in-two-shards"],
    "accepts shapes that disagree with the data": ["container/shape-*", "container/rank-*"],
    "accepts malformed payload headers": ["container/*"],
    "accepts wrong sets of payload files": ["bind/shard-*", "bind/payload-*"],
    "accepts payload tensors that nothing names": ["bind/extra-*", "bind/multiple-*"],
    "accepts payload tensors of another dtype or shape": [
        "bind/*-dtype",
        "bind/*-shape",
        "bind/*-rank",
        "bind/*-rounds*",
        "bind/givens-*",
        "bind/levels-*",
        "bind/matrix-*",
        "bind/billion-*",
    ],
    "accepts wrong ties": ["bind/tied-*"],
    "accepts missing files or tensors": ["bind/missing-*"],
    "accepts padding bits that are set": ["pack/padding-*"],
    "accepts codes beyond the codebook": ["pack/range-*"],
    "accepts codes of the wrong length": ["pack/*"],
    "accepts data that are not aligned": ["container/alignment-*"],
    "accepts scales, offsets, levels or angles that are not finite": [
        "data/scale-*",
        "data/offset-*",
        "data/outer-*",
        "data/level-*",
        "data/angle-*",
        "data/matrix-*",
        "data/column-scale-*",
    ],
    "accepts weights that are not finite": ["data/overflow-*"],
    "accepts pairs or permutations that are none": ["data/pairs-*", "data/permutation-*"],
    "accepts more than the limits": ["limit/*"],
}
WRONG = {  # values of valid or acceptable input
    "decodes trellis streams wrongly (tail-biting wrap)": [
        "codes/trellis-*",
        "tiles/trellis-*",
        "codebooks/rows-trellis",
    ],
    "unpacks codes wrongly": ["codes/bits-*", "codes/entries-*", "codes/window-*"],
    "orders tiles wrongly": ["tiles/*"],
    "builds Paley II matrices wrongly (H_28, H_36, H_76)": [
        *(f"transforms/hadamard-*{f}*" for f in (28, 36, 76)),
        "limits/paley-*",
    ],
    "builds Paley I matrices wrongly (H_12, H_20, H_24, H_60)": [
        *(f"transforms/hadamard-{f}" for f in ("12", "20", "24", "60")),
        "transforms/hadamard-*12*",
    ],
    "builds Sylvester matrices or signs wrongly": ["transforms/hadamard-*", "transforms/seed-*"],
    "applies permutations wrongly": ["transforms/permutation-*", "offsets/activation-order"],
    "refuses or misplaces scales finer than blocks": ["transforms/fine-*", "offsets/fine"],
    "reads 8-bit or outer scales wrongly": ["scales/outer-*", "scales/every-*", "scales/*fp4", "scales/q6-k"],
    "refuses negative scales": ["scales/negative-*"],
    "adds offsets wrongly": ["offsets/*"],
    "applies Givens rotations wrongly": ["transforms/givens-*"],
    "applies dense matrices wrongly": ["transforms/dense-*"],
    "looks up vector or row codebooks wrongly": ["codebooks/vector-*", "codebooks/rows-*"],
    "adds stages wrongly": ["stages/two", "stages/eight", "stages/cancel", "stages/tile-heights"],
    "applies column scales wrongly": ["scales/column-*"],
    "changes passthrough tensors": ["passthrough/*"],
    "lacks aliases of tied weights": ["ties/*"],
    "refuses JSON that the rules allow": ["json/*"],
    "refuses later minor versions": ["versions/*"],
}
ROUNDS_DOWN = "rounds towards zero (truncates BF16 or F16)"
ENDS = {
    "died": "crashes",
    "timeout": "hangs",
    "memory": "takes memory without bounds",
    "malformed": "gives malformed answers",
}


def names(outcome: Outcome) -> Iterable[str]:
    """The names of what went wrong in one outcome."""
    case = outcome.case.about["id"]
    if outcome.answer.status == "crash":
        yield ENDS[outcome.answer.body["reason"]]
        return
    if outcome.answer.status == "errored":
        yield "meets errors that it did not foresee"
    elif "safe" in outcome.notes:
        yield from first(ACCEPTS, case)
    if "precise" in outcome.notes:
        yield "rejects with another code"
    if "bounded" in outcome.notes:
        yield ENDS["memory"]
    if "correct" in outcome.notes and "towards zero" in outcome.notes["correct"]:
        yield ROUNDS_DOWN
    elif "correct" in outcome.notes and outcome.answer.status != "errored":
        yield from first(WRONG, case)
    if "multiplied" in outcome.notes:
        yield "multiplies less precisely than it states, or wrongly"
    if "written" in outcome.notes:
        yield "writes repositories that do not conform"


def first(table: dict[str, list[str]], case: str) -> Iterable[str]:
    """The name of the first entry with a glob for the case, if there is one."""
    return [name for name, globs in table.items() if any(fnmatchcase(case, glob) for glob in globs)][:1]


def weaknesses(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Name -> the ids of the cases that show it, most cases first."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        for name in names(outcome):
            found.setdefault(name, []).append(outcome.case.id)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
