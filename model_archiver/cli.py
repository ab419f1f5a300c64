"""The `model-archiver` command: options, messages and exit codes spelled as multi-model-server's."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from model_archiver.manifest import Manifest, ManifestModel
from model_archiver.packing import ArchiveFormat, PackError, pack

_YELLOW, _PLAIN = "\033[93m", "\033[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack a model as the arguments say; return the exit code.

    Raises:
        SystemExit: 2 for arguments that cannot be read, 0 after --help and --version.
    """
    given = _parser().parse_args(arguments)
    manifest = Manifest(
        runtime=given.runtime, model=ManifestModel(name=given.model_name, handler=given.handler)
    )
    try:
        pack(
            given.model_path,
            manifest,
            export_path=given.export_path,
            archive_format=ArchiveFormat(given.archive_format),
            force=given.force,
            convert=given.convert,
            warn=lambda message: _report("WARNING", message),
        )
    except PackError as err:
        _report("ERROR", str(err))
        return 1
    return 0


def export_main() -> int:
    """Say what took the place of `multi-model-export`, the command of MMS 0.x; return the exit code."""
    print(
        f"{_YELLOW}multi-model-export is no longer supported.\n"
        f"Please use model-archiver to create 1.0 model archive.{_PLAIN}"
    )
    return 0


def _report(level: str, message: str) -> None:
    print(f"{level} - {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model-archiver", description="Pack a folder with a model and its handler into a model archive."
    )
    add = parser.add_argument
    add("--model-name", required=True, help="name of the model and of the output file or folder")
    add("--model-path", required=True, help="folder with the model's files")
    add("--handler", required=True, help="entry point: 'module', 'module:function', 'file.py:function'")
    add(
        "--runtime",
        choices=["python", "python2", "python3"],
        default="python",
        help="interpreter that runs the handler; 'python', the default, is the server's own",
    )
    add("--export-path", help="existing folder for the output; default: the current folder")
    add(
        "--archive-format",
        choices=["tgz", "no-archive", "default"],
        default="default",
        help="'default': NAME.mar, for the server; 'tgz': NAME.tar.gz, for SageMaker; 'no-archive': a folder",
    )
    add("-f", "--force", action="store_true", help="replace an existing output")
    add("-c", "--convert", action="store_true", help="accepted as by MMS; ONNX is not converted to MXNet")
    add("--version", action="version", version=f"model-archiver {_version()}")
    return parser


def _version() -> str:
    try:
        return version("mms-lite")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"
