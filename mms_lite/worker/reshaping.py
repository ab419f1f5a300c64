"""Tensors that clients see in another shape than the model: `reshape` of a Triton configuration.

Apart from the predictor, which checks what clients send, and from the backends, which run what is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mms_lite.errors import HandlerError, ServingError
from mms_lite.tensors import Array
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import Answer, Backend, Request, RequestBackend

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """A tensor's shape for clients and for the model. Their lengths of -1 are the same ones, in order."""

    client: Shape
    model: Shape


def reshaped(backend: Backend, config: Mapping[str, Any] | None) -> Backend:
    """Return a backend with the shapes that clients see; itself where the configuration states no others."""
    inputs = _shapes(backend.inputs, (config or {}).get("input", ()))
    outputs = _shapes(backend.outputs, (config or {}).get("output", ()))
    if not inputs and not outputs:
        return backend
    if isinstance(backend, RequestBackend):
        return _ReshapedRequests(backend, inputs, outputs)
    return _Reshaped(backend, inputs, outputs)


class _Reshaped:
    """A backend whose arrays are views in other shapes on their way in and out."""

    def __init__(
        self, backend: Backend, inputs: Mapping[str, _Shapes], outputs: Mapping[str, _Shapes]
    ) -> None:
        self.inputs: Sequence[TensorSpec] = _for_clients(backend.inputs, inputs)
        self.outputs: Sequence[TensorSpec] = _for_clients(backend.outputs, outputs)
        self.metadata = backend.metadata
        self._backend = backend
        self._input_shapes = inputs
        self._output_shapes = outputs

    def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run the model once; see `Backend`.

        Raises:
            ServingError: as the backend; HandlerError for an output that has no such shape.
        """
        return self._for_client(self._backend.infer(self._for_model(inputs), outputs))

    def close(self) -> None:
        """Let go of the model."""
        self._backend.close()

    def _for_model(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        shapes = self._input_shapes
        return {
            name: _view(array, shapes[name].client, shapes[name].model) if name in shapes else array
            for name, array in inputs.items()
        }

    def _for_client(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        found = dict(outputs)
        for name in self._output_shapes.keys() & found.keys():
            shapes = self._output_shapes[name]
            try:
                found[name] = _view(found[name], shapes.model, shapes.client)
            except ValueError as error:
                raise HandlerError(
                    f"the output {name!r} has the shape {list(found[name].shape)}, which is not "
                    f"{list(shapes.model)}, as configured"
                ) from error
        return found


class _ReshapedRequests(_Reshaped):
    """The same for a model that takes the requests of a batch one by one."""

    def __init__(
        self, backend: RequestBackend, inputs: Mapping[str, _Shapes], outputs: Mapping[str, _Shapes]
    ) -> None:
        super().__init__(backend, inputs, outputs)
        self.optional = backend.optional
        self.config = backend.config
        self._requests = backend

    def infer_requests(self, requests: Sequence[Request]) -> list[Answer | ServingError]:
        """Answer checked requests; see `RequestBackend`.

        Raises:
            ServingError: as the backend.
        """
        asked = [
            Request(self._for_model(each), outputs=each.outputs, id=each.id, parameters=each.parameters)
            for each in requests
        ]
        return [self._answer(each) for each in self._requests.infer_requests(asked)]

    def _answer(self, answer: Answer | ServingError) -> Answer | ServingError:
        if isinstance(answer, ServingError):
            return answer
        try:
            return Answer(self._for_client(answer), parameters=answer.parameters)
        except HandlerError as error:
            return error


def _shapes(specs: Sequence[TensorSpec], configured: Sequence[Mapping[str, Any]]) -> dict[str, _Shapes]:
    """Return the shapes of the tensors that have two; the model's own may have an axis for the batch."""
    models = {spec.name: spec.shape for spec in specs}
    found = {}
    for tensor in configured:
        shape = models.get(tensor["name"])
        if "reshape" in tensor and shape is not None:
            batch = shape[: len(shape) - len(tensor["reshape"]["shape"])]
            found[tensor["name"]] = _Shapes((*batch, *tensor["dims"]), shape)
    return found


def _for_clients(specs: Sequence[TensorSpec], shapes: Mapping[str, _Shapes]) -> tuple[TensorSpec, ...]:
    return tuple(
        replace(spec, shape=shapes[spec.name].client) if spec.name in shapes else spec for spec in specs
    )


def _view(array: Array, source: Shape, target: Shape) -> Array:
    """Return an array of the shape `source` in the shape `target`.

    Raises:
        ValueError: it has another shape.
    """
    open_lengths = iter([have for want, have in zip(source, array.shape, strict=True) if want == -1])
    return array.reshape([next(open_lengths) if length == -1 else length for length in target])
