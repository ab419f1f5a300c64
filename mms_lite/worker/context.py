"""What a handler sees of its batch: ids, request headers, deadlines, and the answer's status and headers.

Names and behaviour are MMS's (MMS reference, section 8.2), so that its handlers run unchanged; what a
handler sets is checked here, where the handler can be told, and not at the front end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mms_lite.worker import parameters
from mms_lite.worker.metrics_store import MetricsStore

_SPLITS_A_RESPONSE = re.compile("[\r\n\0]")
_NOT_IN_A_HEADER_NAME = re.compile(r"[\x00-\x20\x7f:]")


class PredictionException(Exception):
    """Raised by a handler to choose the message and HTTP status of its error."""

    def __init__(self, message: str, error_code: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = error_code

    def __str__(self) -> str:
        return f"{self.message} : {self.error_code}"


class Headers(dict[str, Any]):
    """A dict with the original names as keys, in which `get`, `[]` and `in` ignore letter case."""

    def __missing__(self, key: object) -> Any:
        name = self._name_like(key)
        if name is None:
            raise KeyError(key)
        return super().__getitem__(name)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._name_like(key) is not None

    def get(self, key: object, default: Any = None) -> Any:
        """Return the value of the header, or default."""
        try:
            return self[key]  # type: ignore[index]
        except KeyError:
            return default

    def replace(self, name: str, value: str) -> None:
        """Set a header under this spelling of its name, and drop every other spelling."""
        while (old := self._name_like(name)) is not None:
            del self[old]
        self[name] = value

    def _name_like(self, key: object) -> str | None:
        if not isinstance(key, str):
            return None
        lower = key.lower()
        # From the end: of a header sent twice, the last one counts.
        return next((name for name in reversed(self) if name.lower() == lower), None)


class RequestProcessor:
    """One request's headers, and the status and headers of its answer."""

    def __init__(self, request_header: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        self._request_header = request_header  # made Headers when somebody asks: most handlers never do
        self._response_header = Headers()
        self._status_code = 200
        self._reason_phrase: str | None = None

    def get_request_property(self, key: str) -> Any:
        """Return a request header, or None."""
        return self.get_request_properties().get(key)

    def get_request_properties(self) -> Headers:
        """Return all request headers."""
        if not isinstance(self._request_header, Headers):
            self._request_header = Headers(self._request_header)
        return self._request_header

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Set the answer's status.

        Raises: ValueError for what cannot be a final HTTP status line.
        """
        status = int(code)
        if not 200 <= status <= 599:
            raise ValueError(f"{status} is not a final HTTP status")
        phrase = None if reason_phrase is None else str(reason_phrase)
        if phrase and _SPLITS_A_RESPONSE.search(phrase):
            raise ValueError("the reason phrase holds a line break or NUL")
        self._status_code = status
        self._reason_phrase = phrase

    def get_response_status_code(self) -> int:
        """Return the answer's status."""
        return self._status_code

    def get_response_status_phrase(self) -> str | None:
        """Return the answer's reason phrase, None if the handler gave none."""
        return self._reason_phrase

    def add_response_property(self, key: str, value: object) -> None:
        """Set a header of the answer; the value is turned into text.

        Raises: ValueError for a name or value that would break the answer apart.
        """
        self._response_header.replace(*_header(key, value))

    def get_response_headers(self) -> Headers:
        """Return the headers set so far."""
        return self._response_header

    def get_response_header(self, key: str | None = None) -> Any:
        """Return one header set so far, or None; without a key all of them, as MMS 1.0 did."""
        return self._response_header if key is None else self._response_header.get(key)


class RequestProcessors(list[RequestProcessor]):
    """The batch's processors. Itself takes a processor's calls, as handlers of MMS 1.0 expect.

    What is set goes to every request; what is asked for comes from the first. Where a key is the id of a
    request, it means that request, and all its headers: so MMS 1.0 kept those of a batch.
    """

    def __init__(self, processors: Iterable[RequestProcessor], ids: Sequence[str] = ()) -> None:
        super().__init__(processors)
        self._ids = ids

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Set the status of every answer."""
        for each in self:
            each.report_status(code, reason_phrase)

    def add_response_property(self, key: str, value: object) -> None:
        """Set a header of every answer; with a request's id as key, a dict of headers of that answer."""
        if key in self._ids and isinstance(value, Mapping):
            for name, text in value.items():
                self[self._ids.index(key)].add_response_property(name, text)
            return
        for each in self:
            each.add_response_property(key, value)

    def get_request_property(self, key: str) -> Any:
        """Return a header of the first request, or None; with a request's id as key, all of that request."""
        if key in self._ids:
            return self[self._ids.index(key)].get_request_properties()
        return self[0].get_request_property(key)

    def get_request_properties(self) -> Headers:
        """Return all headers of the first request."""
        return self[0].get_request_properties()

    def get_response_status_code(self) -> int:
        """Return the status of the first answer."""
        return self[0].get_response_status_code()

    def get_response_status_phrase(self) -> str | None:
        """Return the reason phrase of the first answer."""
        return self[0].get_response_status_phrase()

    def get_response_headers(self) -> Headers:
        """Return the headers of the first answer."""
        return self[0].get_response_headers()

    def get_response_header(self, key: str | None = None) -> Any:
        """Return one header of the first answer; without a key those of all answers, by request id."""
        if key is None and self._ids:
            return {each: self[n].get_response_headers() for n, each in enumerate(self._ids)}
        return self[0].get_response_header(key)


class Context:
    """The second argument of every handler.

    There is one per worker; `begin_batch` renews all but the model's own part. While the model loads there
    is no request: getters answer with nothing, setters do nothing. A request is named by its index in the
    batch, or by its id.
    """

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Any,
        batch_size: int,
        gpu: int | None,
        mms_version: str,
        *,
        model_config: Mapping[str, Any] | None = None,
        instance: int = 0,
    ) -> None:
        self.model_name = model_name
        self.manifest = manifest
        self.model_config = model_config  # of a Triton repository
        self.instance = instance  # the number of this worker of the model
        self._system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            # Handlers choose the CPU by `gpu_id is None`.
            "gpu_id": None if gpu is None or gpu < 0 else gpu,
            "batch_size": batch_size,
            "server_name": "MMS",
            "server_version": mms_version,
        }
        self.request_ids: dict[int, str] | None = None
        self._request_processor: RequestProcessors | None = None
        self._metrics: MetricsStore | None = None
        self._deadlines: Sequence[float | None] = ()
        self._parameters: Sequence[Mapping[str, Any]] = ()
        self._outputs: Sequence[Sequence[str] | None] = ()
        self._response_parameters: dict[int, dict[str, Any]] = {}

    def begin_batch(
        self,
        request_ids: Sequence[str],
        headers: Sequence[Iterable[tuple[str, Any]]],
        deadlines: Sequence[float | None] = (),
        *,
        parameters: Sequence[Mapping[str, Any]] = (),
        outputs: Sequence[Sequence[str] | None] = (),
    ) -> None:
        """Forget the last batch and take up a new one. For the worker loop.

        `headers` has one sequence per request: for MMS first (part name, {"content-type": …}) of every
        part, then the HTTP headers. `deadlines` are in `time.monotonic()` seconds; `parameters` and
        `outputs` are what the requests say beside their inputs. Empty means none.
        Raises: ValueError if the sequences differ in length.
        """
        if len(headers) != len(request_ids) or len(deadlines) not in (0, len(request_ids)):
            raise ValueError("one header list and one deadline per request")
        self.request_ids = dict(enumerate(request_ids))
        self._request_processor = RequestProcessors([RequestProcessor(each) for each in headers], request_ids)
        self._metrics = None
        self._deadlines = deadlines
        self._parameters = parameters
        self._outputs = outputs
        self._response_parameters = {}

    def response(self, idx: int) -> tuple[int, str, list[tuple[str, str]]]:
        """Return status, reason phrase and headers as the handler left them. For the worker loop.

        Raises: ValueError for a bad header that was put straight into `get_response_headers`.
        """
        processor = self._processor(idx)
        headers = [_header(key, value) for key, value in processor.get_response_headers().items()]
        return processor.get_response_status_code(), processor.get_response_status_phrase() or "", headers

    def response_parameters(self, idx: int) -> Mapping[str, Any]:
        """Return the parameters of an answer as the handler left them. For the worker loop."""
        return self._response_parameters.get(idx, {})

    @property
    def system_properties(self) -> dict[str, Any]:
        """The worker's surroundings: model_dir, gpu_id, batch_size, server_name, server_version."""
        return self._system_properties

    @property
    def request_processor(self) -> RequestProcessors | None:
        """One RequestProcessor per request; None while the model loads."""
        return self._request_processor

    @request_processor.setter
    def request_processor(self, value: Any) -> None:
        # Tests of handlers set a list, a single one as in MMS 1.0, or a stand-in of their own.
        if isinstance(value, RequestProcessor):
            value = [value]
        if isinstance(value, list):
            value = RequestProcessors(value, tuple((self.request_ids or {}).values()))
        self._request_processor = value

    @property
    def metrics(self) -> MetricsStore:
        """The metrics of this batch, or of the load."""
        if self._metrics is None:
            self._metrics = MetricsStore(self.request_ids, self.model_name)
        return self._metrics

    @metrics.setter
    def metrics(self, value: MetricsStore | None) -> None:
        self._metrics = value

    def remaining_ms(self, idx: int = 0) -> int | None:
        """Return the milliseconds left until the client's deadline (0 when past), None without one."""
        deadline = self._deadlines[idx] if self._deadlines else None
        return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))

    def get_request_id(self, idx: int = 0) -> str | None:
        """Return the id of a request, which the client also sees as x-request-id."""
        return None if self.request_ids is None else self.request_ids.get(idx)

    def get_request_parameters(self, idx: int = 0) -> Mapping[str, Any]:
        """Return the parameters of a request, which protocols of tensors carry beside the inputs."""
        return self._parameters[idx] if self._parameters else {}

    def get_requested_outputs(self, idx: int = 0) -> Sequence[str] | None:
        """Return the names of the outputs that a request wants, in its order; None for all.

        A handler that answers with a dict of arrays need not leave the others out: they are not sent.
        """
        return self._outputs[idx] if self._outputs else None

    def set_response_parameter(self, idx: int, key: str, value: str | float) -> None:
        """Set a parameter of an answer: text, a number, true or false. Protocols of tensors alone carry it.

        Raises: ValueError for another value, and for one that no protocol carries, such as NaN.
        """
        fault = parameters.fault(str(key), value)
        if fault is not None:
            raise ValueError(fault)
        self._response_parameters.setdefault(idx, {})[str(key)] = value

    def get_request_header(self, idx: int | str, key: str) -> Any:
        """Return a request header, or None. Letter case does not matter."""
        return self._processor(idx).get_request_property(key)

    def get_all_request_header(self, idx: int | str) -> Headers:
        """Return all headers of a request, under the names that the client sent."""
        return self._processor(idx).get_request_properties()

    def set_response_content_type(self, idx: int | str, value: str | None) -> None:
        """Set the content type of an answer; None leaves it as it is."""
        if value is not None:
            self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int | str) -> str | None:
        """Return the content type of an answer, None if unset."""
        content_type: str | None = self.get_response_headers(idx).get("content-type")
        return content_type

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int | str = 0) -> None:
        """Set the status of an answer.

        Raises: ValueError for what cannot be a final HTTP status line.
        """
        self._processor(idx).report_status(code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Set the status of every answer of the batch."""
        for each in self._request_processor or ():
            each.report_status(code, phrase)

    def get_response_status(self, idx: int | str) -> tuple[int, str | None]:
        """Return status and reason phrase of an answer."""
        processor = self._processor(idx)
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def set_response_header(self, idx: int | str, key: str, value: object) -> None:
        """Set a header of an answer; the value is turned into text.

        Raises: ValueError for a name or value that would break the answer apart.
        """
        self._processor(idx).add_response_property(key, value)

    def get_response_headers(self, idx: int | str) -> Headers:
        """Return the headers set on an answer so far."""
        return self._processor(idx).get_response_headers()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def _processor(self, idx: int | str) -> RequestProcessor:
        if self._request_processor is None:
            return RequestProcessor({})  # the model is loading: nobody reads what is set here
        if isinstance(idx, str):
            idx = next((i for i, each in (self.request_ids or {}).items() if each == idx), idx)
            if isinstance(idx, str):
                raise KeyError(f"no request {idx} in this batch")
        return self._request_processor[idx]


def _header(key: object, value: object) -> tuple[str, str]:
    name, text = str(key), str(value)
    if not name or _NOT_IN_A_HEADER_NAME.search(name):
        raise ValueError(f"{name!r} is not a header name")
    if _SPLITS_A_RESPONSE.search(text):
        raise ValueError(f"the value of header {name} holds a line break or NUL")
    return name, text
