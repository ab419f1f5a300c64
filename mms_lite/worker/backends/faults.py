"""What frameworks say when they fail, made fit for users: one line, without source files and folders.

Apart from the backends because each framework has only its own noise; what remains is treated alike.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mms_lite.errors import OutOfMemory

_LONGEST_REASON = 500  # characters
_NO_MEMORY = re.compile(
    r"failed to allocate|can't allocate|out of memory|insufficient memory|bad_alloc|bad allocation"
    r"|STATUS_ALLOC_FAILED|CL_OUT_OF|MEM_OBJECT_ALLOCATION",
    re.I,
)
_FOLDERS = re.compile(r"""(?<=["'])/(?!/)[^"'\n]*/|(?<![\w./-])/(?!/)[^\s"':(),]*/""")  # of an absolute path


def reason(
    error: BaseException, noise: re.Pattern[str], *, folder: Path | None = None, most_lines: int | None = None
) -> str:
    """Return what an error says, as one line.

    `noise` matches what tells of the framework itself, and is left out; so are folders, of which
    `folder` is the model's. Of the lines that remain the first `most_lines` count.
    """
    told = noise.sub("", str(error))
    if folder is not None:
        told = told.replace(f"{folder}/", "").replace(str(folder), "the archive")
    told = _FOLDERS.sub(_without_own, told)
    lines = [line for line in told.splitlines() if line.strip()]
    return " ".join(" ".join(lines[:most_lines]).split())[:_LONGEST_REASON] or type(error).__name__


def raise_if_no_memory(error: BaseException, who: str) -> None:
    """Raise OutOfMemory, saying `who` ran out of it, where that is what an error means."""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        raise OutOfMemory(f"{who} ran out of memory") from error


def _without_own(folders: re.Match[str]) -> str:
    """Return nothing for folders of this machine; nodes of ONNX models are called `/encoder/Gather`, too."""
    root = "/" + folders[0].split("/")[1]
    return "" if os.path.exists(root) else folders[0]
