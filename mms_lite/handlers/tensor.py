"""The tensor handler: a model of any kind, its inputs and outputs as JSON, .npy, .npz, images or tensors.

It interprets nothing: what the model takes comes in under its inputs' names, what it gives goes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mms_lite import json_arrays
from mms_lite.errors import (
    BackendMissing,
    BadTensor,
    InvalidArchive,
    InvalidRequest,
    ServingError,
    UnsupportedMedia,
)
from mms_lite.handlers import array_bodies
from mms_lite.handlers.model_handler import HandlerSettings, ModelHandler, Parts, single_part
from mms_lite.handlers.package import read_settings
from mms_lite.tensors import DTYPES, Array, describe
from mms_lite.types import TensorSpec
from mms_lite.worker.backends import Answer, Request
from mms_lite.worker.context import Context

if TYPE_CHECKING:
    from mms_lite.handlers.image_handler import ImageInput

JSON, NPY, NPZ = "application/json", "application/x-npy", "application/x-npz"
_ANY_NAME = "input"  # what a body may call the one input of a model
_NOT_A_FIELD = "model_name"  # a query's parameter that names the model, not an input
_MOST_IN_JSON = 4_000_000  # elements of an answer: some 40 MB of text
_BEGINS_JSON = b"{[-0123456789"
_BEGINS_IMAGE = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_CAST = 'say "cast": true in the handler config'
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, white space


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSettings(HandlerSettings):
    """What the tensor handler's config may say.

    `cast` lets .npy and .npz files be of another datatype than the model's where the values fit it. `image`
    has keys of the image handlers: how an image becomes the model's input.
    """

    cast: bool = False
    image: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        HandlerSettings.__post_init__(self)
        self.require_bool("cast")
        if self.image is not None and not isinstance(self.image, Mapping):
            raise ValueError("image is not an object")


class TensorHandler(ModelHandler):
    """Answers with all outputs of the model, by name. A request may have any number of rows."""

    settings_type = TensorSettings
    takes_tensors = True

    def __init__(self) -> None:
        super().__init__()
        self.image_input: ImageInput | None = None

    def initialize(self, context: Context) -> None:
        """Open the model and run it once.

        Raises:
            LoadError: as for any handler. In a Triton repository it is config.pbtxt that says what backends
                call the handler config.
        """
        try:
            super().initialize(context)
        except InvalidArchive as error:
            if context.model_config is None:
                raise
            told = error.message.replace("the handler config", "config.pbtxt")
            raise InvalidArchive(told, **error.details) from error

    def prepare(self) -> None:
        """Find out whether the model takes images."""
        stated = self.settings.image
        try:
            self.image_input = _image_input(self.signature.inputs, stated or {})
        except (InvalidArchive, BackendMissing):
            if stated is not None:
                raise

    def handle(self, data: Sequence[Parts], context: Context) -> list[Any]:
        """Answer a batch: tensors with a dict of arrays, bodies with what their Accept header asks for.

        Raises:
            ServingError: the model failed for all.
        """
        answers = super().handle(data, context)
        for index, (parts, answer) in enumerate(zip(data, answers, strict=True)):
            if isinstance(answer, ServingError) or _is_of_tensors(parts):
                continue
            accept = context.get_request_header(index, "accept")
            try:
                answers[index], kind = self.encode(answer, accept if isinstance(accept, str) else "")
                context.set_response_content_type(index, kind)
            except ServingError as error:
                answers[index] = error
        return answers

    def decode(self, parts: Parts) -> dict[str, Array]:
        """Return the arrays that a request's parts hold, by input; whether they fit is not checked yet.

        Raises:
            InvalidRequest: they hold none.
        """
        if _is_of_tensors(parts):
            return _arrays(parts)
        names = {spec.name for spec in self.signature.inputs}
        if not (names | {_ANY_NAME} if len(names) == 1 else names).isdisjoint(parts):
            return self._read_form(parts)
        if any(name.lstrip()[:1] in ("{", "[") for name in parts):
            raise InvalidRequest(f"the body is declared as a form and looks like JSON: send it as {JSON}")
        return self._read(single_part(parts, _ANY_NAME), _only(self.signature.inputs))

    def warm_up(self) -> None:
        """Run the model once; code of a Triton repository runs for clients alone, as in Triton."""
        if not (self.package.model_config is not None and self.predictor.takes_requests):
            self.predictor.warm_up()

    def answer(self, items: Mapping[int, dict[str, Array]], context: Context) -> Sequence[Any]:
        """Answer items with the outputs that their requests want, and with what the model says beside them.

        Raises:
            ServingError: the model failed for all.
        """
        requests: list[dict[str, Array]] = [
            Request(
                arrays,
                outputs=context.get_requested_outputs(index),
                id=context.get_request_id(index) or "",
                parameters=context.get_request_parameters(index),
            )
            for index, arrays in items.items()
        ]
        answers = self.predict(requests)
        for index, answer in zip(items, answers, strict=True):
            if isinstance(answer, Answer):
                for key, value in answer.parameters.items():
                    context.set_response_parameter(index, key, value)
        return answers

    def predict(self, items: list[dict[str, Array]]) -> Sequence[dict[str, Array] | ServingError]:
        """Run the model on each item, on those that fit together as one batch.

        Items are dicts that may be `Request`: then they say which outputs are wanted.
        """
        return self.predictor.infer_each(items)

    def encode(self, outputs: Mapping[str, Array], accept: str) -> tuple[bytes, str]:
        """Return the outputs as a body of a type that an Accept header allows, and that type.

        Raises:
            InvalidRequest: it allows none, or JSON for too many elements.
            HandlerError: the type cannot carry them.
        """
        # numpy's own formats and JSON know no bfloat16, all of whose numbers float32 has.
        outputs = {name: a.astype(np.float32) if a.dtype.kind == "V" else a for name, a in outputs.items()}
        numbers = all(array.dtype.kind in "biuf" for array in outputs.values())
        offers = [JSON]
        if numbers:
            offers += [NPY, NPZ] if len(outputs) == 1 else [NPZ]
        kind = preferred(accept, offers)
        if kind is None:
            raise InvalidRequest(
                f"the answer has the outputs {', '.join(outputs)} and can be {' or '.join(offers)}; "
                f"the request accepts: {accept}"
            )
        count = sum(array.size for array in outputs.values())
        if kind == JSON and count > _MOST_IN_JSON:
            advice = f"ask for {' or '.join(offers[1:])}" if numbers else "send fewer rows"
            raise InvalidRequest(
                f"the answer has {count} elements, and JSON at most {_MOST_IN_JSON}: {advice}"
            )
        if kind == NPY:
            return array_bodies.to_npy(next(iter(outputs.values()))), kind
        return array_bodies.to_npz(outputs) if kind == NPZ else array_bodies.to_json(outputs), kind

    def _read_form(self, parts: Parts) -> dict[str, Array]:
        """Return what parts hold that are named as inputs are.

        Raises:
            BadTensor: one is named otherwise. An empty body and the model's name come with a query.
        """
        inputs: dict[str, Array] = {}
        for name, value in parts.items():
            if name != _NOT_A_FIELD and value not in (b"", ""):
                inputs |= self._read(value, self._input(name))
        return inputs

    def _read(self, value: Any, spec: TensorSpec | None) -> dict[str, Array]:
        """Return what one part holds; `spec` is the input that an array without a name is for.

        Raises:
            InvalidRequest: nothing that can be read.
        """
        if isinstance(value, str):
            value = value.encode("utf-8", "replace")
        if not isinstance(value, (bytes, bytearray)):
            return self._read_json(value, spec)
        if not value:
            if self.predictor.needs_inputs:
                raise InvalidRequest(f"the request has no body; {self._takes()}")
            return {}
        if value.startswith(array_bodies.NPY_MAGIC):
            return self._read_npy(value, self._named(spec, "an .npy file"))
        if value.startswith(array_bodies.ZIP_MAGIC):
            names = [each.name for each in self.signature.inputs]
            arrays = array_bodies.from_npz(value, names)
            return {name: self._fitted(array, name) for name, array in arrays.items()}
        if self.image_input is not None and value.startswith(_BEGINS_IMAGE):
            return self._read_image(value, self.image_input)
        if value[:64].lstrip(_BEFORE_JSON)[:1] not in _BEGINS_JSON:
            raise UnsupportedMedia(f"the body is of no kind that is read here; {self._takes()}")
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the body looks like JSON and is not: {error}") from error
        return self._read_json(decoded, spec)

    def _read_json(self, value: Any, spec: TensorSpec | None) -> dict[str, Array]:
        finite = not self.settings.allow_nan
        if not isinstance(value, dict):
            named = self._named(spec, "a JSON list")
            return {named.name: json_arrays.to_array(value, named, finite=finite)}
        arrays = {}
        for name, each in value.items():
            spec = self._input(name)
            arrays[spec.name] = json_arrays.to_array(each, spec, finite=finite)
        return arrays

    def _read_npy(self, value: bytes | bytearray, spec: TensorSpec) -> dict[str, Array]:
        return {spec.name: self._fitted(array_bodies.from_npy(value, spec.name), spec.name)}

    def _read_image(self, value: bytes | bytearray, image_input: ImageInput) -> dict[str, Array]:
        from mms_lite.handlers import images

        image = images.read_image(value, max_pixels=image_input.settings.max_pixels)
        return {image_input.spec.name: image_input.array([image])}

    def _fitted(self, array: Array, name: str) -> Array:
        spec = self._input(name)
        if self.settings.cast:
            return array_bodies.cast(array, spec)
        if array_bodies.can_be_cast(array, spec):
            wanted = DTYPES[spec.datatype]
            # No file of numpy's holds bfloat16; a Triton repository has no handler config.
            advice = [] if wanted.kind == "V" else [f"save it as {wanted.name}"]
            advice += [] if self.package.model_config is not None else [_CAST]
            told = f"{describe(array)}; {', or '.join(advice)}" if advice else describe(array)
            raise json_arrays.misfit(spec, told)
        return array

    def _input(self, name: str) -> TensorSpec:
        """Return the input of a name, or the only one for the name that any may have."""
        inputs = self.signature.inputs
        if name == _ANY_NAME and len(inputs) == 1:
            return inputs[0]
        return self.predictor.input(name)

    def _named(self, spec: TensorSpec | None, what: str) -> TensorSpec:
        if spec is None:
            raise InvalidRequest(f"{what} names no input; {self._takes()}")
        return spec

    def _takes(self) -> str:
        if not self.signature.inputs:
            return f"the model takes no inputs: send {{}} as {JSON}"
        inputs = "; ".join(map(str, self.signature.inputs))
        image = "" if self.image_input is None else ", or an image"
        return f"the model takes {inputs}, as {JSON}, {NPY} or {NPZ}{image}"


def preferred(accept: str, offers: Sequence[str]) -> str | None:
    """Return the offer that an Accept header likes best, None if it allows none (RFC 9110, 12.5.1).

    Of two that it likes alike, the one that it names more exactly, then the one named first, counts.
    """
    ranges = [_media_range(text) for text in accept.split(",") if text.strip()] or [("*/*", 1.0)]
    best, found = (0.0, 0, 0), None
    for offer in offers:
        exactness = {offer: 2, offer.partition("/")[0] + "/*": 1, "*/*": 0}
        matches = [
            (exactness[kind], -place, quality)
            for place, (kind, quality) in enumerate(ranges)
            if kind in exactness
        ]
        if matches:
            exact, place, quality = max(matches)
            if quality > 0 and (quality, exact, place) > best:
                best, found = (quality, exact, place), offer
    return found


def _media_range(text: str) -> tuple[str, float]:
    kind, *parameters = (each.strip() for each in text.lower().split(";"))
    quality = next((each[2:] for each in parameters if each.startswith("q=")), "1")
    try:
        return kind, min(1.0, float(quality))
    except ValueError:
        return kind, 1.0


def _is_of_tensors(parts: Parts) -> bool:
    """Tell whether a request holds tensors, or nothing at all: a body is there also when it is empty."""
    return not parts or any(isinstance(value, np.ndarray) for value in parts.values())


def _arrays(parts: Parts) -> dict[str, Array]:
    for name, value in parts.items():
        if not isinstance(value, np.ndarray):
            raise BadTensor(f"input {name!r} is a raw part beside tensors")
    return dict(parts)


def _image_input(inputs: Sequence[TensorSpec], stated: Mapping[str, Any]) -> ImageInput:
    """Return how an image becomes the one input of a model.

    Raises:
        InvalidArchive: the model takes something else, or the settings do not fit.
        BackendMissing: the libraries for images are not installed.
    """
    shape = inputs[0].shape if len(inputs) == 1 else ()
    if shape is None or len(shape) != 4:
        listed = "; ".join(map(str, inputs))
        raise InvalidArchive(f"the handler config has image settings; the model takes no images: {listed}")
    try:
        from mms_lite.handlers.image_handler import ImageInput, ImageSettings
    except ModuleNotFoundError as error:
        advice = "pip install 'mms-lite[handlers]'"
        raise BackendMissing(f"images need {error.name}, which is not installed: {advice}") from error
    color = "GRAY" if 1 in (shape[1], shape[3]) and 3 not in (shape[1], shape[3]) else "RGB"
    return ImageInput.of(inputs, read_settings(ImageSettings, {"color": color, **stated}))


def _only(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    return inputs[0] if len(inputs) == 1 else None
