"""The layers of the networks whose weights are published as bare arrays, written once for every format.

Apart from what uses them: onnx_network.py turns these functions into a file, torch_network.py runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

# What most ImageNet networks are fed: RGB in 0..255, minus that data set's mean, divided by its deviation.
IMAGENET_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)

Pads = tuple[int, int, int, int]  # rows above, columns left, rows below, columns right
NO_PADS = (0, 0, 0, 0)


class Layers(Protocol):
    """What a format has to offer. A value is what the format passes from layer to layer: [N, channels, H, W].

    Weights are found by the name of the layer: NAME/kernel [out, in, H, W] (for `dense` [out, in]) and
    NAME/bias [out]. Batch norms are no layers: they are folded into the convolutions before them.
    """

    def conv(self, value: Any, name: str, *, stride: int = 1, pads: Pads = NO_PADS, groups: int = 1) -> Any:
        """Convolve and add a bias."""

    def relu(self, value: Any) -> Any:
        """Cut below 0."""

    def relu6(self, value: Any) -> Any:
        """Cut below 0 and above 6."""

    def max_pool(self, value: Any, pads: Pads = NO_PADS) -> Any:
        """Take the largest of every 3 x 3, in steps of 2."""

    def add(self, left: Any, right: Any) -> Any:
        """Add two values of one shape."""

    def concat(self, left: Any, right: Any) -> Any:
        """Join the channels of two values."""

    def mean(self, value: Any, window: int = 0) -> Any:
        """Average each channel over the whole image, or its first `window` rows and columns."""

    def dense(self, value: Any, name: str) -> Any:
        """Multiply [N, in] by a kernel and add a bias: [N, out]."""

    def softmax(self, value: Any) -> Any:
        """Turn [N, classes] into probabilities."""


@dataclass(frozen=True, slots=True)
class Network:
    """A classifier of ImageNet's 1000 classes: input `data` [N, 3, size, size] RGB, output `prob` [N, 1000].

    The input is (pixel - mean) / std, with pixels in 0..255.
    """

    layers: Callable[[Layers, Any], Any]
    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def resnet50(net: Layers, image: Any) -> Any:
    """ResNet-50 v1 (He et al. 2015), with the names of Keras.

    A stage's stride is in its first 1x1 convolution; in the later v1.5 it is in the 3x3 one, where these
    weights give wrong answers.
    """
    value = net.relu(net.conv(image, "conv1", stride=2, pads=(3, 3, 3, 3)))
    value = net.max_pool(value, pads=(1, 1, 1, 1))
    for stage, blocks in ((2, "abc"), (3, "abcd"), (4, "abcdef"), (5, "abc")):
        for block in blocks:
            stride = 2 if block == "a" and stage > 2 else 1
            value = bottleneck(net, value, f"res{stage}{block}_branch", stride, projects=block == "a")
    return net.softmax(net.dense(net.mean(value), "fc1000"))


def bottleneck(net: Layers, value: Any, name: str, stride: int, projects: bool) -> Any:
    """Add to a value what three convolutions make of it; `projects` puts one on the shortcut, too."""
    shortcut = net.conv(value, f"{name}1", stride=stride) if projects else value
    value = net.relu(net.conv(value, f"{name}2a", stride=stride))
    value = net.relu(net.conv(value, f"{name}2b", pads=(1, 1, 1, 1)))
    return net.relu(net.add(net.conv(value, f"{name}2c"), shortcut))


def squeezenet(net: Layers, image: Any) -> Any:
    """SqueezeNet 1.1 (Iandola et al. 2016), with the names of Keras and the pooling of Gluon's squeezenet1_1.

    As in Caffe, windows that reach over the edge count; so the last map has 14 rows, of which Gluon takes 13.
    """
    value = net.max_pool(net.relu(net.conv(image, "conv1", stride=2)))
    for number in range(2, 10):
        fire = f"fire{number}/"
        value = net.relu(net.conv(value, f"{fire}squeeze1x1"))
        value = net.concat(
            net.relu(net.conv(value, f"{fire}expand1x1")),
            net.relu(net.conv(value, f"{fire}expand3x3", pads=(1, 1, 1, 1))),
        )
        if number in (3, 5):
            value = net.max_pool(value, pads=(0, 0, 1, 1))
    return net.softmax(net.mean(net.relu(net.conv(value, "conv10")), window=13))


# Of EfficientNet-B0's 16 blocks: the channels that go in, the depthwise kernel's size and its stride.
BLOCKS = (
    *((32, 3, 1), (16, 3, 2), (24, 3, 1), (24, 5, 2), (40, 5, 1), (40, 3, 2), (80, 3, 1), (80, 3, 1)),
    *((80, 5, 1), (112, 5, 1), (112, 5, 1), (112, 5, 2), (192, 5, 1), (192, 5, 1), (192, 5, 1), (192, 3, 1)),
)


def efficientnet_lite0(net: Layers, image: Any) -> Any:
    """EfficientNet-Lite0: B0 (Tan and Le 2019) with ReLU6 for swish and without squeeze-and-excitation."""
    value = net.relu6(net.conv(image, "_conv_stem", stride=2, pads=same_pads(3, 2)))
    for number, (channels, kernel, stride) in enumerate(BLOCKS):
        block, entering = f"_blocks.{number}.", value
        expanded = channels if number == 0 else 6 * channels  # the first block does not expand
        if expanded > channels:
            value = net.relu6(net.conv(value, f"{block}_expand_conv"))
        pads = same_pads(kernel, stride)
        value = net.conv(value, f"{block}_depthwise_conv", stride=stride, pads=pads, groups=expanded)
        value = net.conv(net.relu6(value), f"{block}_project_conv")
        if stride == 1 and number < 15 and BLOCKS[number + 1][0] == channels:
            value = net.add(value, entering)
    value = net.relu6(net.conv(value, "_conv_head"))
    return net.softmax(net.dense(net.mean(value), "_fc"))


def same_pads(kernel: int, stride: int) -> Pads:
    """Pad as TensorFlow's SAME does where the stride divides the size: what is odd goes below and right."""
    total = kernel - stride
    return total // 2, total // 2, total - total // 2, total - total // 2


RESNET50 = Network(resnet50, 224)
SQUEEZENET = Network(squeezenet, 227)
EFFICIENTNET_LITE0 = Network(efficientnet_lite0, 224, mean=(127, 127, 127), std=(128, 128, 128))
