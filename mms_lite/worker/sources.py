"""How Python files of a model are imported: from what they say now, never from bytecode kept beside them.

Python takes the bytecode of another file for that of this one where both have a length and a second of change
in common. Nor is anything written into a repository.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from types import CodeType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import PathEntryFinder


class _Source(SourceFileLoader):
    """Loads a file's source, which it compiles each time."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def import_file(name: str, path: str) -> ModuleType:
    """Import a file under a name.

    Raises:
        ImportError: it is not a Python file.
        BaseException: whatever its code raises.
    """
    loader = _Source(name, path) if path.endswith(".py") else None
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None or spec.loader is None:
        raise ImportError(f"{os.path.basename(path)} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)  # as an import statement would
        raise
    return module


def package(folder: str) -> str:
    """Make a folder a package, whose modules may import each other by `.name`, and return its name."""
    name = os.path.basename(folder)
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return name


def keep_no_bytecode(folder: str) -> None:
    """Have `import` find the modules below a folder so, too, from now on."""
    inside = os.path.join(folder, "")
    finder = FileFinder.path_hook(
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (_Source, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )

    def hook(path: str) -> PathEntryFinder:
        if not os.path.join(path, "").startswith(inside):
            raise ImportError(f"{path} is elsewhere", path=path)
        return finder(path)

    sys.path_hooks.insert(0, hook)
