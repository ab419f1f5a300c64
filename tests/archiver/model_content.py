"""Model files that hold just enough to be what their names say."""

import io
import zipfile

# An ONNX model with one MatMul, whose weights lie in `net.weights` (TensorProto.external_data).
ONNX_APART = (
    b'\x08\x0e:\x84\x01\n\x11\n\x01x\n\x01w\x12\x01y"\x06MatMul\x12\x01g*B\x08d\x08d\x10\x01B\x01w'
    b"j\x17\n\x08location\x12\x0bnet.weightsj\x0b\n\x06offset\x12\x010j\x0f\n\x06length\x12\x0540000p\x01"
    b"Z\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08d"
    b"b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08dB\x02\x10\x1c"
)
PROTOBUF = b"\n\x1b\n\x05input\x12\x0bPlaceholder*\x05\x00"
PARAMS = b"\x12\x01" + bytes(14)
SYMBOL = b'{"nodes": []}'


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


CONTENT = {
    ".onnx": b"\x08\x07\x12\x07pytorch",
    ".xml": b'<?xml version="1.0"?>\n<net name="m" version="11"></net>',
    ".bin": b"\0\1",
    ".pb": PROTOBUF,
    ".pbtxt": b"node { }",
    ".tflite": b"\x1c\0\0\0TFL3",
    ".pdmodel": PROTOBUF,
    ".pdiparams": b"\0\1",
    ".caffemodel": PROTOBUF,
    ".prototxt": b"layer { }",
    ".pt": zip_of("m/code/__torch__.py", "m/data.pkl", "m/constants.pkl"),
    ".pth": zip_of("m/code/__torch__.py", "m/data.pkl", "m/constants.pkl"),
    ".pt2": zip_of("m/models/model.json", "m/archive_format"),
    ".json": SYMBOL,
    ".params": PARAMS,
    ".py": b"def infer(inputs): return inputs",
}
