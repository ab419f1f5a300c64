"""What the KServe v2 protocol and Triton's extensions of it do, whether they come by REST or gRPC.

The transports only read and write messages: rules, texts and names of fields are here and in its neighbours.
Protocol: github.com/kserve/open-inference-protocol; extensions: Triton Inference Server, docs/protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mms_lite.engine.engine import Engine
from mms_lite.errors import InvalidRequest, ModelNotFound, ServingError, VersionNotFound
from mms_lite.frontends import tensor_calls
from mms_lite.frontends.kserve import models
from mms_lite.frontends.kserve.classification import classify, read_labels
from mms_lite.frontends.kserve.errors import of_lookup, of_request
from mms_lite.frontends.kserve.expected import Expected
from mms_lite.frontends.message import HttpRequest, random_id
from mms_lite.shared import SharedBytes
from mms_lite.types import (
    BYTES,
    InferRequest,
    InferResponse,
    ModelSpec,
    RepositoryState,
    Signature,
    Tensor,
    VersionState,
)

EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
_NOT_FOR_MODELS = frozenset(("timeout", "priority", "binary_data_output"))  # parameters that we act on
_SCHEDULING: dict[str, tuple[type, ...]] = {
    "timeout": (int,),
    "priority": (int,),
    "sequence_id": (int, str),
    "sequence_start": (bool,),
    "sequence_end": (bool,),
}
_THREAD_BYTES = 1 << 20
_MOST_KNOWN = 1000  # versions, between two of which all is forgotten


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """An output that a client wants. `binary` None leaves it to the request, and is for REST alone.

    `classification` 0 is the tensor itself, k its k highest elements as BYTES.
    """

    name: str
    binary: bool | None = None
    classification: int = 0


class KServeService:
    """The protocol's verbs over one engine. Answers are proto-JSON with the fields' own names.

    `authorise` is called before models are loaded or unloaded, and raises for who may not.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        server_name: str,
        server_version: str,
        authorise: Callable[[HttpRequest], None],
    ) -> None:
        self.engine = engine
        self._name = server_name
        self._version = server_version
        self._authorise = authorise
        self._known: dict[tuple[str, str | None], Expected] = {}

    def live(self) -> bool:
        """Tell that the server is there."""
        return True

    def ready(self) -> bool:
        """Tell whether all start-up models are loaded, and the server does not stop."""
        return not self.engine.starting and self.engine.ready()

    def model_ready(self, name: str, version: str | None) -> bool:
        """Tell whether a version, or the default one, can answer.

        Raises:
            ModelNotFound: it is not there.
        """
        try:
            return self.engine.describe(name, _asked(version)).state is VersionState.READY
        except ServingError as error:
            raise _of_lookup(error, name, version) from error

    def server_metadata(self) -> dict[str, Any]:
        """Return name, version and the extensions that this server has."""
        return {"name": self._name, "version": self._version, "extensions": list(EXTENSIONS)}

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        """Return inputs, outputs and versions: the one that is asked for, or all that can answer.

        Raises:
            ModelNotFound, ModelNotReady: it is not there, or not yet.
        """
        spec, signature = self._interface(name, version)
        if _asked(version) is not None:
            return models.metadata(spec, signature, [spec.version])
        ready = [each.spec.version for each in self.engine.versions(name) if each.state is VersionState.READY]
        return models.metadata(spec, signature, sorted(ready, key=_by_number))

    def model_config(self, name: str, version: str | None) -> dict[str, Any]:
        """Return a ModelConfig.

        Raises:
            ModelNotFound, ModelNotReady: it is not there, or not yet.
        """
        return models.config(*self._interface(name, version))

    def statistics(self, name: str, version: str | None) -> dict[str, Any]:
        """Return what a version, or all of a model, or without a name all of all models, have done.

        Raises:
            InvalidRequest: it is not there.
        """
        try:
            found = self.engine.statistics(name, _asked(version))
        except ModelNotFound as error:
            raise InvalidRequest(f"requested model '{name}' is not available") from error
        return {"model_stats": [models.statistics(status.spec, seen) for status, seen in found]}

    def log_settings(self) -> dict[str, Any]:
        """Return how logs are written, which nobody changes here (logging extension)."""
        return {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def trace_settings(self) -> dict[str, Any]:
        """Return that nothing is traced (trace extension)."""
        return {
            "trace_level": ["OFF"],
            "trace_rate": "1000",
            "trace_count": "-1",
            "log_frequency": "0",
            "trace_file": "",
            "trace_mode": "triton",
        }

    def repository_index(self, *, only_ready: bool) -> list[dict[str, Any]]:
        """Return every model that is loaded, was, or could be."""
        entries = self.engine.repository_index()
        return [
            models.index_entry(each)
            for each in entries
            if not only_ready or each.state is RepositoryState.READY
        ]

    async def load(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        """Load a model, or load it anew. Parameters: "config", JSON text, and files by "file:PATH" as bytes.

        Raises:
            Forbidden, Unauthorized: the caller may not.
            ServingError: the model cannot be loaded.
        """
        self._authorise(caller)
        config = parameters.get("config")
        if config is not None and not isinstance(config, str):
            raise InvalidRequest("Unable to parse 'config': expected a string")
        files = {key.partition(":")[2]: parameters[key] for key in parameters if key.startswith("file:")}
        await self.engine.load_model(name, config=config, files=files or None)

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        """Unload a model; with the parameter "unload_dependents" also the models that it is made of.

        Raises:
            Forbidden, Unauthorized: the caller may not.
            ServingError: it is not loaded.
        """
        self._authorise(caller)
        dependents = parameters.get("unload_dependents", False)
        if not isinstance(dependents, bool):
            raise InvalidRequest("Unable to parse 'unload_dependents': expected a boolean")
        await self.engine.unload_model(name, dependents=dependents)

    async def infer(
        self, request: InferRequest, wanted: Sequence[RequestedOutput] | None, *, call_id: str = ""
    ) -> InferResponse:
        """Check a request, ask the model and return the outputs that are wanted, in that order.

        The request's id is the client's and may be empty; handlers and logs then have `call_id`.

        Raises:
            ServingError: it does not fit, or the model did not answer.
        """
        try:
            expected = self._expected(request.model, request.version)
            asked = await self._checked(expected, request, wanted or (), call_id)
            try:
                answer = await tensor_calls.infer(self.engine, asked)
            except ServingError as error:
                raise _of_lookup(error, request.model, request.version) from error
            outputs = await self._outputs(expected, answer.outputs, wanted or ())
        except ServingError as error:
            told = of_request(error, request.id)
            if told is error:
                raise
            raise told from error
        # Not `replace`, which takes longer than all the rest here.
        return InferResponse(
            request.id, answer.model, answer.version, outputs, answer.parameters, answer.headers
        )

    def raw_input(self, name: str, version: str | None, body: bytearray | SharedBytes) -> Tensor:
        """Return the input that a body without a header is (binary tensor extension, raw request).

        Raises:
            ModelNotFound, ModelNotReady: there is no such model, or not yet.
            BadTensor: the model's inputs do not tell what the body is.
        """
        expected = self._expected(name, version)
        try:
            return expected.raw_input(body)
        except ServingError as error:
            raise of_request(error, "") from error

    def _expected(self, name: str, version: str | None) -> Expected:
        """Return what a version takes and gives, kept for as long as it is what it was."""
        spec, signature = self._interface(name, version)
        known = self._known.get((name, version))
        if known is None or known.spec is not spec or known.signature is not signature:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[name, version] = Expected.of(spec, signature)
        return known

    async def _checked(
        self, expected: Expected, request: InferRequest, wanted: Sequence[RequestedOutput], call_id: str
    ) -> InferRequest:
        """Return the request as the model gets it.

        Raises:
            ServingError: it does not fit.
        """
        inputs = request.inputs
        long_text = sum(len(each.data) for each in inputs if each.datatype == BYTES) > _THREAD_BYTES
        if long_text:
            await asyncio.to_thread(expected.check, inputs)
        else:
            expected.check(inputs)
        names = [each.name for each in wanted]
        expected.check_outputs(names)
        if expected.raw:
            inputs = [_in_place(each) for each in inputs]
        every = not names or expected.raw or len(names) == len(expected.outputs)
        parameters = request.parameters
        deadline = request.deadline
        if parameters:
            deadline = _deadline(parameters, deadline)
            parameters = {key: parameters[key] for key in parameters if key not in _NOT_FOR_MODELS}
        return InferRequest(
            request.id or call_id or random_id(),
            request.model,
            _asked(request.version),
            inputs,
            # In the model's order, so that requests for the same outputs can share a batch.
            None if every else [name for name in expected.outputs if name in names],
            parameters,
            request.headers,
            deadline,
        )

    async def _outputs(
        self, expected: Expected, outputs: Sequence[Tensor], wanted: Sequence[RequestedOutput]
    ) -> Sequence[Tensor]:
        if not wanted:
            return outputs
        by_name = {each.name: each for each in outputs}
        chosen = []
        for each in wanted:
            tensor = by_name.get(each.name)
            if tensor is None:
                if expected.raw:
                    raise expected.unexpected_output(each.name)
                continue  # the model left it out, as Triton's Python models may
            if each.classification:
                labels = await self._labels(expected, each.name)
                tensor = classify(tensor, each.classification, labels, batched=expected.batches)
            chosen.append(tensor)
        return chosen

    async def _labels(self, expected: Expected, output: str) -> Sequence[str]:
        found = expected.labels.get(output)
        if found is None:
            found = await asyncio.to_thread(read_labels, expected.spec, output)
            expected.labels[output] = found
        return found

    def _interface(self, name: str, version: str | None) -> tuple[ModelSpec, Signature]:
        try:
            return self.engine.interface(name, _asked(version))
        except ServingError as error:
            raise _of_lookup(error, name, version) from error


def _asked(version: str | None) -> str | None:
    """Return the version that a client names; none, or -1 as in Triton's API, is the default one."""
    return None if version in ("", "-1") else version


def _of_lookup(error: ServingError, name: str, version: str | None) -> ServingError:
    """Return what is said of a version that cannot be looked up; those of Triton are whole numbers."""
    version = _asked(version)
    if isinstance(error, VersionNotFound) and version is not None and not version.isdecimal():
        return InvalidRequest(f"failed to get model version from specified version string '{version}'")
    return of_lookup(error, name, version)


def _by_number(version: str) -> tuple[int, str]:
    return (int(version), "") if version.isdecimal() else (0, version)


def _in_place(tensor: Tensor) -> Tensor:
    """Return a tensor of bodies whose data can be read here: each body is copied out of it next."""
    data = tensor.data
    if tensor.datatype == BYTES and isinstance(data, SharedBytes):
        return replace(tensor, data=data.view)
    return tensor


def _deadline(parameters: Mapping[str, Any], deadline: float | None) -> float | None:
    """Check the parameters that schedule a request; return its deadline, which `timeout` (µs) may bring near.

    Raises:
        InvalidRequest: one is not of its type, or reserved.
    """
    for name, value in parameters.items():
        kinds = _SCHEDULING.get(name)
        if kinds is not None and (type(value) not in kinds or (type(value) is int and value < 0)):
            raise InvalidRequest(f"Unable to parse '{name}'")
        if name.startswith("triton_"):
            raise InvalidRequest(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be"
                " specified."
            )
    timeout_us: int = parameters.get("timeout", 0)
    if not timeout_us:
        return deadline
    until = time.monotonic() + timeout_us / 1e6
    return until if deadline is None else min(deadline, until)
