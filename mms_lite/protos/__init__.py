"""Messages of the protocols over gRPC: classes made from descriptor sets that `make protos` compiles.

In a pool of their own, under their real names: other libraries of the process (TensorFlow, tritonclient) may
define the same names in the default pool. Generated code would
refuse versions of protobuf older than its own.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_FAMILIES = {"inference.": "kserve", "tensorflow.": "tfserving", "google.": "tfserving", "grpc.": "grpc"}
_POOL = DescriptorPool()


@cache
def message(full_name: str) -> Any:
    """Return the class of a message, such as "inference.ModelInferRequest".

    Raises:
        KeyError: there is none of this name.
    """
    return GetMessageClass(_loaded(full_name).FindMessageTypeByName(full_name))


@cache
def files(service: str) -> list[bytes]:
    """Return the serialized FileDescriptorProtos of a service's file and all it imports, imports first.

    Raises:
        KeyError: there is no service of this name.
    """
    return with_imports(_loaded(service).FindServiceByName(service).file)


def with_imports(file: Any) -> list[bytes]:
    """Return a FileDescriptor and all it imports, serialized, each once and imports first."""
    found: dict[str, bytes] = {}

    def add(file: Any) -> None:
        for needed in file.dependencies:
            if needed.name not in found:
                add(needed)
        found[file.name] = file.serialized_pb

    add(file)
    return list(found.values())


def pool() -> Any:
    """Return the pool with every message: what json_format needs to write an Any."""
    for prefix in _FAMILIES:
        _loaded(prefix)
    return _POOL


def _loaded(name: str) -> Any:
    """Return the pool once it has what the name, or its beginning, belongs to."""
    for prefix, family in _FAMILIES.items():
        if name.startswith(prefix):
            _load(family)
    return _POOL


@cache
def _load(family: str) -> None:
    """Add a set to the pool; to add the same once more changes nothing, so threads need no lock."""
    content = resources.files(__name__).joinpath(f"{family}.fds").read_bytes()
    for file in FileDescriptorSet.FromString(content).file:
        _POOL.AddSerializedFile(file.SerializeToString())
