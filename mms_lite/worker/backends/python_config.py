"""What the Triton Python backend tells a model about itself: its configuration, its arguments, its tensors.

Apart from the backend, which imports the model's code and runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mms_lite.errors import InvalidArchive
from mms_lite.tensors import DTYPES
from mms_lite.types import BYTES, TensorSpec
from mms_lite.worker.backends import BackendSettings, declared
from mms_lite.worker.compat import triton_python_backend_utils as pb_utils
from mms_lite.worker.completion import data_type, described

_COMPLETING = "TritonPythonModel.auto_complete_config"
_EXAMPLE = (
    '{"backend": {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [-1, 3]}], '
    '"outputs": [{"name": "OUTPUT0", "datatype": "FP32", "shape": [-1, 2]}]}}'
)


Tensors = tuple[TensorSpec, ...]


def read(
    source: Path, settings: BackendSettings, model_class: Any
) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Return a model's configuration, completed by its class, and its inputs and outputs.

    What the archive states of tensors takes the place of what the configuration says.

    Raises:
        InvalidArchive: nobody says what the model takes and gives, or it is decoupled.
        Exception: whatever the class's `auto_complete_config` raises.
    """
    config = {**_blank(source, settings), **json.loads(json.dumps(settings.config or {}))}
    complete = getattr(model_class, "auto_complete_config", None)
    if complete is not None:
        completed = complete(pb_utils.ModelConfig(json.dumps(config)))
        if not isinstance(completed, pb_utils.ModelConfig):
            raise InvalidArchive("auto_complete_config does not return the configuration that it gets")
        config = completed.as_dict()
    if pb_utils.using_decoupled_model_transaction_policy(config):
        raise InvalidArchive("the model is decoupled, which is not supported by mms-lite yet")
    inputs = _specs(config, "input", settings.inputs)
    outputs = _specs(config, "output", settings.outputs)
    if not inputs or not outputs:
        raise InvalidArchive(_nobody_says(source, settings))
    _state(config, "input", inputs)
    _state(config, "output", outputs)
    return config, inputs, outputs


def arguments(config: Mapping[str, Any], source: Path, settings: BackendSettings) -> dict[str, str]:
    """Return what `initialize` gets (Triton Python backend, README, "initialize").

    The repository is the model's folder, in which a Triton repository has one for each version.
    """
    folder = source.parent
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU" if settings.device is None else "GPU",
        "model_instance_name": instance(settings),
        "model_instance_device_id": str(settings.device or 0),
        "model_repository": str(folder if settings.config is None else folder.parent),
        "model_version": settings.version,
        "model_name": settings.model,
    }


def instance(settings: BackendSettings) -> str:
    """Return the name of the instance of a model that one worker is, as Triton writes it."""
    return f"{settings.model}_0_{settings.instance}"


def _blank(source: Path, settings: BackendSettings) -> dict[str, Any]:
    """Return a configuration without tensors (Triton, model_config.proto)."""
    return {
        "name": settings.model,
        "platform": "",
        "backend": "python",
        "max_batch_size": 0,
        "input": [],
        "output": [],
        "default_model_filename": source.name,
        "model_transaction_policy": {"decoupled": False},
        "parameters": {key: {"string_value": str(value)} for key, value in settings.options.items()},
    }


def _nobody_says(source: Path, settings: BackendSettings) -> str:
    advice = "state it in the handler config, such as " + _EXAMPLE
    if settings.config is not None:
        advice = "state it as input and output in config.pbtxt"
    return f"{source.name} does not say what the model takes and gives: {advice}, or add it in {_COMPLETING}"


def _specs(config: Mapping[str, Any], side: str, stated: Tensors) -> Tensors:
    """Return one side's tensors: the model's own with those that the archive states in their place."""
    batch = (-1,) if config["max_batch_size"] > 0 else ()
    found = []
    for each in config[side]:
        name = str(each["data_type"]).removeprefix("TYPE_")
        datatype = BYTES if name == "STRING" else name
        if datatype not in DTYPES:
            raise InvalidArchive(
                f"the {side} {each['name']!r} has the data_type {each['data_type']!r}, "
                f"which is none of {', '.join(map(data_type, DTYPES))}"
            )
        _check(each, side)
        shape = each["reshape"]["shape"] if "reshape" in each else each["dims"]
        found.append(TensorSpec(str(each["name"]), datatype, (*batch, *shape)))
    return declared(found, stated, side) if found else stated


def _check(tensor: Mapping[str, Any], side: str) -> None:
    """Check what the model's class may have said of a tensor, which is told to the server.

    Raises:
        InvalidArchive: it is not what a configuration holds.
    """
    name, dims, optional = tensor["name"], tensor["dims"], tensor.get("optional", False)
    if not isinstance(name, str) or not name:
        raise InvalidArchive(f"an {side} of auto_complete_config has the name {name!r}, which is none")
    lengths = dims if isinstance(dims, list) else [None]
    if not all(type(length) is int and (length == -1 or 0 < length < 1 << 63) for length in lengths):
        raise InvalidArchive(f"the {side} {name!r} has the dims {dims!r}, which are no lengths")
    if not isinstance(optional, bool):
        raise InvalidArchive(f"the {side} {name!r} is optional: {optional!r}, neither true nor false")


def _state(config: dict[str, Any], side: str, tensors: Tensors) -> None:
    """Have the configuration say the same of its tensors; the dims of reshaped ones are the clients'."""
    known = {each["name"]: each for each in config[side]}
    batched = config["max_batch_size"] > 0
    said = []
    for spec in tensors:
        each = known.get(spec.name, {})
        said.append(each if "reshape" in each else {**each, **described(spec, batched=batched)})
    config[side] = said
