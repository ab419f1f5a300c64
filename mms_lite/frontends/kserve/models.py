"""What the protocol says of models: metadata, configuration and statistics, as JSON with proto's field names.

Integers of 64 bits are numbers, as Triton writes them and perf_analyzer reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mms_lite.frontends.kserve.expected import has_free_rows
from mms_lite.frontends.tensor_calls import visible
from mms_lite.metrics import VersionMetrics
from mms_lite.types import BYTES, NO_WORKERS, UNLOADED, ModelSpec, RepositoryEntry, Signature, TensorSpec

Json = dict[str, Any]

_NS = 1_000_000_000
_PUBLIC = ("", UNLOADED, NO_WORKERS)  # reasons that name nothing of the server
_ANY_NUMBER = (1 << 31) - 1  # of rows: what max_batch_size can hold


def metadata(spec: ModelSpec, signature: Signature, versions: Sequence[str]) -> Json:
    """Return a model's metadata. An input or output of any rank has the shape [-1]."""
    seen = visible(signature)
    return {
        "name": spec.name,
        "versions": list(versions),
        "platform": _platform(spec),
        "inputs": [_tensor(each) for each in seen.inputs],
        "outputs": [_tensor(each) for each in seen.outputs],
    }


def config(spec: ModelSpec, signature: Signature) -> Json:
    """Return a ModelConfig: that of a Triton repository, else what it would say of this model.

    The first axis of a model whose inputs and outputs all have a free one is that of the batch. Its requests
    may have any number of rows; its batch_size is up to how many rows the server joins them.
    """
    if spec.config is not None:
        return {"name": spec.name, **spec.config}
    seen = visible(signature)
    shapes = [each.shape for each in (*seen.inputs, *seen.outputs)]
    batches = has_free_rows(seen) and all(shape is not None and len(shape) > 1 for shape in shapes)
    described = {
        "name": spec.name,
        "platform": "",
        "backend": _platform(spec),
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": _ANY_NUMBER if batches else 0,
        "input": [{**_io(each, batches), "format": "FORMAT_NONE", "optional": False} for each in seen.inputs],
        "output": [{**_io(each, batches), "label_filename": ""} for each in seen.outputs],
        "instance_group": [
            {
                "name": f"{spec.name}_0",
                "kind": "KIND_GPU" if spec.devices else "KIND_CPU",
                "count": spec.max_workers,
                "gpus": list(spec.devices),
            }
        ],
        "default_model_filename": "",
        "parameters": {},
        "model_warmup": [],
    }
    if batches and spec.batch_size > 1:
        described["dynamic_batching"] = {
            "preferred_batch_size": [spec.batch_size],
            "max_queue_delay_microseconds": spec.max_batch_delay_ms * 1000,
            "preserve_ordering": False,
        }
    return described


def statistics(spec: ModelSpec, seen: VersionMetrics) -> Json:
    """Return a version's ModelStatistics. What a request spent outside of the queue counts as inference."""
    answered = sum(seen.total_s.counts) - seen.failed
    spent_s = seen.total_s.sum - seen.failed_s
    nothing = _duration(0, 0.0)
    return {
        "name": spec.name,
        "version": spec.version,
        "last_inference": int(seen.last_batch_at * 1000),
        "inference_count": seen.answered_rows,
        "execution_count": sum(count for count, _ in seen.batches.values()),
        "inference_stats": {
            "success": _duration(answered, spent_s),
            "fail": _duration(seen.failed, seen.failed_s),
            "queue": _duration(answered, seen.answered_queue_s),
            "compute_input": _duration(answered, 0.0),
            "compute_infer": _duration(answered, spent_s - seen.answered_queue_s),
            "compute_output": _duration(answered, 0.0),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(count, 0.0),
                "compute_infer": _duration(count, total_s),
                "compute_output": _duration(count, 0.0),
            }
            for rows, (count, total_s) in sorted(seen.batches.items())
        ],
        "memory_usage": [],
    }


def index_entry(entry: RepositoryEntry) -> Json:
    """Return an entry of the repository's index; what was never loaded has a name only.

    Why a version failed may name files of the server: that is for those who manage it.
    """
    reason = entry.reason if entry.reason in _PUBLIC else "failed to load"
    said = {
        "name": entry.name.encode("utf-8", "replace").decode(),  # a folder's may be no text
        "version": entry.version,
        "state": entry.state.value if entry.state is not None else "",
        "reason": reason,
    }
    return {key: value for key, value in said.items() if value or key == "name"}


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * _NS)}


def _platform(spec: ModelSpec) -> str:
    """Return what runs the model: its configuration's platform or backend, else the archive's backend."""
    stated: Mapping[str, Any] = spec.config or {}
    archive = (spec.manifest or {}).get("model")
    backend = archive.get("backend") if isinstance(archive, Mapping) else None
    return str(stated.get("platform") or stated.get("backend") or backend or "python")


def _tensor(spec: TensorSpec) -> Json:
    shape = (-1,) if spec.shape is None else spec.shape
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(shape)}


def _io(spec: TensorSpec, batches: bool) -> Json:
    shape = (-1,) if spec.shape is None else spec.shape
    kind = "STRING" if spec.datatype == BYTES else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(shape[1:] if batches else shape)}
