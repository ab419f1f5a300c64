"""Requests for every method of every gRPC service: valid ones, and ones whose fields make no sense.

Apart from the attack so that what is asked is found in one place. Tensors have a grammar of their own.
"""

import math
import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from wire_format import mutated

from mms_lite import protos

Shape = list[int]

SERVICES = (
    "inference.GRPCInferenceService",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
_MANY_INPUTS = 0.003  # how likely: they take long to make
LOADED_BY_HAND = "mymodel"  # the one model that is loaded and unloaded
# KServe v2's name: bytes of an element, the field of InferTensorContents, TensorFlow's DataType and field
DATATYPES: dict[str, tuple[int, str, int, str]] = {
    "BOOL": (1, "bool_contents", 10, "bool_val"),
    "UINT8": (1, "uint_contents", 4, "int_val"),
    "UINT16": (2, "uint_contents", 17, "int_val"),
    "UINT32": (4, "uint_contents", 22, "uint32_val"),
    "UINT64": (8, "uint64_contents", 23, "uint64_val"),
    "INT8": (1, "int_contents", 6, "int_val"),
    "INT16": (2, "int_contents", 5, "int_val"),
    "INT32": (4, "int_contents", 3, "int_val"),
    "INT64": (8, "int64_contents", 9, "int64_val"),
    "FP16": (2, "fp32_contents", 19, "half_val"),
    "BF16": (2, "fp32_contents", 14, "half_val"),
    "FP32": (4, "fp32_contents", 1, "float_val"),
    "FP64": (8, "fp64_contents", 2, "double_val"),
    "BYTES": (0, "bytes_contents", 7, "string_val"),
}
_ODD_DATATYPES = ("", "FP31", "fp32", "TYPE_FP32", "STRING", "BYTES\0", "\U0001f600", "X" * 5000)
_ODD_NAMES = (
    "",
    "\0",
    "a\0b",
    "/",
    "..",
    "body",
    "größer",
    "\U0001f600",
    "x" * 129,
    "x" * 100_000,
    "-1",
    "{}",
)
_ODD_LENGTHS = (0, -1, -(2**63), 2**31, 2**32, 2**62, 2**63 - 1, 3037000500)
_ODD_VERSIONS = ("", "-1", "0", "1", "2", "3", "01", "1.0", "9" * 30, "one", "\0", "\u0661")
_ODD_NUMBERS: dict[str, tuple[Any, ...]] = {
    "float": (0.0, -1.5, math.inf, -math.inf, math.nan, 1e308),
    "int": (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)),
    "unsigned": (0, 1, 255, 256, 65536, 2**32 - 1, 2**64 - 1),
}
_PARAMETERS = (
    *("timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"),
    *("triton_enable_empty_final_response", "triton_x", "classification", "binary_data_size"),
    *("shared_memory_region", "shared_memory_offset", "content_type", "config", "unload_dependents", "own"),
)
_CONFIGS = (
    *(
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"max_batch_size": 99999999999}',
        '{"max_batch_size": -1}',
        '{"input": "x"}',
    ),
    *('{"backend": "none"}', '{"name": "other"}', '{"input": [{"name": "a", "data_type": "TYPE_X"}]}'),
    *('{"parameters": {"a": 1}}', '{"version_policy": {"specific": {"versions": [77]}}}', "[" * 5000),
)
_FILES = (
    "1/model.py",
    "../../escaped",
    "/tmp/../escaped",
    "1/\0",
    "",
    "x" * 5000,
    "1",
    "config.pbtxt/inner",
)


@cache
def methods() -> dict[str, Any]:
    """Return the descriptor of each method by its path."""
    pool = protos.pool()
    services = [pool.FindServiceByName(name) for name in SERVICES]
    return {f"/{service.full_name}/{each.name}": each for service in services for each in service.methods}


class Requests:
    """Makes requests that ask `models` of a server: name -> datatype, shape and names of its inputs."""

    def __init__(self, random: Random, models: dict[str, tuple[str, Shape, tuple[str, ...]]]) -> None:
        self._random = random
        self._models = models

    def any(self, path: str) -> bytes:
        """Return a request for a method: noise, valid, odd, or one of the last two broken on the wire."""
        random, one = self._random, self._random.random()
        if one < 0.08:
            return random.randbytes(random.choice((0, 1, 2, 5, 30, 300, 5000, 200_000)))
        message = self._sensible(path) if one < 0.6 else self._odd(path)
        return message if random.random() < 0.4 else mutated(random, message)

    def _sensible(self, path: str) -> bytes:
        name = self._random.choice(list(self._models))
        kind = methods()[path].input_type.full_name
        if kind == "inference.ModelInferRequest":
            return self._infer(name, odd=0.0)
        if kind == "tensorflow.serving.PredictRequest":
            return self._predict(name, odd=0.0)
        asked = protos.message(kind)()
        fields = asked.DESCRIPTOR.fields_by_name
        if "Repository" in kind and "model_name" in fields:
            asked.model_name = LOADED_BY_HAND
        elif "model_spec" in fields:
            asked.model_spec.name = name
        elif "name" in fields and "SharedMemory" not in kind:
            asked.name = name
        if "metadata_field" in fields:
            asked.metadata_field.append("signature_def")
        if "file_containing_symbol" in fields:
            asked.file_containing_symbol = self._random.choice(SERVICES)
        return bytes(asked.SerializeToString())

    def _odd(self, path: str) -> bytes:
        random, name = self._random, self._random.choice(list(self._models))
        kind = methods()[path].input_type.full_name
        if kind == "inference.ModelInferRequest" and random.random() < 0.9:
            return self._infer(name, odd=random.choice((0.02, 0.1, 0.5)))
        if kind == "tensorflow.serving.PredictRequest" and random.random() < 0.9:
            return self._predict(name, odd=random.choice((0.02, 0.1, 0.5)))
        asked = protos.message(kind)()
        self._fill(asked, 0)
        if kind == "inference.RepositoryModelLoadRequest":
            self._load(asked)
        elif kind == "inference.RepositoryModelUnloadRequest":
            asked.model_name = random.choice((LOADED_BY_HAND, *_ODD_NAMES))
        return bytes(asked.SerializeToString())

    def _load(self, asked: Any) -> None:
        random = self._random
        asked.Clear()
        asked.model_name = random.choice((LOADED_BY_HAND, *_ODD_NAMES))
        if random.random() < 0.7:
            asked.parameters["config"].string_param = random.choice(_CONFIGS)
        for file in random.sample(_FILES, random.choice((0, 1, 2))):
            asked.parameters[f"file:{file}"].bytes_param = random.randbytes(50)

    def _fill(self, message: Any, depth: int) -> None:
        """Fill the fields of a message of any type."""
        random = self._random
        for field in message.DESCRIPTOR.fields:
            if random.random() < 0.4:
                continue
            count = random.choice((0, 1, 1, 2, 30)) if field.is_repeated else 1
            entry = field.message_type is not None and field.message_type.GetOptions().map_entry
            if field.message_type is None:
                values = [self._scalar(field) for _ in range(count)]
                if field.is_repeated:
                    getattr(message, field.name).extend(values)
                else:
                    setattr(message, field.name, values[0])
            elif entry:
                self._fill_map(getattr(message, field.name), field.message_type, count, depth)
            elif depth < 6:
                targets = getattr(message, field.name)
                for _ in range(count):
                    target = targets.add() if field.is_repeated else targets
                    target.SetInParent()
                    self._fill(target, depth + 1)

    def _fill_map(self, entries: Any, entry: Any, count: int, depth: int) -> None:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for _ in range(count):
            name = self._scalar(key)
            if value.message_type is None:
                entries[name] = self._scalar(value)
            elif depth < 6:
                self._fill(entries[name], depth + 1)

    def _scalar(self, field: Any) -> Any:
        random, kind = self._random, field.cpp_type
        if kind == field.CPPTYPE_STRING:
            is_bytes = field.type == field.TYPE_BYTES
            return random.randbytes(random.choice((0, 1, 40))) if is_bytes else self._name(0.7)
        if kind == field.CPPTYPE_BOOL:
            return random.random() < 0.5
        if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
            return random.choice(_ODD_NUMBERS["float"][:5])
        if kind == field.CPPTYPE_ENUM:
            return random.choice([each.number for each in field.enum_type.values])
        wide = kind in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
        signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
        bits = 64 if wide else 32
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        return random.choice((0, 1, 2, low, high))

    def _name(self, odd: float) -> str:
        random = self._random
        if random.random() < odd:
            return random.choice(_ODD_NAMES)
        return random.choice((*self._models, "INPUT0", "OUTPUT0", "words", "body", "no_such_thing"))

    # Inference

    def _infer(self, name: str, *, odd: float) -> bytes:
        """Return a ModelInferRequest; `odd` is how likely each thing in it is not what it should be."""
        random, (datatype, shape, inputs) = self._random, self._models[name]
        asked = protos.message("inference.ModelInferRequest")()
        asked.model_name = name if random.random() >= odd / 4 else self._name(1)
        if random.random() < odd:
            asked.model_version = random.choice(_ODD_VERSIONS)
        if random.random() < 0.5:
            asked.id = "i" if random.random() >= odd else random.choice(_ODD_NAMES)
        explicit = random.random() < 0.4 and datatype not in ("FP16", "BF16")
        names = self._inputs(inputs, odd)
        inner = odd if len(names) < 10 else 0.0
        for each in names:
            self._add_input(asked, each, datatype, self._shape(shape, inner), odd=inner, explicit=explicit)
        for _ in range(random.choice((0, 0, 1, 2)) if odd else 0):
            self._parameterise(asked.outputs.add(name=self._name(odd)).parameters, odd)
        self._parameterise(asked.parameters, odd)
        return bytes(asked.SerializeToString())

    def _inputs(self, names: tuple[str, ...], odd: float) -> list[str]:
        random, found = self._random, list(names)
        if random.random() < odd:
            found.append(random.choice((*_ODD_NAMES, *names)))
        if odd and random.random() < _MANY_INPUTS:
            found = [f"{index}" for index in range(10_000)]
        if random.random() < odd / 2:
            random.shuffle(found)
            del found[random.randrange(len(found) + 1) :]
        return found

    def _add_input(
        self, asked: Any, name: str, datatype: str, shape: Shape, *, odd: float, explicit: bool
    ) -> None:
        random, count = self._random, self._count(shape)
        said = datatype if random.random() >= odd else random.choice((*DATATYPES, *_ODD_DATATYPES))
        added = asked.inputs.add(name=name, datatype=said, shape=shape)
        if random.random() < odd:
            self._parameterise(added.parameters, 1)
        if random.random() < odd:
            explicit = not explicit
        if not explicit:
            asked.raw_input_contents.append(self._raw(datatype, count, odd))
            return
        added.contents.SetInParent()
        for _ in range(2 if random.random() < odd / 2 else 1):
            kind = datatype if random.random() >= odd else random.choice(list(DATATYPES))
            size = self._off(count, odd)
            values = self._values(kind, size)
            getattr(added.contents, DATATYPES[kind][1]).extend(values)

    def _raw(self, datatype: str, count: int, odd: float) -> bytes:
        random = self._random
        if datatype == "BYTES":
            data = b"".join(struct.pack("<I", len(each)) + each for each in self._values("BYTES", count))
        else:
            data = random.randbytes(count * DATATYPES[datatype][0])
        if random.random() < odd:
            data = random.choice((data[:-1], data + b"\0", b"", data[:3], b"\xff\xff\xff\xff" + data))
        return data

    def _predict(self, name: str, *, odd: float) -> bytes:
        random, (datatype, shape, inputs) = self._random, self._models[name]
        asked = protos.message("tensorflow.serving.PredictRequest")()
        asked.model_spec.name = name if random.random() >= odd / 4 else self._name(1)
        if random.random() < odd:
            asked.model_spec.version.value = random.choice(_ODD_NUMBERS["int"])
        if random.random() < odd / 4:
            asked.model_spec.version_label = self._name(1)
        names = self._inputs(inputs, odd)
        inner = odd if len(names) < 10 else 0.0
        for each in names:
            self._tensor_proto(asked.inputs[each], datatype, self._shape(shape, inner), inner)
        for _ in range(random.choice((0, 0, 1, 2)) if odd else 0):
            asked.output_filter.append(self._name(odd))
        return bytes(asked.SerializeToString())

    def _tensor_proto(self, proto: Any, datatype: str, shape: Shape, odd: float) -> None:
        """Fill a TensorProto: raw content, or values, of which the last may stand for more."""
        random, count = self._random, self._count(shape)
        _, _, number, listed = DATATYPES[datatype]
        proto.dtype = number if random.random() >= odd else random.choice((*range(0, 27), 101, 999))
        proto.tensor_shape.SetInParent()
        for length in shape:
            proto.tensor_shape.dim.add(size=length, name=self._name(1) if random.random() < odd else "")
        proto.tensor_shape.unknown_rank = random.random() < odd / 3
        proto.version_number = random.choice(_ODD_NUMBERS["int"][:5]) if random.random() < odd else 0
        if datatype != "BYTES" and random.random() < 0.5:
            proto.tensor_content = self._raw(datatype, count, odd)
            if random.random() >= odd:
                return
        if random.random() < odd:
            listed = random.choice([each[3] for each in DATATYPES.values()])
        size = random.choice((1, count, count, max(1, count // 2), self._off(count, odd))) if count else 0
        kind = next(kind for kind, each in DATATYPES.items() if each[3] == listed)
        values = self._values("INT32" if listed in ("int_val", "half_val") else kind, size)
        if listed in ("int_val", "half_val") and random.random() >= odd:
            values = [value % 100 for value in values]
        getattr(proto, listed).extend(values)

    def _shape(self, shape: Shape, odd: float) -> Shape:
        """Return lengths for a shape with -1; with some luck others."""
        random = self._random
        lengths = [random.choice((1, 2, 3)) if each < 0 else each for each in shape]
        if random.random() >= odd:
            return lengths
        changes: tuple[Callable[[], Shape], ...] = (
            lambda: [*lengths[:-1], random.choice(_ODD_LENGTHS)],
            lambda: [random.choice(_ODD_LENGTHS) for _ in lengths],
            lambda: [],
            lambda: [*lengths, 1],
            lambda: [2**62] * random.choice((2, 3, 33, 40_000)),
            lambda: [1] * random.choice((31, 32, 33, 64, 65, 5000)),
            lambda: [256, random.choice((256, 1024, 4096))],
            lambda: [0, 2**62, 2**62],
        )
        return random.choice(changes)()

    def _count(self, shape: Shape) -> int:
        """Return how many elements a tensor shall have: as the shape says, where that can be sent."""
        count = math.prod(shape) if len(shape) < 100 else 4
        return count if 0 <= count <= 1 << 16 else 4

    def _off(self, count: int, odd: float) -> int:
        if self._random.random() >= odd:
            return count
        return max(0, self._random.choice((count - 1, count + 1, 0, 1, count * 2)))

    def _values(self, datatype: str, count: int) -> list[Any]:
        """Return elements of a datatype: some, over and over."""
        some: tuple[Any, ...]
        if datatype == "BYTES":
            some = (b"1", b"17", b"", b"\xff", b"x" * 300)
        elif datatype == "BOOL":
            some = (True, False)
        elif datatype in ("FP32", "FP64", "FP16", "BF16"):
            some = _ODD_NUMBERS["float"][:5]
        else:
            some = _ODD_NUMBERS["unsigned" if datatype.startswith("U") else "int"]
            if not datatype.endswith("64"):
                some = tuple(each for each in some if -(2**31) <= each < 2**31)
        chosen = self._random.choices(some, k=min(count, 50))
        return (chosen * (count // 50 + 1))[:count]

    def _parameterise(self, parameters: Any, odd: float) -> None:
        """Give some parameters, of each kind."""
        random = self._random
        if random.random() >= odd + 0.05:
            return
        names = random.sample(_PARAMETERS, random.choice((1, 1, 2, 5)))
        for name in names if random.random() < 0.9 else [random.choice(_ODD_NAMES)]:
            one = parameters[name]
            kind = random.choice(("bool", "int64", "string", "double", "uint64", None))
            if kind == "bool":
                one.bool_param = random.random() < 0.5
            elif kind == "int64":
                one.int64_param = random.choice(_ODD_NUMBERS["int"])
            elif kind == "string":
                one.string_param = random.choice(_ODD_NAMES)
            elif kind == "double":
                one.double_param = random.choice(_ODD_NUMBERS["float"])
            elif kind == "uint64":
                one.uint64_param = random.choice(_ODD_NUMBERS["unsigned"])
