"""mms.model_service.gluon_vision_service: image classification on Gluon, as MMS 0.x had it (deprecated)."""

from typing import Any

from mms.model_service.mxnet_model_service import GluonImperativeBaseService
from mms.utils.mxnet import image, ndarray

# ImageNet's, of RGB scaled to 0…1.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class GluonVisionService(GluonImperativeBaseService):
    """Decodes, resizes and normalises images; answers the five best labels by softmax."""

    def _preprocess(self, data: Any) -> Any:
        import mxnet

        arrays = []
        for encoded, each in zip(data, self.signature["inputs"], strict=False):
            height, width = each["data_shape"][2:]
            scaled = image.resize(image.read(encoded), width, height).astype("float32") / 255
            normal = image.color_normalize(scaled, mxnet.nd.array(_MEAN), mxnet.nd.array(_STD))
            arrays.append(image.transform_shape(normal).as_in_context(self.ctx))
        return arrays

    def _inference(self, data: Any) -> Any:
        super()._inference(data)
        return self.net(data[0]).softmax()

    def _postprocess(self, data: Any) -> Any:
        if not hasattr(self, "labels"):
            raise RuntimeError("no labels: put synset.txt into the archive, or set self.labels in __init__")
        return [ndarray.top_probability(data, self.labels, top=5)]
