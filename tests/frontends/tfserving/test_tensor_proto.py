"""TensorProto and our tensors: every datatype, every form of the values, both ways."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mms_lite.errors import BadTensor, RequestTooLarge
from mms_lite.frontends.fields import lift
from mms_lite.frontends.tfserving.service import DATATYPES
from mms_lite.frontends.tfserving.tensor_proto import Lifted, decode, encode
from mms_lite.protos import message
from mms_lite.tensors import DTYPES, to_array, to_tensor
from mms_lite.types import Tensor, TensorSpec

PredictResponse = message("tensorflow.serving.PredictResponse")
SHAPES = arrays.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=4)
# Where TensorFlow's make_tensor_proto puts values that it does not send as tensor_content.
LISTS = {
    "FP32": "float_val",
    "FP64": "double_val",
    "INT32": "int_val",
    "INT16": "int_val",
    "INT8": "int_val",
    "UINT16": "int_val",
    "UINT8": "int_val",
    "INT64": "int64_val",
    "UINT32": "uint32_val",
    "UINT64": "uint64_val",
    "BOOL": "bool_val",
    "FP16": "half_val",
    "BF16": "half_val",
}


def read(proto: Any, spec: TensorSpec | None = None, lifted: Any = ()) -> Tensor:
    return decode("x", proto, spec, lifted=Lifted(lifted), most_bytes=1 << 20)


def written(tensor: Tensor) -> Any:
    return PredictResponse.FromString(b"".join(encode(1, [tensor]))).outputs[tensor.name]


def proto(datatype: str, shape: tuple[int, ...], **fields: Any) -> Any:
    dims = [{"size": length} for length in shape]
    number = DATATYPES[datatype][1]
    return message("tensorflow.TensorProto")(dtype=number, tensor_shape={"dim": dims}, **fields)


@st.composite
def numbers(draw: st.DrawFn, datatype: str) -> np.ndarray:
    shape, dtype = draw(SHAPES), DTYPES[datatype]
    if datatype != "BF16":
        return draw(arrays.arrays(dtype, shape))
    return draw(arrays.arrays(np.uint16, shape)).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("datatype", sorted(LISTS))
@given(data=st.data())
def test_what_is_written_is_read(datatype: str, data: st.DataObject) -> None:
    array = data.draw(numbers(datatype))
    there = written(to_tensor("x", array))
    assert there.dtype == DATATYPES[datatype][1]
    back = read(there, TensorSpec("x", datatype, array.shape))
    assert (back.datatype, back.shape, bytes(back.data)) == (datatype, array.shape, array.tobytes())


@pytest.mark.parametrize("datatype", sorted(LISTS))
@given(data=st.data())
def test_lists_of_values(datatype: str, data: st.DataObject) -> None:
    array = data.draw(numbers(datatype))
    given_values = array.view(np.uint16) if LISTS[datatype] == "half_val" else array
    fields = {LISTS[datatype]: given_values.reshape(-1).tolist()}
    back = to_array(read(proto(datatype, array.shape, **fields)))
    if datatype == "FP32":  # protobuf may quiet a signalling NaN
        assert np.array_equal(back, array, equal_nan=True)
    else:
        assert back.tobytes() == array.tobytes()


@given(elements=st.lists(st.binary(max_size=20), max_size=6))
def test_strings(elements: list[bytes]) -> None:
    tensor = read(proto("BYTES", (len(elements),), string_val=elements))
    assert list(to_array(tensor)) == elements
    there = written(tensor)
    assert (list(there.string_val), there.dtype) == (elements, 7)


def test_the_last_value_goes_on() -> None:
    assert to_array(read(proto("INT8", (2, 2), int_val=[-1, 5]))).tolist() == [[-1, 5], [5, 5]]
    assert to_array(read(proto("BYTES", (3,), string_val=[b"a"]))).tolist() == [b"a"] * 3


def test_one_text_does_not_stand_for_millions() -> None:
    with pytest.raises(RequestTooLarge, match="texts more than were sent"):
        decode("x", proto("BYTES", (1 << 24,), string_val=[b""]), None, lifted=Lifted(), most_bytes=1 << 30)


@pytest.mark.parametrize(("datatype", "value"), [("INT8", 128), ("UINT8", -1), ("UINT16", 65536)])
def test_values_out_of_range(datatype: str, value: int) -> None:
    with pytest.raises(BadTensor, match="Invalid value in tensor proto container - int_val; input name: x"):
        read(proto(datatype, (1,), int_val=[value]))


def test_a_large_content_is_not_copied() -> None:
    array = np.arange(50_000, dtype=np.float32)
    inputs = {"x": proto("FP32", array.shape, tensor_content=array.tobytes())}
    serialized = message("tensorflow.serving.PredictRequest")(inputs=inputs).SerializeToString()
    rest, lifted = lift(serialized, (2, 2, 4))
    request = message("tensorflow.serving.PredictRequest").FromString(rest)
    data = read(request.inputs["x"], lifted=lifted).data
    assert isinstance(data, memoryview)
    assert data.obj is serialized
    assert np.array_equal(np.frombuffer(data, np.float32), array)


def test_an_answer_is_not_copied_before_it_is_joined() -> None:
    data = bytearray(80_000)
    assert any(piece is data for piece in encode(1, [Tensor("y", "FP32", (20_000,), data)]))
