"""Messages that the protocols over gRPC share: they are what clients have, and what the .proto files say."""

import hashlib
import importlib.util
import runpy
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf", reason="needs the grpc extra")

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, text_format

from mms_lite.protos import files, message, pool

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "mms_lite" / "protos"


def wire(text: str) -> bytes:
    return bytes.fromhex(text)


def test_field_numbers_are_those_of_the_published_protocols() -> None:
    """Bytes as clients of other makers send them."""
    one_input = wire("2a0e" + "0a0178" + "120446503332" + "1a03010203")
    sent = wire("0a0161") + wire("1a0137") + one_input + wire("3a020102")
    request = message("inference.ModelInferRequest").FromString(sent)
    assert (request.model_name, request.id, list(request.raw_input_contents)) == ("a", "7", [b"\x01\x02"])
    assert (request.inputs[0].name, request.inputs[0].datatype) == ("x", "FP32")
    assert list(request.inputs[0].shape) == [1, 2, 3]

    tensor = message("tensorflow.TensorProto")(dtype=1, tensor_content=b"\1\0\0\0")
    tensor.tensor_shape.dim.add(size=1)
    assert tensor.SerializeToString() == wire("0801" + "120412020801" + "220401000000")
    response = message("tensorflow.serving.PredictResponse")()
    response.outputs["y"].dtype = 7
    assert response.SerializeToString() == wire("0a070a017912020807")


def test_names_of_this_pool_do_not_meet_those_of_others() -> None:
    other = descriptor_pb2.FileDescriptorProto(name="theirs.proto", package="tensorflow.serving")
    other.message_type.add(name="ReloadConfigRequest")
    descriptor_pool.Default().AddSerializedFile(other.SerializeToString())

    assert (
        message("tensorflow.serving.ReloadConfigRequest").DESCRIPTOR.file.name == "tensorflow_serving.proto"
    )


def test_what_is_unknown_is_a_key_error() -> None:
    for ask, name in ((message, "inference.Nothing"), (message, "other.Message"), (files, "grpc.Nothing")):
        with pytest.raises(KeyError):
            ask(name)


def test_a_model_configuration_of_triton_is_read() -> None:
    text = """
        name: "ensemble" platform: "ensemble" max_batch_size : 256   # a comment
        input [ { name: "image", data_type: TYPE_UINT8, dims: [ -1 ] } ]
        output [ { name: "text", data_type: TYPE_STRING, dims: [ -1 ], reshape: { shape: [] } } ]
        ensemble_scheduling { step [
            { model_name: "first", model_version: -1, input_map { key: "a" value: "image" },
              output_map { key: "b" value: "text" } } ] }
        parameters: { key: "k" value: { string_value: "v" } }
        instance_group [ { count: 1, kind: KIND_CPU } ]
        version_policy: { specific { versions: [ 1, 3 ] } }
    """
    config = text_format.Parse(text, message("inference.ModelConfig")())

    assert config.ensemble_scheduling.step[0].input_map["a"] == "image"
    assert list(config.version_policy.specific.versions) == [1, 3]
    again = json_format.MessageToDict(config, preserving_proto_field_name=True)
    assert again["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": ["-1"]}]


def test_json_of_tensorflow_serving_has_its_own_spelling() -> None:
    status = message("tensorflow.serving.GetModelStatusResponse")()
    status.model_version_status.add(version=1, state="AVAILABLE").status.error_message = "OK"
    assert json_format.MessageToDict(status) == {
        "model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {"error_message": "OK"}}]
    }

    signatures = message("tensorflow.serving.SignatureDefMap")()
    signatures.signature_def["serving_default"].inputs["x"].dtype = 1
    metadata = message("tensorflow.serving.GetModelMetadataResponse")()
    metadata.model_spec.version.value = 2
    metadata.metadata["signature_def"].Pack(signatures)
    assert json_format.MessageToDict(metadata, descriptor_pool=pool()) == {
        "modelSpec": {"version": "2"},
        "metadata": {
            "signature_def": {
                "@type": "type.googleapis.com/tensorflow.serving.SignatureDefMap",
                "signatureDef": {"serving_default": {"inputs": {"x": {"dtype": "DT_FLOAT"}}}},
            }
        },
    }


@pytest.mark.parametrize(
    "service",
    [
        "inference.GRPCInferenceService",
        "tensorflow.serving.PredictionService",
        "tensorflow.serving.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ],
)
def test_a_client_can_build_a_service_from_its_files(service: str) -> None:
    theirs = descriptor_pool.DescriptorPool()
    for file in files(service):
        theirs.AddSerializedFile(file)

    methods = theirs.FindServiceByName(service).methods
    assert methods
    for method in methods:
        assert message(method.input_type.full_name)().ByteSize() == 0
        assert message(method.output_type.full_name)().ByteSize() == 0


def test_the_descriptor_sets_are_made_from_these_files() -> None:
    noted = {}
    for line in (PROTOS / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        noted[name] = digest
    there = [file for pattern in ("*.fds", "*/*.proto") for file in PROTOS.glob(pattern)]

    found = {str(file.relative_to(PROTOS)): hashlib.sha256(file.read_bytes()).hexdigest() for file in there}
    assert found == noted, "run `make protos`"


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_compiled_again_the_descriptor_sets_are_the_same(tmp_path: Path) -> None:
    compile_into = runpy.run_path(str(ROOT / "scripts" / "protos.py"))["compile_into"]
    for family in ("kserve", "tfserving", "grpc"):
        compile_into(tmp_path / "made.fds", PROTOS / family)
        assert (tmp_path / "made.fds").read_bytes() == (PROTOS / f"{family}.fds").read_bytes()
