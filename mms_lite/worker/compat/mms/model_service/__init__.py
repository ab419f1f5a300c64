"""mms.model_service: base classes of services written for MMS 0.x."""
