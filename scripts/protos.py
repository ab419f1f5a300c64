"""Make the descriptor sets of mms_lite/protos from its .proto files, and note of what they were made.

Needs grpcio-tools, which the server does not: `make protos` has it in an environment of its own.
"""

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "mms_lite" / "protos"


def compile_into(made: Path, family: Path) -> None:
    """Write the serialized FileDescriptorSet of a folder of .proto files and of all that they import."""
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    files = sorted(file.name for file in family.glob("*.proto"))
    options = [f"--proto_path={family}", f"--proto_path={well_known}", "--include_imports"]
    if protoc.main(["protoc", *options, f"--descriptor_set_out={made}", *files]) != 0:
        raise SystemExit(f"{family.name} cannot be compiled")


def checksums() -> str:
    """Return a line for sha256sum for every .proto file and every descriptor set."""
    files = sorted([*FOLDER.glob("*.fds"), *FOLDER.glob("*/*.proto")])
    sums = [(hashlib.sha256(file.read_bytes()).hexdigest(), file.relative_to(FOLDER)) for file in files]
    return "".join(f"{digest}  {name}\n" for digest, name in sums)


if __name__ == "__main__":
    for folder in sorted({file.parent for file in FOLDER.glob("*/*.proto")}):
        compile_into(folder.with_suffix(".fds"), folder)
    (FOLDER / "SHA256SUMS").write_text(checksums())
