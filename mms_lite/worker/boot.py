"""The first lines of a worker process, run by path: `python boot.py --fd N --parent PID ...`.

It makes `mms_lite` importable and nothing else of the server's environment, ties the process's life to its
parent's, and hands over to the loop. The model's folder joins `sys.path` only when everything that the
worker itself needs is imported, so a `queue.py` or `json.py` of a model cannot break the start.
A model's `runtime` may name any interpreter: even Python 2 can read this file, and so say what it lacks.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - see above
    sys.exit("the model's runtime is Python {}.{}; workers need 3.10 or newer".format(*sys.version_info))

import importlib.util
import os
import signal
import socket

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMPAT = os.path.join(PACKAGE, "worker", "compat")
_PR_SET_PDEATHSIG = 1


def _import_package():
    # type: () -> None
    """Put `mms_lite` into `sys.modules` from this file's place, whatever `sys.path` says."""
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.join(PACKAGE, "worker")]
    spec = importlib.util.spec_from_file_location(
        "mms_lite", os.path.join(PACKAGE, "__init__.py"), submodule_search_locations=[PACKAGE]
    )
    if spec is None or spec.loader is None:
        raise ImportError("cannot read the package at " + PACKAGE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mms_lite"] = module
    spec.loader.exec_module(module)


def _die_with(parent):
    # type: (int) -> None
    """Ask the kernel to end this process with its parent (Linux), and check that the parent still lives."""
    if sys.platform == "linux":
        try:
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        except (ImportError, OSError, AttributeError):
            pass  # the closed socket ends the loop all the same
    if os.getppid() != parent:
        raise SystemExit(0)


def enter_model_folder(path, handler, scratch):
    # type: (str, str, str | None) -> None
    """Put `path`, the handler's folder and the `mms` names on `sys.path`, and make `path` the working folder.

    A model of a repository has a `scratch`, which is made, as working folder: it shall write nothing beside
    its files. Its `path` comes last, as in Triton: what is installed goes before a file of the same name.
    """
    given = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    rest = [p for p in sys.path if p not in given]
    if scratch is not None:
        from mms_lite.worker import sources

        os.makedirs(scratch, exist_ok=True)
        os.chdir(scratch)
        sources.keep_no_bytecode(os.path.dirname(path))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # for processes that the model starts
        sys.path[:] = given + rest
        sys.path.insert(len(given), COMPAT)
        sys.path.append(path)
        return
    os.chdir(path)
    folder = os.path.dirname(handler.partition(":")[0])
    own = [os.path.join(path, folder)] if folder else []
    sys.path[:] = own + given + [path, COMPAT] + rest


def main():
    # type: () -> int
    """Run the worker; return its exit code."""
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    _die_with(int(arguments["--parent"]))
    connection = socket.socket(fileno=int(arguments["--fd"]))
    connection.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the server's to handle
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    _import_package()
    from mms_lite import memory, shared
    from mms_lite.transport import BlockingConnection, Marks
    from mms_lite.worker import loop

    memory.keep_freed()
    marks_fd = int(arguments["--marks-fd"])
    marks = Marks.map(marks_fd)
    os.close(marks_fd)
    bodies = None
    if "--bodies-fd" in arguments:
        bodies_fd = int(arguments["--bodies-fd"])
        bodies = shared.read_only(bodies_fd)
        os.close(bodies_fd)
    end = BlockingConnection(connection, int(arguments["--max-frame-bytes"]))
    return loop.run(end, marks, enter_model_folder, bodies)


if __name__ == "__main__":
    sys.exit(main())
