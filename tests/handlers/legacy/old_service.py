"""A service as MMS 0.x had them, which needs no MXNet."""

import os
import sys

from mms.model_service.model_service import SingleNodeService


class Helper:
    """Not derived from a service: not what is served."""


class OldService(SingleNodeService):
    def __init__(self, model_name, model_dir, manifest, gpu=None):
        super().__init__(model_name, model_dir, manifest, gpu)
        self.facts = {"name": model_name, "dir": model_dir, "gpu": gpu, "manifest": manifest}

    def initialize(self, context):
        super().initialize(context)
        self.facts["same_manifest"] = context.manifest == self.facts["manifest"]
        self.facts["files"] = sorted(each for each in os.listdir() if not each.startswith("__"))

    def _inference(self, data):
        return {"data": data[0].decode(), "mxnet": "mxnet" in sys.modules, **self.facts}
