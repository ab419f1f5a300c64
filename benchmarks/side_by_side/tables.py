"""Write results of bench.py into docs/performance.md, between the marks of each workload.

    python benchmarks/side_by_side/tables.py benchmarks/results/*.json

Ratios are made within each repetition, in which the servers took turns, and only then summed up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import crash
import latency
import memory
import overload

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
OURS = "mms-lite"

_CLOSES = "closes the connection after each answer to ab, an HTTP/1.0 client that asks to keep it"

Record = Mapping[str, Any]
Value = Callable[[Record], Any]


def key(name: str) -> Value:
    """Return what reads a field of a record."""
    return lambda record: record.get(name)


def total(*names: str) -> Value:
    """Return what adds up fields of a record; None where it has none of them."""

    def value(record: Record) -> float | None:
        found = [record[name] for name in names if record.get(name) is not None]
        return sum(found) if found else None

    return value


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its value in one record, and one number for all repetitions, with or without quartiles."""

    title: str
    value: Value
    combine: Callable[[Sequence[float]], float] = statistics.median
    quartiles: bool = False

    def text(self, records: Iterable[Record]) -> str:
        """Return the cell for these records."""
        values = [value for value in map(self.value, records) if value is not None]
        if not values:
            return "-"
        return spread(values) if self.quartiles else number(self.combine(values))


@dataclass(frozen=True, slots=True)
class Table:
    """How a workload's records are shown; `ratios` are ours to each peer's."""

    columns: tuple[Column, ...]
    ratios: tuple[Column, ...] = ()
    case: str = "cell"  # the field that tells cases apart


def busy(record: Record) -> float | None:
    """Return in how much of the time from the first to the last batch the workers computed, in percent."""
    return 100 * record["busy_s"] / record["wall_s"] if record.get("wall_s") else None


def others_cpu(record: Record) -> float | None:
    """Return the CPU time of all processes but the workers, in percent of theirs."""
    share: float | None = record.get("others_share")
    return None if share is None else 100 * share


def module_table(module: ModuleType, *ratios: str) -> Table:
    """Return the table of a workload that names its own columns; their values have quartiles."""
    named: dict[str, str] = module.COLUMNS
    columns = {name: Column(title, key(name), quartiles=True) for name, title in named.items()}
    return Table(tuple(columns.values()), tuple(columns[name] for name in ratios))


SERVER_CPU = total("front_us", "worker_us", "other_us")
MODELS = Table(
    columns=(
        Column("images/s", key("rows_per_s"), quartiles=True),
        Column("of the bare loop's", key("ratio"), quartiles=True),
        Column("workers compute, % of the time", busy, quartiles=True),
        Column("between two batches, ms", key("gap_ms")),
        Column("images per batch", key("rows_per_batch")),
        Column("CPU of the rest, % of the workers'", others_cpu, quartiles=True),
        Column("p50 ms", key("p50_ms")),
        Column("p99 ms", key("p99_ms")),
        Column("failed", total("failed", "errors"), combine=sum),
    ),
    ratios=(Column("images/s", key("rows_per_s")), Column("of the bare loop's", key("ratio"))),
    case="workload",
)
TABLES = {
    "W0": Table(
        columns=(
            Column("requests/s", key("requests_per_s"), quartiles=True),
            Column("p50 ms", key("p50_ms")),
            Column("p99 ms", key("p99_ms")),
            Column("max ms", key("max_ms"), combine=max),
            Column("failed", total("failed", "not_2xx"), combine=sum),
            Column("CPU µs/request", SERVER_CPU, quartiles=True),
            Column("of it in front", total("front_us", "other_us")),
            Column("in workers", key("worker_us")),
        ),
        ratios=(Column("requests/s", key("requests_per_s")), Column("CPU per request", SERVER_CPU)),
    ),
    "W1": MODELS,
    "W2": MODELS,
    "W3": module_table(memory, "first_answer_s", "pss_mib"),
    "W4": module_table(overload),
    "W5": module_table(crash),
    "W6": Table(
        columns=(
            Column("requests/s", key("requests_per_s"), quartiles=True),
            Column("p50 ms", key("p50_ms")),
            Column("p99 ms", key("p99_ms")),
            Column("failed", total("failed"), combine=sum),
            Column("CPU µs/request", SERVER_CPU, quartiles=True),
            Column("of it in front", total("front_us", "other_us")),
            Column("in workers", key("worker_us")),
            Column("the client's", key("client_us")),
        ),
        ratios=(Column("requests/s", key("requests_per_s")), Column("CPU per request", SERVER_CPU)),
    ),
    "open": module_table(latency),
}


def number(value: float) -> str:
    """Return a figure with three digits that count, and all of those before the point."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == int(value) or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the median, and the quartiles in brackets where they say more."""
    low, median, high = (number(value) for value in quartiles(values))
    return median if low == high else f"{median} ({low}..{high})"


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the quartiles, the extremes counted in, with the median between; of one value, itself."""
    return [*values] * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")


def paired(records: Iterable[Record], value: Value, peer: str) -> list[float]:
    """Return ours / peer's of each repetition that has both."""
    by_repetition: dict[Any, dict[str, float]] = defaultdict(dict)
    for record in records:
        found = value(record)
        if found:
            by_repetition[record.get("run"), record.get("repetition")][record["server"]] = found
    pairs = by_repetition.values()
    return [pair[OURS] / pair[peer] for pair in pairs if OURS in pair and peer in pair]


def lines(table: Table, records: Sequence[Record]) -> Iterator[str]:
    """Yield a workload's tables as Markdown: the ratios, the figures, what could not be measured."""
    good = [record for record in records if "error" not in record]
    cases = _unique(record[table.case] for record in good if "repetition" in record)
    servers = _unique(record["server"] for record in [*good, *records])
    peers = [server for server in servers if server != OURS]
    for column in table.ratios if OURS in servers and peers else ():
        yield from _ratios(table, column, good, cases, peers)
    yield _row("", "server", *(column.title for column in table.columns))
    yield _row(*["---"] * (2 + len(table.columns)))
    for case in cases:
        for server in servers:
            of_it = [each for each in good if each.get(table.case) == case and each["server"] == server]
            if of_it:
                yield _row(case, server, *(column.text(of_it) for column in table.columns))
    yield from _notes(table, good, records)


def _ratios(
    table: Table, column: Column, records: Sequence[Record], cases: Iterable[str], peers: Sequence[str]
) -> Iterator[str]:
    yield _row(f"{column.title}: {OURS} /", *peers)
    yield _row(*["---"] * (1 + len(peers)))
    for case in cases:
        of_it = [record for record in records if record.get(table.case) == case]
        found = [paired(of_it, column.value, peer) for peer in peers]
        yield _row(case, *(spread(values) if values else "-" for values in found))
    yield ""


def _notes(table: Table, good: Iterable[Record], records: Iterable[Record]) -> Iterator[str]:
    """Yield what a reader must know of single servers: what failed, and who closes connections."""
    notes = [
        f"{server}: {_CLOSES}" for server in _unique(r["server"] for r in good if r.get("keep_alive") == 0)
    ]
    said: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if "error" in record:
            text = str(record["error"]).strip().splitlines()[0]
            said[record["server"], text].append(record.get(table.case, ""))
    for (server, text), cases in said.items():
        where = ", ".join(_unique(filter(None, cases)))
        notes.append(f"{server}{f' ({where})' if where else ''}: not measured: {text}")
    yield from ["", *(f"- {note}" for note in notes)] if notes else []


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def source(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence that says where and when figures were measured."""
    machine, servers = runs[-1]["machine"], runs[-1]["servers"]
    versions = ", ".join(f"{name} {version}" for name, version in servers.items())
    dates = sorted({run["date"][:10] for run in runs})
    return (
        f"{machine['cores']} cores of {machine['cpu']}, shared with the load generator; "
        f"Python {machine['python']}, kernel {machine['kernel']}; {versions}; {', '.join(dates)}. "
        "Medians, quartiles in brackets."
    )


def between(text: str, workload: str, content: str) -> str:
    """Return a page's text with the content between a workload's two marks.

    Raises:
        ValueError: the page does not have them.
    """
    begin, end = f"<!-- {workload} begin -->", f"<!-- {workload} end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no marks {begin} and {end}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write results of bench.py into docs/performance.md.")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    options = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    page = "" if options.print else PAGE.read_text(encoding="utf-8")
    for workload, table in TABLES.items():
        of_it = [run for run in runs if any(_is(record, workload) for record in run["records"])]
        records = [
            {**record, "run": index}
            for index, run in enumerate(of_it)
            for record in run["records"]
            if _is(record, workload)
        ]
        if not records:
            continue
        content = "\n".join([source(of_it), "", *lines(table, records)])
        if options.print:
            print(f"{workload}\n\n{content}\n")
        else:
            page = between(page, workload, content)
    if not options.print:
        PAGE.write_text(page, encoding="utf-8")


def _is(record: Record, workload: str) -> bool:
    return str(record["workload"]).partition(" ")[0] == workload


if __name__ == "__main__":
    sys.exit(main())
