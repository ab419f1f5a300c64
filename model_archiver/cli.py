"""The `model-archiver` command: MMS's options, messages and exit codes, and what packs bare model files."""

import argparse
import difflib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from model_archiver import content, inspection
from model_archiver.manifest import DEFAULT_HANDLER, READY_MADE, Manifest, ManifestError, ManifestModel
from model_archiver.model_files import BACKENDS, collect, known_files
from model_archiver.packing import ArchiveFormat, Member, Packed, PackError, pack

_YELLOW, _PLAIN = "\033[93m", "\033[0m"
_USAGE = """model-archiver --model-name NAME --model-path FOLDER --handler HANDLER [options]
       model-archiver --model-name NAME --model-file FILE [--handler HANDLER] [options]
       model-archiver inspect [--json] ARCHIVE
       model-archiver verify ARCHIVE"""
# An abbreviation that fits one of MMS's options alone means it, whatever else begins like it.
_MMS_OPTIONS = (
    "--help",
    "--model-name",
    "--model-path",
    "--handler",
    "--runtime",
    "--export-path",
    "--archive-format",
    "--force",
    "--convert",
    "--version",
)
_OUR_OPTIONS = (
    "--model-file",
    "--backend",
    "--labels",
    "--handler-config",
    "--sample",
    "--extra-file",
    "--model-version",
    "--description",
)
# What people call a backend, and what they mean.
_ALIASES = {
    "onnx": "onnxruntime",
    "ov": "openvino",
    "cv2": "opencv",
    "pytorch": "torch",
    "tensorflow": "openvino or opencv",
    "tf": "openvino or opencv",
}
_MAX_VERSION = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack a model as the arguments say, or run a verb; return the exit code.

    Raises:
        SystemExit: 2 for arguments that cannot be read, 0 after --help and --version.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in inspection.VERBS:
        return inspection.main(words)
    given = _read(words)
    try:
        packed = _pack(given)
    except PackError as err:
        _report("ERROR", str(err))
        return 1
    except OSError as err:
        _report("ERROR", f"{err.filename}: {err.strerror or err}")
        return 1
    if given.model_file:
        _say_what_was_packed(packed, given)
    return 0


def _pack(given: argparse.Namespace) -> Packed:
    """Pack; of a call that MMS lacks the warnings come after success: an error means nothing was replaced."""
    manifest, added = _manifest(given)
    held: list[str] = []
    is_ours = given.model_file or given.handler in READY_MADE
    packed = pack(
        given.model_path,
        manifest,
        added=added,
        export_path=given.export_path,
        archive_format=ArchiveFormat(given.archive_format),
        force=given.force,
        convert=given.convert,
        warn=held.append if is_ours else _warn,
    )
    for message in held:
        _warn(message)
    return packed


def _say_what_was_packed(packed: Packed, given: argparse.Namespace) -> None:
    model, records = packed.manifest.model, packed.manifest.files.values()
    path = packed.path.name if given.export_path is None else str(packed.path)
    size = _in_units(sum(record.bytes for record in records))
    files = inspection.count(len(records))
    inspection.say(f"{path}: {files}, {size}, {model.backend}, handler {model.handler}")
    if given.archive_format != ArchiveFormat.TGZ.value:  # which mms-lite does not load
        inspection.say(f"Try it: mms-lite check {shlex.quote(path)}")


def _in_units(size_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def _read(words: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    given, unknown = parser.parse_known_args([_written_out(word) for word in words])
    if given.model_file:
        if given.convert:
            parser.error("argument -c/--convert: not allowed with argument --model-file")
    else:
        for option in ("backend", "labels", "handler_config", "sample", "extra_file"):
            if getattr(given, option) not in (None, []):
                parser.error(f"argument --{option.replace('_', '-')}: only with argument --model-file")
    hint = _hint(unknown, any_option=bool(given.model_file))
    if hint:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; did you mean {hint}?")
    required = ("model_name",) if given.model_file else ("model_name", "model_path", "handler")
    missing = [f"--{name.replace('_', '-')}" for name in required if getattr(given, name) is None]
    if missing == ["--model-name", "--model-path", "--handler"]:
        parser.error(
            "the following arguments are required: --model-name, and --model-file (a model file) "
            "or --model-path with --handler (code)"
        )
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return given


def _hint(unknown: Sequence[str], *, any_option: bool) -> str | None:
    """Return the option that an unknown one is like; without `any_option` one that MMS lacks."""
    for word in unknown:
        typed = word.partition("=")[0]
        near = difflib.get_close_matches(typed, (*_OUR_OPTIONS, *_MMS_OPTIONS), 1, 0.8)
        if typed.startswith("-") and near and (any_option or near[0] in _OUR_OPTIONS):
            return near[0]
    return None


def _backend(word: str) -> str:
    if word in BACKENDS:
        return word
    near = difflib.get_close_matches(word.lower(), BACKENDS, 1, 0.8)
    meant = _ALIASES.get(word.lower()) or (near[0] if near else None)
    hint = f"; did you mean {meant}?" if meant else ""
    raise argparse.ArgumentTypeError(f"invalid choice: {word!r} (choose from {', '.join(BACKENDS)}){hint}")


def _written_out(word: str) -> str:
    typed, equals, value = word.partition("=")
    fitting = [option for option in _MMS_OPTIONS if option.startswith(typed)]
    if len(typed) > len("--") and len(fitting) == 1:
        return fitting[0] + equals + value
    return word


def _manifest(given: argparse.Namespace) -> tuple[Manifest, list[Member]]:
    """Return what is written of the model, and the files that are packed besides --model-path.

    Raises:
        PackError: a file, the version or the handler config cannot be used.
        OSError: a file or folder cannot be read.
    """
    model = ManifestModel(
        name=given.model_name,
        handler=given.handler,
        description=given.description,
        version=_checked_version(given.model_version),
    )
    added: list[Member] = []
    if given.model_file:
        model, added = _with_files(model, given)
    manifest = Manifest(runtime=given.runtime, model=model)
    if model.description is not None:
        _check_readable(manifest)
    return manifest, added


def _with_files(model: ManifestModel, given: argparse.Namespace) -> tuple[ManifestModel, list[Member]]:
    files = collect(given.model_file, backend=given.backend)
    labels = [_member(path) for path in [given.labels] if path is not None]
    samples = [_member(path, folder="samples/") for path in given.sample]
    extra = [_member(path) for path in given.extra_file]
    _check_contents(labels, samples, extra)
    handler = model.handler or DEFAULT_HANDLER
    model = replace(
        model,
        handler=handler,
        description=model.description
        or f"{files.names[0]} served by {files.backend} with the handler {handler}",
        backend=files.backend,
        model_files=files.names,
        labels=labels[0].name if labels else None,
        handler_config=_handler_config(given.handler_config),
        samples=tuple(dict.fromkeys(sample.name for sample in samples)),
    )
    return model, [*files.members, *labels, *samples, *extra]


def _check_readable(manifest: Manifest) -> None:
    """Refuse what could be written but no reader would take: NaN in the config, text that is not Unicode."""
    try:
        Manifest.parse(manifest.to_json())
    except ManifestError as err:
        raise PackError(str(err)) from err


def _member(path: str, *, folder: str = "") -> Member:
    return Member(folder + os.path.basename(path), path)


def _check_contents(labels: list[Member], samples: list[Member], extra: list[Member]) -> None:
    for each in labels:
        content.check_labels(each.path)
    for each in samples:
        content.check(each.path, content.anything)
    for each in extra:
        content.check(each.path, content.anything, may_be_empty=True)


def _checked_version(version: str | None) -> str | None:
    if version is None:
        return None
    # What the server asks of a version: a path names it.
    if (
        not 0 < len(version) <= _MAX_VERSION
        or not version.isprintable()
        or "/" in version
        or version == "invoke"
    ):
        raise PackError(
            f"A model version has 1 to {_MAX_VERSION} printable characters, none of them a '/', "
            "and is not 'invoke'."
        )
    return version


def _handler_config(value: str | None) -> Mapping[str, Any] | None:
    """Read --handler-config: a JSON object, or the path of a file that holds one."""
    if value is None:
        return None
    inline = value.lstrip().startswith("{")
    where, text = ("The handler config", value) if inline else (value, content.read_text(value))
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise PackError(f"{where} is not valid JSON: {err}.") from err
    if not isinstance(config, dict):
        raise PackError(f"{where} is not a JSON object.")
    return config


def export_main() -> int:
    """Say what took the place of `multi-model-export`, the command of MMS 0.x; return the exit code."""
    print(
        f"{_YELLOW}multi-model-export is no longer supported.\n"
        f"Please use model-archiver to create 1.0 model archive.{_PLAIN}"
    )
    return 0


def _warn(message: str) -> None:
    _report("WARNING", message)


def _report(level: str, message: str) -> None:
    print(f"{level} - {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model-archiver",
        usage=_USAGE,
        description="Pack a model into an archive: a folder with a handler, or a model file without code.\n"
        "`inspect` shows what is in an archive, `verify` checks every byte of it.",
        epilog="Model files, with the backends that load them, the one that is guessed first:\n"
        + known_files(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-name", metavar="NAME", help="name of the model and of the output file or folder")
    add("--model-path", metavar="FOLDER", help="folder with the model's files")
    add(
        "--handler",
        help="entry point: 'module', 'module:function', 'file.py:function'; "
        f"for a model file one of {', '.join(READY_MADE)} too (default: {DEFAULT_HANDLER})",
    )
    add(
        "--runtime",
        choices=["python", "python2", "python3"],
        default="python",
        help="interpreter that runs the handler; 'python', the default, is the server's own",
    )
    add("--export-path", metavar="FOLDER", help="existing folder for the output; default: the current folder")
    add(
        "--archive-format",
        choices=["tgz", "no-archive", "default"],
        default="default",
        help="'default': NAME.mar, for the server; 'tgz': NAME.tar.gz, for SageMaker; 'no-archive': a folder",
    )
    add("-f", "--force", action="store_true", help="replace an existing output")
    add("-c", "--convert", action="store_true", help="accepted as by MMS; ONNX is not converted to MXNet")
    add("--model-version", metavar="VERSION", help="version under which the server offers the model")
    add("--description", metavar="TEXT", help="what the model is, in words")
    add("--version", action="version", version=f"model-archiver {_version()}")
    _add_model_file_options(parser)
    return parser


def _add_model_file_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models without code").add_argument
    add(
        "--model-file",
        metavar="FILE",
        action="append",
        help="model file, or the folder of a SavedModel; the first is the primary one (repeatable)",
    )
    add(
        "--backend",
        type=_backend,
        choices=BACKENDS,
        help="what loads the model file; default: guessed from it",
    )
    add("--labels", metavar="FILE", help="names of the classes, one a line, or a .json list")
    add("--handler-config", metavar="FILE-OR-JSON", help="settings of the handler: a JSON object or its file")
    add(
        "--sample",
        metavar="FILE",
        action="append",
        default=[],
        help="an input to try the model with (repeatable)",
    )
    add(
        "--extra-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a file that the handler needs, as tokenizer.json (repeatable)",
    )


def _version() -> str:
    try:
        return version("mms-lite")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"
