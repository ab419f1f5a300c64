"""Every datatype by every way in and out, through a model that gives back what it gets: bit for bit.

What no way can carry is left out where the ways are defined, each with its reason.
"""

import base64
import http.client
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from client_models import DATATYPES
from client_server import Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

pytest.importorskip("grpc", reason="the grpc extra is not installed (make clients)")
pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (make clients)")
pytest.importorskip("ovmsclient", reason="ovmsclient is not installed (make clients)")

import grpc
import ml_dtypes
from ovmsclient.tfs_compat.protos.tensorflow.core.framework import tensor_pb2, types_pb2
from ovmsclient.tfs_compat.protos.tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

Array = np.ndarray[Any, Any]
NUMPY: dict[str, Any] = {
    **{name: name.lower() for name in DATATYPES if "INT" in name},
    **{"BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64},
    **{"BF16": ml_dtypes.bfloat16, "BYTES": np.object_},
}
HALVES = ("FP16", "BF16")
HEAD = "Inference-Header-Content-Length"
# KServe v2, InferTensorContents: the field of each datatype. FP16 and BF16 have none.
CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{"BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents"},
    **{"FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents"},
}
# TensorFlow, tensor.proto and types.proto: the number and the field of each datatype.
TENSORFLOW = {
    **{"FP32": ("DT_FLOAT", "float_val"), "FP64": ("DT_DOUBLE", "double_val")},
    **{"FP16": ("DT_HALF", "half_val"), "BF16": ("DT_BFLOAT16", "half_val")},
    **{name: (f"DT_{name}", "int_val") for name in ("INT8", "INT16", "INT32", "UINT8", "UINT16")},
    **{"INT64": ("DT_INT64", "int64_val"), "UINT64": ("DT_UINT64", "uint64_val")},
    **{"UINT32": ("DT_UINT32", "uint32_val"), "BOOL": ("DT_BOOL", "bool_val")},
    **{"BYTES": ("DT_STRING", "string_val")},
}


class Connections:
    """One connection over HTTP and one over gRPC to the server, for all that follows."""

    def __init__(self, server: Server) -> None:
        self.http = http.client.HTTPConnection(server.http)
        self.channel = grpc.insecure_channel(server.grpc)
        self.kserve = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.tensorflow = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, str | None]:
        """Return a body and its header's length, if the answer says one."""
        self.http.request("POST", path, body, headers)
        answer = self.http.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return content, answer.getheader(HEAD)

    def close(self) -> None:
        self.http.close()
        self.channel.close()


@pytest.fixture(scope="module")
def connections(triton: Server) -> Iterator[Connections]:
    made = Connections(triton)
    yield made
    made.close()


# Arrays as bytes and as JSON


def raw(array: Array) -> bytes:
    if array.dtype == np.object_:
        packed = serialize_byte_tensor(array)
        return bytes(packed.item()) if packed.size else b""
    return array.tobytes()


def of_raw(datatype: str, shape: tuple[int, ...], data: bytes) -> Array:
    if datatype != "BYTES":
        return np.frombuffer(data, NUMPY[datatype]).reshape(shape)
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    array = np.empty(len(found), np.object_)
    array[:] = found
    return array.reshape(shape)


def nested(array: Array) -> Any:
    """Return an array's elements as Python's, in nested lists."""
    return array.astype(np.float64).tolist() if array.dtype == ml_dtypes.bfloat16 else array.tolist()


def values(array: Array) -> list[Any]:
    """Return an array's elements as Python's, in its order."""
    return list(nested(array.reshape(-1)))


def texts(array: Array) -> Array:
    """Return BYTES as text, which JSON has; other arrays as they are."""
    if array.dtype != np.object_:
        return array
    found = np.empty(array.shape, np.object_)
    found.reshape(-1)[:] = [each.decode() for each in array.reshape(-1)]
    return found


def of_json(datatype: str, shape: tuple[int, ...], data: Any) -> Array:
    """Return the array of numbers or text in JSON, nested or flat."""
    if datatype == "BYTES":
        flat = np.array(data, np.object_).reshape(-1)
        array = np.empty(len(flat), np.object_)
        array[:] = [_bytes(each) for each in flat]
        return array.reshape(shape)
    return np.array(data, NUMPY[datatype]).reshape(shape)


def _bytes(each: Any) -> bytes:
    return base64.b64decode(each["b64"]) if isinstance(each, dict) else each.encode()


# The ways


def kserve_rest(*, into: bool, out_of: bool) -> Callable[[Connections, str, Array], Array]:
    """JSON or, where true, binary data into the server and out of it."""

    def way(to: Connections, datatype: str, array: Array) -> Array:
        tensor: dict[str, Any] = {"name": "INPUT0", "shape": array.shape, "datatype": datatype}
        data = raw(array) if into else b""
        if into:
            tensor["parameters"] = {"binary_data_size": len(data)}
        else:
            tensor["data"] = values(texts(array))
        output = {"name": "OUTPUT0", "parameters": {"binary_data": out_of}}
        head = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        headers = {HEAD: str(len(head))} if into else {}
        body, size = to.post(f"/v2/models/identity_{datatype}/infer", head + data, headers)
        (found,) = json.loads(body if size is None else body[: int(size)])["outputs"]
        assert found["datatype"] == datatype
        if not out_of:
            return of_json(datatype, tuple(found["shape"]), found["data"])
        assert size is not None
        rest = body[int(size) :]
        assert found["parameters"]["binary_data_size"] == len(rest)
        return of_raw(datatype, tuple(found["shape"]), rest)

    return way


def kserve_grpc(*, typed: bool) -> Callable[[Connections, str, Array], Array]:
    """Typed contents or raw ones in; raw ones out, which is all that its clients read."""

    def way(to: Connections, datatype: str, array: Array) -> Array:
        request = service_pb2.ModelInferRequest(model_name=f"identity_{datatype}")
        tensor = request.inputs.add(name="INPUT0", datatype=datatype, shape=array.shape)
        if typed:
            getattr(tensor.contents, CONTENTS[datatype]).extend(values(array))
        else:
            request.raw_input_contents.append(raw(array))
        answer = to.kserve.ModelInfer(request)
        (output,) = answer.outputs
        assert output.datatype == datatype
        return of_raw(datatype, tuple(output.shape), answer.raw_output_contents[0])

    return way


def tensorflow_rest(*, rows: bool) -> Callable[[Connections, str, Array], Array]:
    def way(to: Connections, datatype: str, array: Array) -> Array:
        data = _with_base64(texts(array).tolist()) if datatype == "BYTES" else nested(array)
        asked = {"instances": data} if rows else {"inputs": {"INPUT0": data}}
        path = f"/v1/models/identity_{datatype}:predict"
        body, _ = to.post(path, json.dumps(asked).encode(), {})
        return of_json(datatype, array.shape, json.loads(body)["predictions" if rows else "outputs"])

    return way


def _with_base64(data: Any) -> Any:
    """Return nested text with each element that is not ASCII in base64, as its clients may say it."""
    if isinstance(data, list):
        return [_with_base64(each) for each in data]
    return data if data.isascii() else {"b64": base64.b64encode(data.encode()).decode()}


def tensorflow_grpc(*, typed: bool) -> Callable[[Connections, str, Array], Array]:
    """Values in their typed fields or as content; the answer in either."""

    def way(to: Connections, datatype: str, array: Array) -> Array:
        name, field = TENSORFLOW[datatype]
        proto = tensor_pb2.TensorProto(dtype=types_pb2.DataType.Value(name))
        for length in array.shape:
            proto.tensor_shape.dim.add(size=length)
        if typed:
            bits = array.view(np.uint16) if datatype in HALVES else array
            getattr(proto, field).extend(values(bits))
        else:
            proto.tensor_content = array.tobytes()
        request = predict_pb2.PredictRequest()
        request.model_spec.name = f"identity_{datatype}"
        request.inputs["INPUT0"].CopyFrom(proto)
        found = to.tensorflow.Predict(request).outputs["OUTPUT0"]
        assert types_pb2.DataType.Name(found.dtype) == name
        shape = tuple(each.size for each in found.tensor_shape.dim)
        if datatype == "BYTES":
            answered = np.empty(len(found.string_val), np.object_)
            answered[:] = list(found.string_val)
            return answered.reshape(shape)
        if found.tensor_content or 0 in shape:
            return np.frombuffer(found.tensor_content, NUMPY[datatype]).reshape(shape)
        if datatype in HALVES:
            return np.array(found.half_val, np.uint16).view(NUMPY[datatype]).reshape(shape)
        return np.array(getattr(found, field), NUMPY[datatype]).reshape(shape)

    return way


@dataclass(frozen=True)
class Way:
    """A way in and out, and what of all arrays it carries."""

    ask: Callable[[Connections, str, Array], Array]
    datatypes: tuple[str, ...] = DATATYPES
    nans: bool = True  # each NaN's bits; JSON has one word for all, and a Python float makes them quiet
    binary: bool = True  # BYTES that are no text, which JSON has not
    shapes: bool = True  # also (0, n), of which lists do not know n


NO_HALVES = tuple(each for each in DATATYPES if each not in HALVES)
NO_BF16 = tuple(each for each in DATATYPES if each != "BF16")
NO_BYTES = tuple(each for each in DATATYPES if each != "BYTES")
JSON = {"nans": False, "binary": False}
WAYS = {
    # BF16 is no JSON in KServe v2, nor does tritonclient write it. It does write FP16, which Triton refuses.
    "v2 REST, JSON in and out": Way(kserve_rest(into=False, out_of=False), NO_BF16, **JSON),
    "v2 REST, JSON in, binary out": Way(kserve_rest(into=False, out_of=True), NO_BF16, **JSON),
    "v2 REST, binary in, JSON out": Way(kserve_rest(into=True, out_of=False), NO_BF16, **JSON),
    "v2 REST, binary in and out": Way(kserve_rest(into=True, out_of=True)),
    "v2 gRPC, raw": Way(kserve_grpc(typed=False)),
    # InferTensorContents has no field for FP16 and BF16.
    "v2 gRPC, typed contents": Way(kserve_grpc(typed=True), NO_HALVES, nans=False),
    "v1 REST, rows": Way(tensorflow_rest(rows=True), **JSON, shapes=False),
    "v1 REST, columns": Way(tensorflow_rest(rows=False), **JSON, shapes=False),
    # tensor_content is no form of DT_STRING (TensorFlow, tensor.proto).
    "v1 gRPC, content": Way(
        tensorflow_grpc(typed=False), tuple(each for each in DATATYPES if each != "BYTES")
    ),
    "v1 gRPC, typed values": Way(tensorflow_grpc(typed=True), nans=False),
}


def shapes(way: Way) -> st.SearchStrategy[tuple[int, int]]:
    rows = st.integers(0 if way.shapes else 1, 4)
    return st.tuples(rows, st.integers(0, 5))


@st.composite
def elements(draw: st.DrawFn, way: Way, datatype: str) -> Array:
    shape = draw(shapes(way))
    if datatype == "BYTES":
        text = st.text(max_size=6).map(str.encode)
        each = text if not way.binary else st.one_of(text, st.binary(max_size=6))
        count = shape[0] * shape[1]
        array = np.empty(count, np.object_)
        array[:] = draw(st.lists(each, min_size=count, max_size=count))
        return array.reshape(shape)
    dtype = np.dtype(NUMPY[datatype])
    if datatype == "BOOL":
        return draw(arrays_of.arrays(np.bool_, shape))
    bits = draw(arrays_of.arrays(np.dtype(f"uint{8 * dtype.itemsize}"), shape)).view(dtype)
    if not way.nans and datatype in ("FP32", "FP64", *HALVES):
        bits = np.where(np.isnan(bits), dtype.type("nan"), bits).astype(dtype)
    return bits


def same(found: Array, sent: Array) -> bool:
    if sent.dtype == np.object_:
        return found.shape == sent.shape and found.tolist() == sent.tolist()
    return (found.dtype, found.shape, found.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("name", WAYS)
def test_an_array_comes_back_as_it_was_sent(connections: Connections, name: str, datatype: str) -> None:
    way = WAYS[name]
    if datatype not in way.datatypes:
        pytest.skip(f"{name} has no form for {datatype}")

    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(elements(way, datatype))
    def check(array: Array) -> None:
        found = way.ask(connections, datatype, array)
        assert same(found, array), (array, found)

    check()


def test_bf16_as_json_is_refused(connections: Connections) -> None:
    """In and out, as Triton does."""
    tensor: dict[str, Any] = {"name": "INPUT0", "shape": [1, 1], "datatype": "BF16", "data": [1.5]}
    path = "/v2/models/identity_BF16/infer"
    with pytest.raises(AssertionError, match="receiving BF16 data via JSON is not supported"):
        connections.post(path, json.dumps({"inputs": [tensor]}).encode(), {})
    del tensor["data"]
    tensor["parameters"] = {"binary_data_size": 2}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(AssertionError, match="sending BF16 data via JSON is not supported"):
        connections.post(path, head + bytes(2), {HEAD: str(len(head))})
