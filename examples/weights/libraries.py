"""Say in one line what to install where a conversion lacks a library, before anything is fetched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

from .packages import FetchError

# The names of Debian and Ubuntu.
SYSTEM_PACKAGES = {
    "libgomp.so.1": "libgomp1",
    "libGL.so.1": "libgl1",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
}


def require(modules: Mapping[str, str]) -> None:
    """Import modules; each is mapped to what pip has to install for it.

    Raises:
        FetchError: if one of them cannot be imported.
    """
    for module, requirement in modules.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, AttributeError) as err:
            raise FetchError(advice(module, requirement, err)) from err


def advice(module: str, requirement: str, err: Exception) -> str:
    """Say what to install when a module cannot be imported."""
    if found := re.search(r"(\S+\.so[.\d]*): cannot open shared object file", str(err)):
        package = SYSTEM_PACKAGES.get(found[1])
        remedy = f"apt-get install {package}" if package else "install the system package that has it"
        return f"import {module} needs the system library {found[1]}: {remedy}"
    if "has no attribute 'bool'" in str(err):
        return f"import {module} needs an older numpy: pip install 'numpy<1.24'"
    return f"import {module} failed ({err}): pip install '{requirement}'"
