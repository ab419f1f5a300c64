"""What the KServe v2 protocol and Triton's extensions of it do, whether they come by REST or gRPC.

The transports only read and write messages: rules, texts and names of fields are here and in its neighbours.
Protocol: github.com/kserve/open-inference-protocol; extensions: Triton Inference Server, docs/protocol.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mms_lite.engine.engine import Engine
from mms_lite.errors import (
    BadTensor,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    QueueFull,
    ServingError,
    VersionNotFound,
)
from mms_lite.frontends import tensor_calls
from mms_lite.frontends.kserve import models
from mms_lite.frontends.kserve.classification import classify, read_labels
from mms_lite.frontends.kserve.errors import of_lookup, of_request
from mms_lite.frontends.kserve.expected import Expected
from mms_lite.frontends.message import HttpRequest, random_id, shown
from mms_lite.shared import SharedBytes
from mms_lite.types import (
    BYTES,
    InferRequest,
    InferResponse,
    ModelSpec,
    RepositoryState,
    Signature,
    Tensor,
)

EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
MOST_PARAMETERS = 1000  # of a request
_NOT_FOR_MODELS = frozenset(("timeout", "priority", "binary_data_output"))  # parameters that we act on
_SCHEDULING: dict[str, tuple[type, ...]] = {
    "timeout": (int,),
    "priority": (int,),
    "sequence_id": (int, str),
    "sequence_start": (bool,),
    "sequence_end": (bool,),
}
_MOST_ID = 1024  # characters: it goes into every line that is logged of the request
_MOST_CHARACTERS = 64 << 10  # of the names and values of parameters together
_NO_LIMIT_US = 10**13  # four months: whoever says more means no limit
_THREAD_ELEMENTS = 1 << 14  # that Python looks at one by one: some milliseconds
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
            self.engine.interface(name, asked_version(version))
            return True
        except ModelNotReady:
            return False
        except ModelNotFound as error:
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
        if asked_version(version) is not None:
            return models.metadata(spec, signature, [spec.version])
        return models.metadata(spec, signature, self.engine.ready_versions(name))

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
            found = self.engine.statistics(name, asked_version(version))
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

    async def repository_index(self, *, only_ready: bool) -> list[dict[str, Any]]:
        """Return every model that is loaded, was, or could be."""
        entries = await self.engine.repository_index()
        return [
            models.index_entry(each)
            for each in entries
            if not only_ready or each.state is RepositoryState.READY
        ]

    def authorise(self, caller: HttpRequest) -> None:
        """Check that a caller may load and unload, before more of its request is looked at.

        Raises:
            Forbidden, Unauthorized: it may not.
        """
        self._authorise(caller)

    async def load(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        """Load a model, or load it anew. Parameters: "config", JSON text, and files by "file:PATH" as bytes.

        Raises:
            Forbidden, Unauthorized: the caller may not.
            ServingError: the model cannot be loaded.
        """
        self.authorise(caller)
        config = parameters.get("config")
        if config is not None and not isinstance(config, str):
            raise InvalidRequest("Unable to parse 'config': expected a string")
        files = {key.partition(":")[2]: parameters[key] for key in parameters if key.startswith("file:")}
        for path, content in files.items():
            if not isinstance(content, bytes):
                raise InvalidRequest(f"Unable to parse 'file:{path}': expected bytes")
        await self.engine.load_model(name, config=config, files=files or None)

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: HttpRequest) -> None:
        """Unload a model; with the parameter "unload_dependents" also the models that it is made of.

        Raises:
            Forbidden, Unauthorized: the caller may not.
            ServingError: it is not loaded.
        """
        self.authorise(caller)
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
            expected = self.expected(request.model, request.version)
            asked = await self._checked(expected, request, wanted or (), call_id)
            answer = await self._ask(asked)
            outputs = await self._outputs(expected, answer.outputs, wanted or ())
        except (BadTensor, QueueFull) as error:  # no name for the new one: it would hold what holds it
            raise of_request(error, request.id) from error
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
        expected = self.expected(name, version)
        try:
            return expected.raw_input(body)
        except BadTensor as error:
            raise of_request(error, "") from error

    async def _ask(self, asked: InferRequest) -> InferResponse:
        try:
            return await tensor_calls.infer(self.engine, asked)
        except (ModelNotFound, ModelNotReady):
            self._interface(asked.model, asked.version)  # its error, if the model has gone by now
            raise  # else it is of another model, which this one asked

    def expected(self, name: str, version: str | None) -> Expected:
        """Return what a version that a request is for takes and gives, kept for as long as it is what it was.

        Raises:
            ModelNotFound, ModelNotReady: it is not there, or not yet.
        """
        spec, signature = self._interface(name, version, asking=True)
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
        if len(request.id) > _MOST_ID:
            raise InvalidRequest(f"the id of a request has at most {_MOST_ID} characters")
        if sum(_most_elements(each) for each in inputs if each.datatype == BYTES) > _THREAD_ELEMENTS:
            await asyncio.to_thread(expected.check, inputs)
        else:
            expected.check(inputs)
        names = [each.name for each in wanted]
        expected.check_outputs(names)
        known = names if expected.raw else expected.outputs  # those of raw models, their answers tell
        every = not names or (not expected.raw and len(names) == len(known))
        chosen = set(names)
        parameters = request.parameters
        deadline = request.deadline
        if parameters:
            _check_parameters(parameters)
            deadline = _deadline(parameters, deadline)
            parameters = {key: parameters[key] for key in parameters if key not in _NOT_FOR_MODELS}
        return InferRequest(
            request.id or call_id or random_id(),
            request.model,
            asked_version(request.version),
            inputs,
            # In the model's order, so that requests for the same outputs can share a batch.
            None if every else [name for name in known if name in chosen],
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
                    raise expected.unexpected_output(each.name, by_name)
                continue  # the model left it out, as Triton's Python models may
            if each.classification:
                labels = await self._labels(expected, each.name)
                how = partial(classify, tensor, each.classification, labels, batched=expected.batches)
                tensor = await asyncio.to_thread(how) if _elements(tensor) > _THREAD_ELEMENTS else how()
            chosen.append(tensor)
        return chosen

    async def _labels(self, expected: Expected, output: str) -> Sequence[str]:
        found = expected.labels.get(output)
        if found is None:
            found = await asyncio.to_thread(read_labels, expected.spec, output)
            expected.labels[output] = found
        return found

    def _interface(
        self, name: str, version: str | None, *, asking: bool = False
    ) -> tuple[ModelSpec, Signature]:
        try:
            return self.engine.interface(name, asked_version(version), asking=asking)
        except (ModelNotFound, ModelNotReady) as error:
            raise _of_lookup(error, name, version) from error


def asked_version(version: str | None) -> str | None:
    """Return the version that a client names; none, 0, or -1 as in Triton's API, is the default one."""
    return None if version in ("", "-1", "0") else version


def _of_lookup(error: ServingError, name: str, version: str | None) -> ServingError:
    """Return what is said of a version that cannot be looked up; those of Triton are whole numbers."""
    version = asked_version(version)
    if isinstance(error, VersionNotFound) and version is not None and not version.isdecimal():
        return InvalidRequest(f"failed to get model version from specified version string '{shown(version)}'")
    return of_lookup(error, name, version)


def _elements(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _most_elements(tensor: Tensor) -> int:
    """Return how many elements a BYTES tensor may have, each of which begins with its length."""
    return min(_elements(tensor), len(tensor.data) // 4)


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check that the parameters of a request are what the protocol allows, and few.

    Raises:
        InvalidRequest: they are not.
    """
    if len(parameters) > MOST_PARAMETERS:
        raise InvalidRequest(f"a request has at most {MOST_PARAMETERS} parameters")
    size = 0
    for name, value in parameters.items():
        if name in _NOT_FOR_MODELS:
            continue
        kind = type(value)
        if kind not in (str, int, float, bool):
            raise InvalidRequest(
                f"Unable to parse 'parameters': '{shown(name)}' is no text, number or boolean"
            )
        if kind is float and not math.isfinite(value):
            raise InvalidRequest(f"Unable to parse 'parameters': '{shown(name)}' is no finite number")
        if kind is int and not -(2**63) <= value < 2**64:
            raise InvalidRequest(f"Unable to parse 'parameters': '{shown(name)}' is beyond 64 bits")
        size += len(name) + (len(value) if kind is str else 8)
    if size > _MOST_CHARACTERS:
        raise InvalidRequest(f"the parameters of a request have at most {_MOST_CHARACTERS} characters")


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
    if not 0 < timeout_us < _NO_LIMIT_US:
        return deadline
    until = time.monotonic() + timeout_us / 1e6
    return until if deadline is None else min(deadline, until)
