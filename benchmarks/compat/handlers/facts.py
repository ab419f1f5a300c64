"""Tell what the context of a handler holds, by type where the value depends on the machine."""

import os


def handle(data, context):
    """Answer each request with facts about context and process."""
    if data is None:
        return None
    properties = context.system_properties
    facts = {
        "model_name": context.model_name,
        "manifest": context.manifest,
        "properties": {name: type(properties[name]).__name__ for name in sorted(properties)},
        "batch_size": properties["batch_size"],
        "gpu_id": properties["gpu_id"],
        "server_name": properties["server_name"],
        "in_model_dir": os.path.realpath(os.getcwd()) == os.path.realpath(properties["model_dir"]),
        "context": type(context).__module__ + "." + type(context).__name__,
        "metrics": type(context.metrics).__name__,
        "processor": type(context.request_processor).__name__,
        "status": list(context.get_response_status(0)),
        "no_such_header": context.get_request_header(0, "X-No-Such-Header"),
    }
    return [facts] * len(data)
