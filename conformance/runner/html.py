"""The report as one HTML page without external parts, for people."""

from __future__ import annotations

from html import escape
from string import Template
from typing import Any

from conformance.runner.protocol import Json
from conformance.runner.score import SCORES

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --good: #1a7f4b; --bad: #b3261e; --line: #8884; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #5fce95; --bad: #ff8f85; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; font-size: 1.7rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; }
.verdict { font-weight: 600; margin-top: .3rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.muted { opacity: .7; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; } td.bad { font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .3rem .8rem; }
details details { background: var(--soft); } summary { cursor: pointer; }
code { font: .88em ui-monospace, monospace; overflow-wrap: anywhere; } li { margin: .2rem 0; }
</style>
<h1>$name <span class="muted">$version</span></h1>
<p class="verdict $mood">$verdict</p>
<p>$facts</p>
<h2>Scores</h2>
<div class="wide"><table><tr><th>score<th class="n">given<th class="n">of<th>meaning</tr>$scores</table></div>
$weaknesses
$beyond
<h2>Areas</h2>
<div class="wide"><table><tr><th>area$heads</tr>$areas</table></div>
<h2>Cases</h2>
<p class="muted">Areas with failures are open; the cases that passed are one click further in.</p>
$cases
</html>
""")


def cell(count: dict[str, int] | None) -> str:
    if count is None:
        return '<td class="n muted">-'
    mood = "good" if count["passed"] == count["total"] else "bad"
    return f'<td class="n {mood}">{count["passed"]} / {count["total"]}'


def many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count != 1 else ''}"


def case_line(case: Json) -> str:
    """A case as a list item: what was answered, and why that is not enough."""
    what = f" ({case['operation']})" if case["operation"] != "load" else ""
    what += "" if case["grade"] is None else f", grade {case['grade']}"
    memory = "" if case["megabytes"] is None else f", {case['megabytes']:g} MiB"
    line = f"<li><code>{escape(case['id'])}</code>{what}: {escape(case['answer'][:300])}"
    line += f' <span class="muted">({case["seconds"]:.3f} s{memory})</span>'
    if case["notes"]:
        line += f'<br><span class="muted">{escape(case["reason"])}</span>'
    for score, note in case["notes"].items():
        why = "" if note == case["answer"] else f": {escape(note[:500])}"
        line += f'<br><span class="bad">not {escape(score)}</span>{why}'
    return line


def area_cases(area: str, cases: list[Json]) -> str:
    """The cases of an area: failures open to the eye, the rest folded."""
    failed = [case for case in cases if case["notes"]]
    others = [case for case in cases if not case["notes"]]
    count = f'<span class="bad">{many(len(failed), "failure")}</span> of {len(cases)}' if failed else str(len(cases))
    text = f"<details{' open' if failed else ''}><summary><b>{escape(area)}</b> {count}</summary>"
    text += f"<ul>{''.join(map(case_line, failed))}</ul>" if failed else ""
    if others:
        label = f"{len(others)} passed or not implemented"
        text += f"<details><summary>{label}</summary><ul>{''.join(map(case_line, others))}</ul></details>"
    return text + "</details>"


def page(report: dict[str, Any]) -> str:
    """The page of a report as run.as_json makes it."""
    about, totals, scores = report["implementation"], report["totals"], report["scores"]
    passed = many(totals["cases"], "case")
    beyond = report["beyond_duty"]
    facts = [
        f"Operations: {', '.join(about['operations'])}.",
        f"Not implemented: {', '.join(about['lacks'])}." if about["lacks"] else "Every feature is implemented.",
        f"{many(totals['crashes'], 'crash').replace('crashs', 'crashes')}, {totals['errored']} errored.",
        f"Products: grade {report['grade']['reached']} reached, {report['grade']['stated']} stated."
        if report["grade"]
        else "",
        "" if totals["memory_measured"] else "Memory was not measured.",
        f"{totals['seconds']:.0f} s.",
    ]
    by_area: dict[str, list[Json]] = {}
    for case in report["cases"]:
        by_area.setdefault("/".join(case["id"].split("/")[:2]), []).append(case)
    weak = "".join(
        f"<details><summary>{escape(found['name'])} <span class='muted'>({many(len(found['cases']), 'case')})</span>"
        f"</summary><p><code>{escape(', '.join(found['cases']))}</code></p></details>"
        for found in report["weaknesses"]
    )
    extra = ""
    if beyond["total"]:
        extra = "<p>Not a reader's duty: of the repositories that only validators must reject, "
        extra += f"{beyond['passed']} of {beyond['total']} were rejected.</p>"
    if beyond["accepted"]:
        extra += f"<details><summary>{len(beyond['accepted'])} were accepted</summary>"
        extra += f"<p><code>{escape(', '.join(beyond['accepted']))}</code></p></details>"
    return PAGE.substitute(
        beyond=extra,
        title=escape(f"tqformat conformance of {about['implementation']}"),
        name=escape(about["implementation"]),
        version=escape(about["version"]),
        mood="good" if report["passed"] else "bad",
        verdict=f"Passes all {passed}" if report["passed"] else f"Fails {totals['failed']} of {passed}",
        facts=escape(" ".join(filter(None, facts))),
        scores="".join(
            f"<tr><td class='{'good' if n['passed'] == n['total'] else 'bad'}'>{score}<td class='n'>{n['passed']}"
            f"<td class='n'>{n['total']}<td>{SCORES[score]}</tr>"
            for score, n in scores.items()
        ),
        weaknesses=f"<h2>In short</h2>{weak}" if weak else "",
        heads="".join(f'<th class="n">{score}' for score in scores),
        areas="".join(
            f"<tr><td>{escape(area)}{''.join(cell(counts.get(score)) for score in scores)}</tr>"
            for area, counts in report["areas"].items()
        ),
        cases="".join(area_cases(area, by_area[area]) for area in report["areas"]),
    )
