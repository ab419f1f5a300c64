"""Put published arrays into MXNet's Gluon networks; apart because it imports MXNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mxnet as mx
import numpy as np
from mxnet.gluon.data.vision import transforms
from mxnet.gluon.model_zoo import vision

from . import published
from .published import Arrays

# Gluon's batch norms add 1e-5 to a variance.
EPSILON_DIFFERENCE = np.float32(published.EPSILON - 1e-5)

# As gluoncv's transform_eval, with which the handler of examples/mxnet_resnet50 prepares a photo.
PREPARE = (
    transforms.Resize(256, keep_ratio=True),
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)


def write(name: str, package: Path, prefix: Path) -> None:
    """Write `prefix`-symbol.json and `prefix`-0000.params for Gluon's network `name`, from its package."""
    net = getattr(vision, name)(prefix=f"{name}_")
    net.initialize()
    net.hybridize()
    net(mx.nd.zeros((1, 3, 224, 224)))  # the first pass settles the shapes
    values = {"squeezenet1_1": squeezenet_values, "resnet50_v1": resnet50_values}[name](package)
    for parameter, value in zip(net.collect_params().values(), values, strict=True):
        if parameter.shape != value.shape:
            raise ValueError(f"{parameter.name} has shape {parameter.shape}, the package has {value.shape}")
        parameter.set_data(mx.nd.array(value))
    net.export(str(prefix))


def classify(prefix: Path, photo: Path) -> int:
    """Classify one photo with an exported network."""
    net = mx.gluon.SymbolBlock(mx.sym.load(f"{prefix}-symbol.json"), mx.sym.var("data", dtype="float32"))
    net.load_parameters(f"{prefix}-0000.params")
    image = mx.image.imdecode(photo.read_bytes())
    for prepare in PREPARE:
        image = prepare(image)
    scores = net(image.expand_dims(0))
    return int(scores.argmax(axis=1).asscalar())


def squeezenet_values(wheel: Path) -> Iterator[np.ndarray]:
    """Yield the parameters of squeezenet1_1 in Gluon's order: kernel and bias of one layer after another."""
    arrays = published.squeezenet(wheel)
    parts = ("squeeze1x1", "expand1x1", "expand3x3")
    fires = [f"fire{number}/{part}" for number in range(2, 10) for part in parts]
    for layer in ("conv1", *fires, "conv10"):
        yield arrays[f"{layer}/kernel"]
        yield arrays[f"{layer}/bias"]


def resnet50_values(tgz: Path) -> Iterator[np.ndarray]:
    """Yield the parameters of resnet50_v1 in Gluon's order: convolutions with batch norms, the classifier."""
    arrays = published.resnet50_with_norms(tgz)
    yield from convolution(arrays, "conv1", "bn_conv1")
    for stage, blocks in ((2, "abc"), (3, "abcd"), (4, "abcdef"), (5, "abc")):
        for block in blocks:
            # Only a stage's first block has a convolution (1) on the shortcut.
            for branch in ("2a", "2b", "2c", "1") if block == "a" else ("2a", "2b", "2c"):
                layer = f"{stage}{block}_branch{branch}"
                yield from convolution(arrays, f"res{layer}", f"bn{layer}")
    yield arrays["fc1000/kernel"]
    yield arrays["fc1000/bias"]


def convolution(arrays: Arrays, layer: str, norm: str) -> Iterator[np.ndarray]:
    """Yield a convolution's kernel, the bias where Gluon's layer has one, and the batch norm after it.

    Keras has a bias everywhere, Gluon only in the 1x1 layers of a block's main branch. It is moved into the
    mean that the batch norm subtracts, and Gluon's own are zero.
    """
    bias = arrays[f"{layer}/bias"]
    yield arrays[f"{layer}/kernel"]
    if layer.endswith(("branch2a", "branch2c")):
        yield np.zeros_like(bias)
    yield arrays[f"{norm}/gamma"]
    yield arrays[f"{norm}/beta"]
    yield arrays[f"{norm}/moving_mean"] - bias
    yield arrays[f"{norm}/moving_variance"] + EPSILON_DIFFERENCE
