"""Runs that start a server anew: servers take turns, and what cannot be measured is a record, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from peers import FAILURES, PEERS, Peer

Run = Callable[[Peer], dict[str, Any]]


def records(
    workload: str, servers: Sequence[str], repeat: int, cells: Mapping[str, Run]
) -> Iterator[dict[str, Any]]:
    """Yield what each cell's run finds for each server, repetition by repetition."""
    for repetition, (cell, run), name in itertools.product(range(repeat), cells.items(), servers):
        place = {"workload": workload, "cell": cell, "server": name, "repetition": repetition}
        try:
            yield {**place, **run(PEERS[name])}
        except FAILURES as error:
            yield {**place, "error": str(error)[:500]}
