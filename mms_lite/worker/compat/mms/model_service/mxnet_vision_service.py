"""mms.model_service.mxnet_vision_service: image classification on MXNet, as MMS 0.x had it (deprecated)."""

from typing import Any

from mms.model_service.mxnet_model_service import MXNetBaseService
from mms.utils.mxnet import image, ndarray


class MXNetVisionService(MXNetBaseService):
    """Decodes and resizes images to the signature's (N, C, H, W); answers the five best labels."""

    def _preprocess(self, data: Any) -> Any:
        arrays = []
        for encoded, each in zip(data, self.signature["inputs"], strict=False):
            height, width = each["data_shape"][2:]
            arrays.append(image.transform_shape(image.resize(image.read(encoded), width, height)))
        return arrays

    def _postprocess(self, data: Any) -> Any:
        if not hasattr(self, "labels"):
            raise RuntimeError("no labels: put synset.txt into the archive, or set self.labels in __init__")
        return [ndarray.top_probability(each, self.labels, top=5) for each in data]
