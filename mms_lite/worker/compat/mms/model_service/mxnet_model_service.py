"""mms.model_service.mxnet_model_service: 0.x services on MXNet (deprecated). mxnet is imported when used."""

import json
import logging
import os
from typing import Any

from mms.model_service.model_service import SingleNodeService


def check_input_shape(inputs: list[Any], signature: dict[str, Any]) -> None:
    """Compare arrays with a signature; the first axis and axes declared 0 are free.

    Raises: ValueError where they differ.
    """
    declared = signature["inputs"]
    if not isinstance(inputs, list) or len(inputs) != len(declared):
        raise ValueError(f"expected a list of {len(declared)} inputs")
    for array, each in zip(inputs, declared, strict=True):
        want, have = each["data_shape"], array.shape
        fits = len(want) == len(have) and all(w in (0, h) for w, h in zip(want[1:], have[1:], strict=True))
        if not fits:
            raise ValueError(f"input {each['data_name']} has shape {have}, the signature says {want}")


class _MXNetService(SingleNodeService):
    """What both kinds share: device, signature and labels."""

    def __init__(self, model_name: str, model_dir: str, manifest: Any, gpu: int | None = None) -> None:
        import mxnet

        super().__init__(model_name, model_dir, manifest, gpu)
        self.model_name = model_name
        self.ctx = mxnet.cpu() if gpu is None else mxnet.gpu(int(gpu))
        self.param_filename = manifest["Model"].get("Parameters")
        path = os.path.join(model_dir, manifest["Model"]["Signature"])
        if not os.path.isfile(path):
            raise RuntimeError("Signature file is not found. Put signature.json into the model's folder.")
        with open(path, encoding="utf-8") as file:
            self._signature = json.load(file)
        labels = os.path.join(model_dir, "synset.txt")
        if os.path.isfile(labels):
            with open(labels, encoding="utf-8") as file:
                self.labels = [line.strip() for line in file]

    @property
    def signature(self) -> Any:  # type: ignore[override]
        """The signature: a property here, a method in ModelService, as in MMS."""
        return self._signature

    def ping(self) -> str:
        """Return MXNet's version."""
        import mxnet

        return str(mxnet.__version__)


class MXNetBaseService(_MXNetService):
    """A symbolic MXNet model: NAME-symbol.json and NAME-EPOCH.params, bound for batches of one."""

    def __init__(self, model_name: str, model_dir: str, manifest: Any, gpu: int | None = None) -> None:
        import mxnet

        super().__init__(model_name, model_dir, manifest, gpu)
        # Free axes, and the batch axis, are bound as 1.
        shapes = [
            (each["data_name"], (1, *(size or 1 for size in each["data_shape"][1:])))
            for each in self._signature["inputs"]
        ]
        prefix = os.path.join(model_dir, manifest["Model"]["Symbol"].removesuffix("-symbol.json"))
        symbol, arguments, auxiliary = mxnet.model.load_checkpoint(prefix, self._epoch())
        names = [name for name, _ in shapes]
        self.mx_model = mxnet.mod.Module(symbol, context=self.ctx, data_names=names, label_names=None)
        self.mx_model.bind(for_training=False, data_shapes=shapes)
        self.mx_model.set_params(arguments, auxiliary, allow_missing=True, allow_extra=True)

    def _epoch(self) -> int:
        stem = str(self.param_filename or "").removesuffix(".params")
        digits = stem[len(self.model_name) + 1 :]
        if digits.isdecimal():
            return int(digits)
        logging.info("no epoch in the name of the parameter file, taking 0")
        return 0

    def _preprocess(self, data: Any) -> Any:
        import mxnet

        return [mxnet.nd.array(each) for each in data]

    def _inference(self, data: Any) -> Any:
        import mxnet

        check_input_shape(data, self.signature)
        self.mx_model.forward(mxnet.io.DataBatch([each.as_in_context(self.ctx) for each in data]))
        outputs = self.mx_model.get_outputs()
        for each in outputs:
            each.wait_to_read()  # MXNet computes lazily: let the time be counted here
        return outputs

    def _postprocess(self, data: Any) -> Any:
        return [str(each.asnumpy().tolist()) for each in data]


class GluonImperativeBaseService(_MXNetService):
    """A Gluon network that the subclass builds and hands over as `net`."""

    def __init__(
        self, model_name: str, model_dir: str, manifest: Any, net: Any = None, gpu: int | None = None
    ) -> None:
        super().__init__(model_name, model_dir, manifest, gpu)
        self.net = net
        path = os.path.join(model_dir, self.param_filename or "")
        if net is not None and os.path.isfile(path):
            net.load_parameters(path, ctx=self.ctx)
        else:
            logging.info("no parameters to load for this imperative service")

    def _inference(self, data: Any) -> Any:
        check_input_shape(data, self.signature)
