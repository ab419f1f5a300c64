"""mms.model_service: base classes of services written for MMS 0.x."""

from mms.model_service import model_service, mxnet_model_service, mxnet_vision_service

__all__ = ["model_service", "mxnet_model_service", "mxnet_vision_service"]
