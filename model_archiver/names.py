"""What a file in an archive may be called: one rule for readers, writers and the manifest.

Apart because the three import each other in one direction only.
"""

import re

MAX_COMPONENT_BYTES = 255
_MAX_PATH_BYTES = 1024
_FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\\\\\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")


def name_fault(name: str) -> str | None:
    """Say why an entry may not have this name (a relative path with slashes), or None if it may."""
    if _FORBIDDEN_CHARACTERS.search(name):
        return "its name has a backslash, a control character or a character that is not Unicode"
    if name.startswith("/") or _DRIVE.match(name):
        return "its name is an absolute path"
    if len(name.encode()) > _MAX_PATH_BYTES:
        return f"its name is longer than {_MAX_PATH_BYTES} bytes"
    for component in name.split("/"):
        if component in ("", ".", ".."):
            return "its name has an empty, '.' or '..' component"
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            return f"its name has a component longer than {MAX_COMPONENT_BYTES} bytes"
    return None
