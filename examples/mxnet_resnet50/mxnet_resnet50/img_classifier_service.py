"""Classify photos with an ImageNet network exported from MXNet Gluon.

Everything about one network is in the files beside this one: `*-symbol.json` and `*-0000.params`, as
`net.export()` writes them, and `classes.json`, the names in the order of the outputs. To serve another
network of the same kind, replace those three.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import mxnet as mx
from gluoncv.data.transforms.presets.imagenet import transform_eval
from mms.service import PredictionException
from PIL import Image

TOP_K = 5
FORMATS = ("JPEG", "PNG")
# A PNG of 400 kB can unfold to gigabytes, and so can a thin strip once its short side is scaled up.
MAX_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 50

UNREADABLE = "The input is not an image that can be read: send a JPEG or PNG file"
TOO_LARGE = (
    f"The image is too large: it may have {MAX_PIXELS} pixels, "
    f"and its longer side {MAX_ASPECT_RATIO} times the length of the shorter"
)


class ImageClassifier:
    """A network, its class names and the device that it runs on."""

    def __init__(self) -> None:
        self.initialized = False
        self.device: mx.Context | None = None
        self.net: mx.gluon.SymbolBlock | None = None
        self.classes: list[str] = []

    def initialize(self, context: Any) -> None:
        """Load the network and the class names out of the model's folder."""
        properties = context.system_properties
        model_dir = Path(properties["model_dir"])
        gpu_id = properties.get("gpu_id")
        self.device = mx.cpu() if gpu_id is None else mx.gpu(gpu_id)
        self.net = load_network(model_dir, self.device)
        self.classes = json.loads((model_dir / "classes.json").read_text(encoding="utf-8"))
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> mx.nd.NDArray:
        """Turn the requests of a batch into one array, N x 3 x 224 x 224.

        The photos may differ in size: each is scaled to a short side of 256, its centre is cut out, and the
        colours are normalised as the network was trained with.
        """
        photos = [decode(item.get("data") or item.get("body")) for item in data]
        return mx.nd.concat(*[transform_eval(photo) for photo in photos], dim=0)

    def inference(self, batch: mx.nd.NDArray) -> mx.nd.NDArray:
        """Run the network once for the whole batch; the result is N x 1000 scores."""
        return self.net(batch.as_in_context(self.device))

    def postprocess(self, scores: mx.nd.NDArray) -> list[list[dict[str, str]]]:
        """Name the best classes of each photo, the likeliest first, with their probabilities."""
        probabilities = mx.nd.softmax(scores).asnumpy()
        best = (-probabilities).argsort(axis=1)[:, :TOP_K]
        return [
            [{self.classes[index]: str(row[index])} for index in indices]
            for row, indices in zip(probabilities, best, strict=True)
        ]


def load_network(model_dir: Path, device: mx.Context) -> mx.gluon.SymbolBlock:
    """Load the one exported network in `model_dir`."""
    symbols = list(model_dir.glob("*-symbol.json"))
    if len(symbols) != 1:
        raise FileNotFoundError(
            f"the archive holds {len(symbols)} *-symbol.json files, not one: "
            "run fetch_weights.py, then pack it again with model-archiver"
        )
    params = str(symbols[0]).replace("-symbol.json", "-0000.params")
    # SymbolBlock.imports() does the same with a warning that it cannot decide the type of "data".
    net = mx.gluon.SymbolBlock(mx.sym.load(str(symbols[0])), mx.sym.var("data", dtype="float32"))
    net.load_parameters(params, ctx=device)
    return net


def decode(body: Any) -> mx.nd.NDArray:
    """Decode one photo to height x width x RGB; what cannot be one is answered with status 400."""
    if not body:
        raise PredictionException("Empty image input: send a JPEG or PNG file", 400)
    if not isinstance(body, (bytes, bytearray)):
        raise PredictionException("The input is text or JSON, not an image: send a JPEG or PNG file", 400)
    try:
        width, height = Image.open(io.BytesIO(body), formats=FORMATS).size  # reads the header alone
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise Image.DecompressionBombError(f"{width} x {height}")
        photo = mx.image.imdecode(body)
        photo.wait_to_read()  # MXNet decodes in the background: a broken file must fail here
    except Image.DecompressionBombError as err:
        raise PredictionException(TOO_LARGE, 400) from err
    except (OSError, ValueError, SyntaxError, mx.MXNetError) as err:
        raise PredictionException(UNREADABLE, 400) from err
    return photo


_service = ImageClassifier()


def handle(data: list[dict[str, Any]] | None, context: Any) -> list[list[dict[str, str]]] | None:
    """Answer one batch of requests; the server calls it once with `data` None when it loads the model."""
    if not _service.initialized:
        _service.initialize(context)
    if data is None:
        return None
    return _service.postprocess(_service.inference(_service.preprocess(data)))
