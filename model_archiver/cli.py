"""The `model-archiver` command: options, messages and exit codes spelled as multi-model-server's."""

import sys

import click

from model_archiver.manifest import Manifest, ManifestModel
from model_archiver.packing import ArchiveFormat, PackError, pack


def _report(level: str, message: str) -> None:
    click.echo(f"{level} - {message}", err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model-name", required=True, help="Name of the model and of the output file or folder.")
@click.option("--model-path", required=True, help="Folder with the model's files.")
@click.option(
    "--handler", required=True, help="Entry point: 'module', 'module:function', 'file.py:function'."
)
@click.option(
    "--runtime",
    type=click.Choice(["python", "python2", "python3"]),
    default="python",
    show_default=True,
    help="Interpreter that runs the handler; 'python' is the server's own.",
)
@click.option("--export-path", help="Existing folder for the output.  [default: the current folder]")
@click.option(
    "--archive-format",
    type=click.Choice([choice.value for choice in ArchiveFormat]),
    default=ArchiveFormat.MAR.value,
    show_default=True,
    help="'default': NAME.mar for the server. 'tgz': NAME.tar.gz for SageMaker. 'no-archive': a folder NAME.",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing output.")
@click.option("-c", "--convert", is_flag=True, help="Not supported: .onnx files are served directly.")
@click.version_option(package_name="mms-lite", prog_name="model-archiver")
def main(
    *,
    model_name: str,
    model_path: str,
    handler: str,
    runtime: str,
    export_path: str | None,
    archive_format: str,
    force: bool,
    convert: bool,
) -> None:
    """Pack a folder with a model and its handler into a model archive."""
    manifest = Manifest(runtime=runtime, model=ManifestModel(name=model_name, handler=handler))
    try:
        if convert:
            raise PackError("ONNX is not converted to MXNet here; .onnx files will be served directly.")
        pack(
            model_path,
            manifest,
            export_path=export_path,
            archive_format=ArchiveFormat(archive_format),
            force=force,
            warn=lambda message: _report("WARNING", message),
        )
    except PackError as err:
        _report("ERROR", str(err))
        sys.exit(1)
