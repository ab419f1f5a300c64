"""What a comparison came to: as lines for the terminal, and as docs/mms-side-by-side.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from difference import Finding, Intended, Verdict
from exchange import Answer
from servers import PEER, PEER_VERSION
from table import Case

import mms_lite

_CELL = 60
_LINE = 300
_HEAD = f"""<!-- make compat -->
# Side by side with Multi Model Server

`make compat` starts {PEER} {PEER_VERSION} and mms-lite {mms_lite.__version__} with the same model store
and settings, sends both the same bytes, and compares all that a client can see: status, reason, headers,
shape and values of the body, and what becomes of the connection. A difference that the list below does not
name fails the run, and so does a name on the list that no difference needs. The requests are in
[benchmarks/compat/cases](../benchmarks/compat/cases).

{{count}} {PEER} ran on {{java}}.

## Intended differences

The MMS reference is the project's notes on MMS: its source, and what it was seen to do. `*` is anything.

| id | what differs, MMS -> mms-lite | why | where it is said |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Compared:
    """A case with both servers' answers and what differs between them."""

    case: Case
    mms: Sequence[Answer]
    ours: Sequence[Answer]
    findings: Sequence[Finding]


def summary(compared: Sequence[Compared], verdict: Verdict) -> str:
    """Return the lines for the terminal: every difference that is not intended, then the count."""
    lines = []
    unlisted = set(verdict.unlisted)
    for each in compared:
        found = [finding for finding in each.findings if finding in unlisted]
        if found:
            lines.append(f"{each.case.id}: {_short(each.case.request)}")
            lines += [f"    {f.facet}: {_short(f.mms)}  ->  {_short(f.ours)}" for f in found]
    lines += [f"unused in the whitelist: {part}" for part in verdict.unused]
    lines.append(_count(compared, verdict))
    return "\n".join(lines)


def page(compared: Sequence[Compared], verdict: Verdict, whitelist: Sequence[Intended], java: str) -> str:
    """Return the report, in Markdown."""
    lines = _HEAD.format(count=_count(compared, verdict), java=java).splitlines()
    for entry in whitelist:
        facets = "<br>".join(_code(f"{f}: {p}") for f, ps in entry.facets.items() for p in ps)
        lines.append(f"| {entry.id} | {facets} | {entry.because} | {_cited(entry)} |")
    for group in dict.fromkeys(each.case.group for each in compared):
        lines += [
            "",
            f"## Cases: {group}",
            "",
            "| id | request | MMS | mms-lite | verdict |",
            "|---|---|---|---|---|",
        ]
        for each in (each for each in compared if each.case.group == group):
            cells = each.case.id, _code(each.case.request), _statuses(each.mms), _statuses(each.ours)
            lines.append(f"| {' | '.join(cells)} | {_verdict(each, verdict)} |")
    return "\n".join(lines) + "\n"


def _verdict(compared: Compared, verdict: Verdict) -> str:
    """Say same, or by which entries a case's differences are intended, or in which facets it differs."""
    entries = dict.fromkeys(verdict.intended[f] for f in compared.findings if f in verdict.intended)
    facets = [f.facet for f in compared.findings if f not in verdict.intended]
    told = [f"intended: {', '.join(entries)}"] if entries else []
    told += [f"**differs**: {', '.join(facets)}"] if facets else []
    return "; ".join(told) or "same"


def _cited(entry: Intended) -> str:
    cited = [f"MMS reference, {entry.reference}"] if entry.reference else []
    return "; ".join([*cited, f"[mms-compatibility.md](mms-compatibility.md), {entry.rows}"])


def _count(compared: Sequence[Compared], verdict: Verdict) -> str:
    requests = sum(each.case.requests for each in compared)
    same = sum(not each.findings for each in compared)
    wrong = len({finding.case for finding in verdict.unlisted})
    return (
        f"{requests} requests in {len(compared)} cases to each server: {same} cases the same, "
        f"{len(compared) - same - wrong} with intended differences only, {wrong} with others."
    )


def _statuses(answers: Sequence[Answer]) -> str:
    told = [str(answer.status) if answer.version else answer.ending for answer in answers]
    return ", ".join(
        f"{each} x {told.count(each)}" if told.count(each) > 1 else each for each in sorted(set(told))
    )


def _short(text: str) -> str:
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= _LINE else f"{shown[:_LINE]}..."


def _code(text: str) -> str:
    """Return text as a table's cell can hold it."""
    shown = text.encode("unicode_escape").decode() if not text.isprintable() else text
    cut = shown if len(shown) <= _CELL else f"{shown[: _CELL - 3]}..."
    return "`" + cut.replace("|", "\\|").replace("`", "'") + "`"
