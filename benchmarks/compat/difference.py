"""What differs between two answers, facet by facet, and which differences are intended.

A facet is one thing that a client can see: status, reason, shape, body, a header, how the connection ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tomllib
from exchange import Answer

WHITELIST = Path(__file__).parent / "whitelist.toml"
MAX_ENTRIES = 40
NONE = "none"

_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b")
# What no two servers say alike, in the texts of describe.
_MASKS = [
    (_UUID, "<uuid>"),
    (re.compile(r'"id": "[^"]+"'), '"id": "<worker>"'),
    (re.compile(r'"startTime": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"'), '"startTime": "<time>"'),
    (re.compile(r'"memoryUsage": \d+'), '"memoryUsage": 0'),
]
_APART = ("content-type", "connection", "content-length")  # facets of their own, or the body's
_EXCERPT = 40


@dataclass(frozen=True, slots=True)
class Finding:
    """One facet in which the answers to a case differ, with what each server shows."""

    case: str
    facet: str
    mms: str
    ours: str


@dataclass(frozen=True, slots=True)
class Intended:
    """An entry of the whitelist: of these cases, these facets differ like `MMS -> ours`, on purpose.

    Case ids, facets and both sides are patterns. `reference` is the section of the MMS reference that calls
    MMS's side a mistake, `rows` those of docs/mms-compatibility.md that tell users. What MMS does only
    `sometimes` may be unused.
    """

    id: str
    cases: tuple[str, ...]
    facets: Mapping[str, tuple[str, ...]]
    because: str
    reference: str
    rows: str
    sometimes: bool = False


@dataclass(slots=True)
class Verdict:
    """Which findings are intended, by which entry; which are not; and what of the whitelist is unused."""

    intended: dict[Finding, str] = field(default_factory=dict)
    unlisted: list[Finding] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True when every difference is intended and every entry needed."""
        return not self.unlisted and not self.unused


def read(path: Path = WHITELIST) -> list[Intended]:
    """Return the whitelist.

    Raises:
        ValueError: it has too many entries, or two of one id.
    """
    entries = []
    for row in tomllib.loads(path.read_text(encoding="utf-8")).get("difference", []):
        facets = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in row.pop("facets").items()}
        entries.append(Intended(cases=tuple(row.pop("cases")), facets=facets, **row))
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"the whitelist has {len(entries)} entries; {MAX_ENTRIES} are allowed")
    if len({entry.id for entry in entries}) < len(entries):
        raise ValueError("two entries of the whitelist have one id")
    return entries


def compare(case: str, mms: Sequence[Answer], ours: Sequence[Answer]) -> list[Finding]:
    """Return in which facets the answers to one case differ; the order of parallel answers means nothing."""
    found = {}
    for theirs, own in zip(sorted(mms, key=_rank), sorted(ours, key=_rank), strict=True):
        left, right = _facets(theirs), _facets(own)
        if theirs.status != own.status:  # the reason follows from it
            left.pop("reason", None)
            right.pop("reason", None)
        found.update(_bodies(_text(theirs), _text(own)))
        for facet in {**left, **right}:
            values = left.get(facet, NONE), right.get(facet, NONE)
            if values[0] != values[1]:
                found[facet] = values
    return [Finding(case, facet, *values) for facet, values in found.items()]


def judge(findings: Iterable[Finding], whitelist: Iterable[Intended]) -> Verdict:
    """Hold findings against the whitelist; of each entry every part must be needed."""
    entries = list(whitelist)
    verdict = Verdict()
    used: set[tuple[str, ...]] = set()
    for finding in findings:
        marks = [mark for entry in entries for mark in _marks(finding, entry)]
        if marks:
            used.update(marks)
            verdict.intended[finding] = marks[0][0]
        else:
            verdict.unlisted.append(finding)
    for entry in (each for each in entries if not each.sometimes):
        parts = [(entry.id, "cases", pattern) for pattern in entry.cases]
        parts += [
            (entry.id, facet, pattern) for facet, patterns in entry.facets.items() for pattern in patterns
        ]
        verdict.unused += [f"{part[0]}: {part[1]} {part[2]!r}" for part in parts if part not in used]
    return verdict


def _marks(finding: Finding, entry: Intended) -> Iterator[tuple[str, str, str]]:
    """Yield the parts of the entry that allow the finding: patterns of cases, and of the facet."""
    cases = [pattern for pattern in entry.cases if fnmatchcase(finding.case, pattern)]
    named = ((facet, each) for facet, patterns in entry.facets.items() for each in patterns)
    allowed = [each for each in named if fnmatchcase(finding.facet, each[0]) and _fits(finding, each[1])]
    if cases and allowed:
        yield from ((entry.id, "cases", pattern) for pattern in cases)
        yield from ((entry.id, facet, pattern) for facet, pattern in allowed)


def _fits(finding: Finding, pattern: str) -> bool:
    mms, _, ours = pattern.partition(" -> ")
    return fnmatchcase(finding.mms, mms) and fnmatchcase(finding.ours, ours)


def _rank(answer: Answer) -> tuple[int, bytes]:
    return answer.status, answer.body


def _facets(answer: Answer) -> dict[str, str]:
    """Return what can be compared as text; what is absent is left out."""
    if not answer.version:
        return {"status": answer.ending}
    facets = {"status": str(answer.status), "version": answer.version, "ending": answer.ending}
    if answer.reason:
        facets["reason"] = answer.reason
    if answer.interim:
        facets["interim"] = " ".join(map(str, answer.interim))
    for name, value in answer.headers:
        facet = name.lower() if name.lower() in _APART else f"header:{name.lower()}"
        masked = _UUID.sub("<uuid>", value)
        facets[facet] = f"{facets[facet]}, {masked}" if facet in facets else masked
    facets.pop("content-length", None)
    return facets


def _text(answer: Answer) -> str:
    """Return the body as text, without what differs from run to run."""
    text = answer.body.decode("utf-8", "backslashreplace")
    if request_id := answer.header("x-request-id"):
        text = text.replace(request_id, "<request-id>")
    for pattern, word in _MASKS:
        text = pattern.sub(word, text)
    return text


def _bodies(mms: str, ours: str) -> dict[str, tuple[str, str]]:
    """Compare bodies: as JSON by shape, values and layout; as text where one is no JSON."""
    if mms == ours:
        return {}
    try:
        left, right = dict(_leaves(_container(mms))), dict(_leaves(_container(ours)))
    except ValueError:
        return {"body": (mms or NONE, ours or NONE)}
    found = {}
    shapes = {f"{path}:{type(value).__name__}" for path, value in left.items()}
    others = {f"{path}:{type(value).__name__}" for path, value in right.items()}
    if shapes != others:
        found["shape"] = _listed(shapes - others), _listed(others - shapes)
    paths = [p for p in left if p in right and type(left[p]) is type(right[p]) and left[p] != right[p]]
    if paths:
        sides = (_listed(f"{p}={side[p]}" for p in paths) for side in (left, right))
        found["body"] = (next(sides), next(sides))
    return found or {"layout": _first_difference(mms, ours)}


def _container(text: str) -> Any:
    value = json.loads(text)
    if not isinstance(value, (dict, list)):
        raise ValueError("a scalar is compared as text")
    return value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths of all values, containers included with an empty value."""
    if isinstance(value, dict):
        yield path or "$", {}
        for key, each in value.items():
            yield from _leaves(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        yield path or "$", []
        for index, each in enumerate(value):
            yield from _leaves(each, f"{path}[{index}]")
    else:
        yield path, value


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts)) or NONE


def _first_difference(mms: str, ours: str) -> tuple[str, str]:
    pairs = enumerate(zip(mms, ours, strict=False))
    start = next((at for at, (a, b) in pairs if a != b), min(len(mms), len(ours)))
    return repr(mms[start : start + _EXCERPT]), repr(ours[start : start + _EXCERPT])
