"""Models on OpenCV's dnn: ONNX, frozen TensorFlow graphs with or without a text graph, Caffe.

Hides that its nets take FP32 blobs, tell little of their inputs, and share threads with all of the process:
a worker has one model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from mms_lite.errors import BackendMissing, BadTensor, InvalidArchive
from mms_lite.tensors import Array, describe
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import BackendSettings, declared, on_cpu, refuse_empty
from mms_lite.worker.backends.faults import raise_if_no_memory, reason
from mms_lite.worker.backends.opencv_files import read_inputs, read_metadata

_TAKES = ("FP32", "UINT8")  # setInput turns bytes into FP32
_DEVICE_FAULTS = (cv2.Error.GpuNotSupported, cv2.Error.GpuApiCallError)
_NOISE = re.compile(
    r"OpenCV\(\S+\) \S+ error: (?:\(-\d+:[^)]*\) )?|in function '[^']*'|^> *", re.M
)  # the place in the source, and what marks lines
_EXAMPLE = '"backend": {"inputs": [{"name": "data", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]}'


class OpenCvBackend:
    """A net of cv2.dnn. Its outputs are what no layer reads, or the layers that the archive declares."""

    def __init__(
        self,
        net: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.metadata = metadata
        self._net = net
        self._ranks = {spec.name: len(spec.shape) for spec in outputs if spec.shape is not None}

    @classmethod
    def open(cls, settings: BackendSettings) -> OpenCvBackend:
        """Read the files, in any order, and find out what can be known of the net's inputs and outputs.

        Raises:
            InvalidArchive: OpenCV cannot read them, or has not the layers and inputs that are declared.
        """
        if settings.options:
            raise InvalidArchive(f"the backend opencv has no options; got: {', '.join(settings.options)}")
        files = sorted(settings.files, key=lambda path: path.suffix)
        net = _read(files)
        described = files[-1]  # the text, where there is one
        try:
            inputs = _inputs(net, read_inputs(described), settings.inputs)
            metadata = read_metadata(described) if described.suffix == ".onnx" else {}
            outputs = _outputs(net, inputs, settings.outputs)
        except ValueError as error:
            raise InvalidArchive(f"{described.name} is damaged: {error}") from error
        except cv2.error as error:  # layers are made when they are first looked at
            raise InvalidArchive(f"OpenCV cannot use {files[0].name}: {reason(error, _NOISE)}") from error
        _place(net, settings)
        return cls(net, inputs, outputs, metadata)

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the net once on NCHW blobs; the answers are copies, which the next call leaves alone.

        Raises:
            BadTensor: the net does not take the inputs.
            OutOfMemory: of the host or the device.
        """
        refuse_empty(inputs, "OpenCV")
        try:
            for name, array in inputs.items():
                self._net.setInput(cv2.Mat(array), name)  # a plain array of three axes would be an image
            blobs = self._net.forward(list(outputs))
        except cv2.error as error:
            raise_if_no_memory(error, "OpenCV")
            if error.code in _DEVICE_FAULTS:
                raise
            given = ", ".join(f"{name} {describe(array)}" for name, array in inputs.items())
            raise BadTensor(f"the model does not take {given}: {reason(error, _NOISE)}") from error
        # OpenCV 4 has no arrays of one axis: it makes columns of them.
        return {
            name: blob.reshape(-1) if self._ranks.get(name) == 1 else blob
            for name, blob in zip(outputs, blobs, strict=True)
        }

    def close(self) -> None:
        """Let go of the net."""
        self._net = None


def _read(files: Sequence[Path]) -> Any:
    names = " with ".join(path.name for path in files)
    paths = [str(path) for path in files]
    try:
        match [path.suffix for path in files]:
            case [".onnx"]:
                net = cv2.dnn.readNetFromONNX(*paths)
            case [".pb"] | [".pb", ".pbtxt"]:
                net = cv2.dnn.readNetFromTensorflow(*paths)
            case [".caffemodel", ".prototxt"]:
                if not hasattr(cv2.dnn, "readNetFromCaffe"):
                    raise BackendMissing("Caffe models need OpenCV 4: pip install 'opencv-python-headless<5'")
                net = cv2.dnn.readNetFromCaffe(*reversed(paths))
            case _:
                kinds = ".onnx, .pb, .pb with .pbtxt, or .caffemodel with .prototxt"
                raise InvalidArchive(f"OpenCV reads {kinds}; got: {names}")
    except cv2.error as error:
        told = reason(error, _NOISE, folder=files[0].parent)
        raise InvalidArchive(f"OpenCV cannot read {names}: {told}") from error
    if net.empty():
        raise InvalidArchive(f"OpenCV finds no layers in {names}")
    return net


def _inputs(net: Any, found: Sequence[TensorSpec], stated: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the net's inputs in its order; what the file does not tell, the archive has to declare."""
    place = net.getLayer(0).outputNameToIndex  # layer 0 gives the inputs; it knows their names and tells none
    own = {spec.name: spec for spec in (*found, *stated) if place(spec.name) >= 0}
    specs = declared(sorted(own.values(), key=lambda spec: int(place(spec.name))), stated, "input")
    if not specs:
        raise InvalidArchive(
            f"the model's files do not name its inputs: declare them in the handler config, as in {_EXAMPLE}"
        )
    for spec in specs:
        if spec.datatype not in _TAKES:
            raise InvalidArchive(f"OpenCV takes FP32 or UINT8; the handler config declares {spec}")
        if spec.shape is not None and len(spec.shape) < 2:
            raise InvalidArchive(f"OpenCV takes inputs of two axes or more; the model has {spec}")
    return specs


def _place(net: Any, settings: BackendSettings) -> None:
    cv2.setNumThreads(settings.threads)
    cv2.ocl.setUseOpenCL(False)
    if settings.device is not None and not cv2.cuda.getCudaEnabledDeviceCount():
        settings = on_cpu(settings, "this OpenCV is built without CUDA, as those of PyPI are")
    if settings.device is not None:
        cv2.cuda.setDevice(settings.device)
        net.setPreferableBackend(cv2.dnn.DNN_BACKEND_CUDA)
        net.setPreferableTarget(cv2.dnn.DNN_TARGET_CUDA)


def _outputs(net: Any, inputs: Sequence[TensorSpec], stated: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    names = [spec.name for spec in stated] or list(net.getUnconnectedOutLayersNames())
    for name in names:
        if net.getLayerId(name) < 0:
            ends = ", ".join(net.getUnconnectedOutLayersNames())
            raise InvalidArchive(f"the net has no layer {name!r} to be an output; it ends in: {ends}")
    shapes = [_probe(net, inputs, names, rows) for rows in (1, 2)]
    found = [
        TensorSpec(name, "FP32", _shape(net, name, *each)) for name, *each in zip(names, *shapes, strict=True)
    ]
    return declared(found, stated, "output")


_Shape = tuple[int, ...] | None


def _probe(net: Any, inputs: Sequence[TensorSpec], names: Sequence[str], rows: int) -> list[_Shape]:
    """Return the outputs' shapes for this many rows, None where other axes of the inputs are free too."""
    if any(spec.shape is None or -1 in spec.shape[1:] for spec in inputs):
        return [None] * len(names)
    given = [[rows if length == -1 else length for length in spec.shape or ()] for spec in inputs]
    try:
        ids, _, shapes = net.getLayersShapes(given)
    except cv2.error:
        return [None] * len(names)
    by_id = dict(zip(ids.tolist(), shapes, strict=True))
    return [tuple(by_id[net.getLayerId(name)][0].tolist()) for name in names]


def _shape(net: Any, name: str, one: _Shape, two: _Shape) -> _Shape:
    """Return an output's shape from those for one row and for two; what differs is free."""
    if net.getLayer(net.getLayerId(name)).type == "DetectionOutput":
        return (1, 1, -1, 7)  # one row for each box that was found, in all images
    if one is None or two is None or len(one) != len(two):
        return None
    return tuple(first if first == second else -1 for first, second in zip(one, two, strict=True))
