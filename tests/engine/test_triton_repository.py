"""What a Triton model repository means: the folders and config.pbtxt of models become specs."""

import errno
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from triton_site import TENSORS, TritonSite

from mms_lite.engine.repository.triton import startup_names
from mms_lite.errors import BackendMissing, InvalidRequest, LoadError, ModelNotFound, VersionNotFound
from mms_lite.types import LoadOptions, ModelSpec

X, Y = TENSORS.strip().split("\n")


@pytest.fixture
def site(tmp_path: Path) -> TritonSite:
    return TritonSite(tmp_path)


def only(site: TritonSite, name: str = "m", **given: Any) -> ModelSpec:
    (spec,) = site.repository.versions(name, **given)
    return spec


def model(spec: ModelSpec) -> dict[str, Any]:
    assert spec.manifest is not None
    return dict(spec.manifest["model"])


def test_a_version_is_served_from_its_folder_by_the_tensor_handler(site: TritonSite) -> None:
    site.onnx("m", "max_batch_size: 8" + TENSORS, v3=2.0)
    spec = only(site)
    assert (spec.name, spec.version, spec.handler, spec.owns_path) == ("m", "3", "tensor", False)
    assert spec.path == str(site.folder / "m" / "3")
    assert (spec.min_workers, spec.max_workers, spec.batch_size, spec.isolate_failures) == (1, 1, 1, True)
    assert model(spec) == {
        "modelName": "m",
        "modelVersion": "3",
        "handler": "tensor",
        "backend": "onnxruntime",
        "modelFiles": ["model.onnx"],
        "handlerConfig": {
            "backend": {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
                "batch": True,
            },
            "allow_nan": True,
        },
        "labelsByOutput": {},
    }


CONFIG = """
name: "m"
platform: "onnxruntime_onnx"
max_batch_size : 8
input { name: "x" data_type: TYPE_FP32 dims: -1 dims: 3 format: FORMAT_NONE }
output [ { name: "y" data_type: TYPE_STRING dims: [ 5000000000 ], label_filename: "labels.txt" } ]
version_policy: { specific { versions: [ 1, 3 ] } }
parameters: { key: "a" value: { string_value: "b" } }
dynamic_batching { preferred_batch_size: [ 2, 4 ] max_queue_delay_microseconds: 1500 }
# comments are read over
"""


def test_the_configuration_is_complete_with_numbers_as_numbers(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    site.write("m/config.pbtxt", CONFIG)
    site.write("m/labels.txt", "a\r\nb\n")
    config = only(site).config
    assert config is not None
    assert json.loads(json.dumps(config)) == config
    assert (config["backend"], config["default_model_filename"]) == ("onnxruntime", "model.onnx")
    assert config["version_policy"] == {"specific": {"versions": [1, 3]}}
    assert config["input"][0] == {
        "name": "x",
        "data_type": "TYPE_FP32",
        "format": "FORMAT_NONE",
        "dims": [-1, 3],
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
        "is_non_linear_format_io": False,
    }
    assert config["output"][0]["dims"] == [5_000_000_000]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 1500
    assert config["dynamic_batching"]["priority_levels"] == 0
    assert config["parameters"] == {"a": {"string_value": "b"}}
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert [(each["name"], each["kind"], each["count"]) for each in config["instance_group"]] == [
        ("m_0", "KIND_CPU", 1)
    ]


def test_the_labels_of_an_output_come_with_the_manifest(site: TritonSite) -> None:
    site.onnx("m", Y.replace("dims", 'label_filename: "l.txt" dims'), v1=1.0)
    site.write("m/l.txt", "cat\r\ndog\n\nbird\n")
    assert model(only(site))["labelsByOutput"] == {"y": ["cat", "dog", "", "bird"]}
    (site.folder / "m" / "l.txt").unlink()
    (site.folder / "m" / "l.txt").symlink_to(site.write(".stored/blob", "fish"))
    assert model(only(site))["labelsByOutput"] == {"y": ["fish"]}


@pytest.mark.parametrize(
    ("config", "backend", "files", "told"),
    [
        ('backend: "onnxruntime"', "onnxruntime", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx")),
        ('platform: "onnxruntime_onnx"', "onnxruntime", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx")),
        ('platform: "pytorch_libtorch"', "torch", ["model.pt"], ("pytorch", "pytorch_libtorch")),
        ('platform: "torch_aoti"', "torch", ["model.pt2"], ("pytorch", "torch_aoti")),
        ('backend: "openvino"', "openvino", ["model.xml", "model.bin"], ("openvino", "")),
        (
            'backend: "openvino" default_model_filename: "net.onnx"',
            "openvino",
            ["net.onnx"],
            ("openvino", ""),
        ),
        ('backend: "opencv" default_model_filename: "net.onnx"', "opencv", ["net.onnx"], ("opencv", "")),
        ('backend: "python"', "python", ["model.py"], ("python", "")),
        ("", "python", ["model.py"], ("python", "")),
        (None, "python", ["model.py"], ("python", "")),
        (None, "torch", ["model.pt"], ("pytorch", "pytorch_libtorch")),
        (
            'backend: "onnxruntime"',
            "onnxruntime",
            ["model.onnx/model.onnx"],
            ("onnxruntime", "onnxruntime_onnx"),
        ),
    ],
)
def test_backend_platform_and_file_are_completed_from_each_other(
    site: TritonSite, config: str | None, backend: str, files: list[str], told: tuple[str, str]
) -> None:
    if config is not None:
        site.write("m/config.pbtxt", config)
    for file in files:
        site.write(f"m/1/{file}", b"")
    spec = only(site)
    assert (model(spec)["backend"], model(spec)["modelFiles"]) == (backend, files)
    assert spec.config is not None
    assert (spec.config["backend"], spec.config["platform"]) == told
    assert spec.isolate_failures is (backend != "python")


def test_the_end_of_a_models_name_may_be_its_backend(site: TritonSite) -> None:
    site.write("detect.openvino/1/net.onnx", b"")
    site.write("detect.openvino/config.pbtxt", 'default_model_filename: "net.onnx"')
    assert model(only(site, "detect.openvino"))["backend"] == "openvino"


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["10"]),
        ("version_policy { latest { num_versions: 2 } }", ["2", "10"]),
        ("version_policy { latest { num_versions: 9 } }", ["1", "2", "10"]),
        ("version_policy { all {} }", ["1", "2", "10"]),
        ("version_policy { specific { versions: 2 versions: 1 versions: 7 } }", ["1", "2"]),
    ],
)
def test_the_policy_says_which_versions_are_served(site: TritonSite, policy: str, served: list[str]) -> None:
    site.onnx("m", policy, v1=1.0, v2=1.0, v10=1.0)
    for other in ("0", "011", "x", "1.5"):
        site.write(f"m/{other}/model.onnx", b"")
    site.write("m/12", b"a file")
    assert [spec.version for spec in site.repository.versions("m")] == served


@pytest.mark.parametrize(
    ("batching", "size", "delay_ms", "queue"),
    [
        ("max_batch_size: 8", 1, 0, 100),
        ("max_batch_size: 8 dynamic_batching {}", 8, 0, 100),
        ("max_batch_size: 8 dynamic_batching { preferred_batch_size: [2, 4] }", 4, 0, 100),
        ("dynamic_batching {}", 1, 0, 100),
        (
            "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 2600"
            " default_queue_policy { max_queue_size: 5 } }",
            8,
            2.6,
            5,
        ),
        ("max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 100 }", 8, 0.1, 100),
    ],
)
def test_dynamic_batching_is_how_requests_are_joined(
    site: TritonSite, batching: str, size: int, delay_ms: float, queue: int
) -> None:
    site.onnx("m", batching, v1=1.0)
    spec = only(site)
    assert (spec.batch_size, spec.max_batch_delay_ms, spec.queue_size) == (size, delay_ms, queue)


@pytest.mark.parametrize(
    ("groups", "gpus", "workers", "devices"),
    [
        ("instance_group { count: 2 kind: KIND_CPU }", (0, 1), 2, ()),
        ("instance_group { count: 2 } instance_group { count: 3 }", (), 5, ()),
        ("instance_group { count: 2 kind: KIND_GPU }", (), 2, ()),
        ("instance_group { count: 2 kind: KIND_GPU gpus: 1 }", (0, 1), 2, (1, 1)),
        ("instance_group { count: 2 kind: KIND_GPU }", (0, 1), 4, (0, 1, 0, 1)),
        (
            "instance_group { count: 2 kind: KIND_GPU gpus: 1 } instance_group { kind: KIND_GPU gpus: 0 }",
            (0, 1),
            3,
            (1, 1, 0),
        ),
        (
            "instance_group { count: 2 kind: KIND_CPU } instance_group { count: 1 kind: KIND_GPU }",
            (0,),
            3,
            (None, None, 0),
        ),
        ("instance_group { count: 1 kind: KIND_GPU gpus: 9 }", (0,), 1, (0,)),
        ("", (0,), 1, (0,)),
        ("", (), 1, ()),
    ],
)
def test_instance_groups_are_workers_on_their_devices(
    site: TritonSite, groups: str, gpus: tuple[int, ...], workers: int, devices: tuple[int | None, ...]
) -> None:
    site.onnx("m", groups, v1=1.0)
    site.defaults["devices"] = gpus
    spec = only(site)
    assert (spec.min_workers, spec.max_workers, spec.devices) == (workers, workers, devices)


def test_a_group_for_gpus_runs_on_cpus_where_there_are_none_and_says_so(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.onnx("m", 'instance_group { name: "g" kind: KIND_GPU }', v1=1.0)
    spec = only(site)
    assert spec.config is not None
    assert spec.config["instance_group"][0]["kind"] == "KIND_CPU"
    assert "Model m: instance group g runs on CPUs: no GPU" in caplog.text


def test_parameters_reach_the_backends_that_know_them(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    threads = 'parameters { key: "intra_op_thread_count" value { string_value: "3" } }'
    site.onnx("m", threads + 'parameters { key: "odd" value { string_value: "x" } }', v1=1.0)
    backend = model(only(site))["handlerConfig"]["backend"]
    assert (backend["threads"], backend.get("options")) == (3, None)
    assert "Model m: parameters that have no effect here: odd" in caplog.text


def test_fields_that_have_no_effect_are_named_in_the_log(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.onnx(
        "m",
        "max_batch_size: 2 optimization { priority: PRIORITY_MAX } response_cache { enable: true }"
        " dynamic_batching { priority_levels: 2 default_priority_level: 1 }",
        v1=1.0,
    )
    only(site)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line == (
        "Model m: has no effect here: dynamic_batching.priority_levels,"
        " dynamic_batching.default_priority_level, optimization, response_cache"
    )


@pytest.mark.parametrize(
    ("most", "dims", "shape", "backends"),
    [
        (0, "3, 224, 224", "1, 3, 224, 224", [1, 3, 224, 224]),
        (0, "1000", "1, 1000, 1, 1", [1, 1000, 1, 1]),
        (4, "1", "", [-1]),
        (4, "-1", "-1, 1", [-1, -1, 1]),
        (0, "2, 4, -1, 6", "8, -1, 1, 6", [8, -1, 1, 6]),
    ],
)
def test_the_model_has_the_shape_of_reshape_and_clients_dims(
    site: TritonSite, most: int, dims: str, shape: str, backends: list[int]
) -> None:
    tensor = f"data_type: TYPE_FP32 dims: [{dims}] reshape {{ shape: [{shape}] }}"
    site.onnx("m", f'max_batch_size: {most} input {{ name: "x" {tensor} }}', v1=1.0)
    spec = only(site)
    (stated,) = model(spec)["handlerConfig"]["backend"]["inputs"]
    assert stated == {"name": "x", "datatype": "FP32", "shape": backends}
    assert spec.config is not None
    assert spec.config["input"][0]["dims"] == json.loads(f"[{dims}]")
    assert spec.config["input"][0]["reshape"] == {"shape": json.loads(f"[{shape}]")}


BROKEN = {
    "max_batch_size: x": r"model .m.: failed to read text proto from config\.pbtxt: 2:17 : .*parse integer",
    "max_batch: 3": r"2:1 : Message type .inference\.ModelConfig. has no field named .max_batch.",
    "input {": r"failed to read text proto from config\.pbtxt: 2:\d+ :",
    "input { data_type: TYPE_FLOAT }": r"has no value named TYPE_FLOAT",
    'name: "other"': "unexpected directory name 'm' for model 'other', directory name must equal model name",
    "max_batch_size: -1": "'max_batch_size' must be non-negative value for m",
    "max_batch_size: 4 dynamic_batching { preferred_batch_size: 0 }": (
        "dynamic batching preferred size must be positive for m"
    ),
    "max_batch_size: 4 dynamic_batching { preferred_batch_size: 5 }": (
        "dynamic batching preferred size must be <= max batch size for m"
    ),
    "dynamic_batching { priority_levels: 3 default_priority_level: 4 }": (
        r"default priority level must be in range \[1, 3\] for m"
    ),
    X.replace('name: "x"', ""): "model input must specify 'name' for m",
    X.replace("data_type: TYPE_FP32", ""): "model input 'x' must specify 'data_type' for m",
    Y.replace("dims: [ 3 ]", ""): "model output 'y' must specify 'dims' for m",
    Y.replace("3 ]", "0 ]"): r"model output 'y' dimension must be integer >= 1, or -1 .* for m",
    X.replace("dims", "format: FORMAT_NHWC dims"): "model input NHWC/NCHW require 3 dims for m",
    X.replace("}", "reshape { shape: [1, 4] } }"): (
        "model input 'x' has different size for dims and reshape for m"
    ),
    Y.replace("3 ]", "3, -1 ] reshape { shape: [3] }"): (
        "model output 'y' has different size for dims and reshape for m"
    ),
    X.replace("3 ]", "2, -1, 6 ] reshape { shape: [3, -1, 4] }"): (
        "model input 'x' has different size for dims and reshape for m"
    ),
    X.replace("3 ]", "-1, -1 ] reshape { shape: [-1, 1] }"): (
        "model input 'x' has different number of variable-size dimensions for dims and reshape for m"
    ),
    X.replace("}", "reshape { shape: [3, 0] } }"): (
        "model input 'x' reshape dimensions must be integer >= 1, or -1 to indicate .* for m"
    ),
    X.replace("3 ]", "1 ] reshape {}"): (
        "model input 'x' cannot have empty reshape for non-batching model as scalar tensors are not "
    ),
    Y.replace("}", 'label_filename: "no.txt" }'): "label_filename 'no.txt' of model 'm': No such file",
    Y.replace("}", 'label_filename: "../o/l.txt" }'): r"'../o/l\.txt' of model 'm' is not below its folder",
    Y.replace("}", r'label_filename: "a\000b" }'): "the label_filename .* of model 'm': ",
    "version_policy { latest {} }": "at least one version must be available under the version policy of",
    "version_policy { specific { versions: 9 } }": "at least one version must be available under the",
    'default_model_filename: "net.onnx"': r"unable to find 'net\.onnx' in version 1 of model 'm'",
    'default_model_filename: "../1/model.onnx"': r"unable to find '\.\./1/model\.onnx' in version 1",
    "instance_group { count: -1 }": "instance group 'm_0' of m: 'count' must be positive",
    "ensemble_scheduling { step { model_name: 'a' } }": "model 'm': ensemble_scheduling is not supported yet",
    "sequence_batching {}": "model 'm': sequence_batching is not supported yet",
    "model_transaction_policy { decoupled: true }": "model 'm': the decoupled .* is not supported yet",
}


@pytest.mark.parametrize(("config", "told"), BROKEN.items())
def test_a_configuration_that_cannot_be_used_is_refused_with_the_reason(
    site: TritonSite, config: str, told: str
) -> None:
    site.onnx("m", config, v1=1.0)
    site.write("o/l.txt", "a")
    with pytest.raises(LoadError, match=told) as caught:
        site.repository.versions("m")
    assert str(site.folder) not in caught.value.message


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            'platform: "caffe2"',
            "type 'caffe2' for m; there are: onnxruntime_onnx, pytorch_libtorch, torch_aoti",
        ),
        (
            'platform: "tensorrt_plan"',
            "model 'm': there is no backend 'tensorrt' here; there are: onnxruntime,",
        ),
        ('platform: "ensemble"', "model 'm': ensemble_scheduling is not supported yet"),
        ("max_batch_size: 1", "must specify 'platform' or 'backend' for 'm': 1/ has none of model.onnx,"),
        (None, "must specify 'platform' or 'backend' for 'm': 1/ has none of model.onnx,"),
        (b'name: "\xff"', "failed to read text proto from config.pbtxt: 'utf-8' codec"),
    ],
)
def test_a_model_of_no_known_backend_is_refused(
    site: TritonSite, config: str | bytes | None, told: str
) -> None:
    site.write("m/1/weights.dat", b"")
    if config is not None:
        site.write("m/config.pbtxt", config)
    with pytest.raises(LoadError) as caught:
        site.repository.versions("m")
    assert told in caught.value.message


NO_FOLDER = "it has no version folder, whose name is a whole number such as 1/"
NO_FILE = "must specify 'platform' or 'backend' for 'm': "


@pytest.mark.parametrize(
    ("config", "files", "told"),
    [
        (None, [], NO_FOLDER),
        (None, ["v1/model.onnx", "labels/l.txt"], f"{NO_FOLDER}; there are: labels/, v1/"),
        ('backend: "onnxruntime"', ["01/model.onnx"], f"{NO_FOLDER}; there are: 01/"),
        (None, ["1/.keep/x"], f"{NO_FILE}1/ has none of model.onnx, model.xml, model.pt, model.py"),
        (
            None,
            ["1/foo.onnx", "1/foo.txt"],
            f"{NO_FILE}1/ has foo.onnx but no model.onnx: rename it, or set 'backend' and"
            " 'default_model_filename' in config.pbtxt",
        ),
        (
            None,
            ["2/net.xml", "2/net.bin"],
            f"{NO_FILE}2/ has net.xml but no model.xml: rename it, or set 'backend' and"
            " 'default_model_filename' in config.pbtxt",
        ),
        (
            'backend: "onnxruntime"',
            ["1/foo.onnx"],
            "unable to find 'model.onnx' in version 1 of model 'm': 1/ has foo.onnx but no model.onnx: "
            "rename it, or set 'default_model_filename' in config.pbtxt",
        ),
        ('backend: "onnxruntime"', ["1/foo.xml"], "unable to find 'model.onnx' in version 1 of model 'm'"),
    ],
)
def test_a_folder_that_holds_no_model_is_told_what_it_lacks(
    site: TritonSite, config: str | None, files: list[str], told: str
) -> None:
    (site.folder / "m").mkdir()
    if config is not None:
        site.write("m/config.pbtxt", config)
    for file in files:
        site.write(f"m/{file}", b"")
    with pytest.raises(LoadError) as caught:
        site.repository.versions("m")
    assert caught.value.message.endswith(told)


@pytest.mark.parametrize(
    "files", [["config.pbtxt", "1/foo.onnx"], ["1/model.onnx"], ["2/model.py", "2/lib/a.py"]]
)
def test_the_folder_of_one_model_is_no_repository_and_its_parent_is(
    site: TritonSite, files: list[str]
) -> None:
    for file in files:
        site.write(file, b"")
    (name,) = site.repository.names()
    told = "the model repository looks like the folder of one model: its parent folder is the repository"
    with pytest.raises(LoadError, match=f"{told}$"):
        site.repository.versions(name)


def test_without_protobuf_the_message_says_what_to_install(
    site: TritonSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.onnx("m", v1=1.0)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(BackendMissing, match=r"pip install 'mms-lite\[grpc\]'"):
        site.repository.versions("m")


def test_a_configuration_of_the_client_replaces_the_file_and_may_be_partial(site: TritonSite) -> None:
    site.onnx("m", "max_batch_size: 2 version_policy { all {} }", v1=1.0, v2=1.0)
    text = '{"max_batch_size": "16", "dynamicBatching": {"preferred_batch_size": ["4"]}}'
    spec = only(site, config=text)
    assert spec.config is not None
    assert (spec.version, spec.batch_size, spec.config["max_batch_size"]) == ("2", 4, 16)
    assert (spec.path, spec.owns_path) == (str(site.folder / "m/2"), False)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"max_batch": 1}',
        '{"input": 3}',
        "[" * 100_000,
        '{"max_batch_size": "x"}',
        "[]",
        '""',
        "null",
        "",
    ],
)
def test_what_is_no_configuration_in_json_is_refused(site: TritonSite, text: str) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(LoadError, match="model 'm': failed to read the model configuration"):
        site.repository.versions("m", config=text)


def test_a_field_that_is_none_is_answered_with_the_names_that_config_pbtxt_has(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(LoadError) as caught:
        site.repository.versions("m", config='{"maxBatchsize": 3}')
    assert 'no field named "maxBatchsize"' in caught.value.message
    assert "'max_batch_size', 'input'" in caught.value.message
    assert "maxBatchSize" not in caught.value.message


def test_what_workers_wrote_is_deleted_with_their_version(site: TritonSite) -> None:
    site.onnx("m", "version_policy { all {} }", v1=1.0, v2=1.0)
    specs = site.repository.versions("m")
    folders = [Path(spec.scratch or "") for spec in specs]
    for folder in folders:
        (folder / "0").mkdir(parents=True)
    site.repository.discard(specs[0])
    assert list(site.work.iterdir()) == [folders[1]]


def test_files_of_the_client_are_written_for_each_version_and_deleted_with_it(site: TritonSite) -> None:
    config = {
        "backend": "python",
        "version_policy": {"latest": {"num_versions": 2}},
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": ["3"], "label_filename": "l.txt"}],
    }
    files = {
        "file:1/model.py": b"1",
        "2/model.py": b"2",
        "3/model.py": b"3",
        "3/lib/a.py": b"a",
        "l.txt": b"cat",
        "file:shared/x.py": b"x",
    }
    specs = site.repository.versions("m", config=json.dumps(config), files=files)
    assert [(spec.version, spec.owns_path) for spec in specs] == [("2", True), ("3", True)]
    assert [(Path(spec.path) / "model.py").read_bytes() for spec in specs] == [b"2", b"3"]
    assert (Path(specs[1].path) / "lib/a.py").read_bytes() == b"a"
    assert [(Path(spec.path).parent / "shared/x.py").read_bytes() for spec in specs] == [b"x", b"x"]
    assert [sorted(each.name for each in Path(spec.path).parent.iterdir()) for spec in specs] == [
        ["2", "l.txt", "shared"],
        ["3", "l.txt", "shared"],
    ]
    assert model(specs[0])["labelsByOutput"] == {"y": ["cat"]}
    assert len(list(site.work.iterdir())) == 2
    for spec in specs:
        site.repository.discard(spec)
    assert list(site.work.iterdir()) == []


def test_what_versions_share_is_written_once_and_only_versions_that_are_served_are(
    site: TritonSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Path.write_bytes
    monkeypatch.setattr(
        Path, "write_bytes", lambda path, data: written.append(path.name) or write(path, data)
    )
    files = {f"{number}/model.py": b"" for number in range(1, 9)} | {"weights.bin": b"w"}
    config = {"backend": "python", "version_policy": {"specific": {"versions": [3, 5, 99]}}}
    specs = site.repository.versions("m", config=json.dumps(config), files=files)
    assert [spec.version for spec in specs] == ["3", "5"]
    assert sorted(written) == ["model.py", "model.py", "weights.bin"]
    assert [(Path(spec.path).parent / "weights.bin").read_bytes() for spec in specs] == [b"w", b"w"]
    site.repository.discard(specs[0])
    assert (Path(specs[1].path).parent / "weights.bin").read_bytes() == b"w"


@pytest.mark.parametrize("file", ["../x", "/etc/x", "1/../../x", "file:/x", "", "file:", "1/a\0b", "1/a\nb"])
def test_files_that_belong_elsewhere_are_refused_and_nothing_is_written(site: TritonSite, file: str) -> None:
    with pytest.raises(InvalidRequest, match="is not the name of a file in a model's folder"):
        site.repository.versions("m", config="{}", files={"1/model.onnx": b"", file: b""})
    assert list(site.work.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "files", "told"),
    [
        (None, {"1/model.onnx": b""}, "only together with a model configuration"),
        ("{}", {"model.onnx": b""}, "at least one version must be available under the version policy of"),
        ('{"backend": "onnxruntime"}', {"model.onnx": b""}, "at least one version must be available"),
        ('{"backend": "onnxruntime"}', {"1/net.onnx": b""}, "unable to find 'model.onnx' in version 1"),
        ("{", {"1/model.onnx": b""}, "failed to read the model configuration"),
        ('{"backend": "onnxruntime"}', {"1/model.onnx": b"", "1/model.onnx/x": b""}, "cannot read the files"),
    ],
)
def test_files_that_make_no_model_leave_nothing_behind(
    site: TritonSite, config: str | None, files: dict[str, bytes], told: str
) -> None:
    with pytest.raises((LoadError, InvalidRequest), match=told):
        site.repository.versions("m", config=config, files=files)
    assert list(site.work.iterdir()) == []


def test_names_are_folders_and_nothing_outside_can_be_named(site: TritonSite) -> None:
    site.onnx("b", v1=1.0)
    site.onnx("a", v1=1.0)
    site.write(".git/x", "")
    site.write("README.md", "")
    assert site.repository.names() == ["a", "b"]
    for name in ("", ".", "..", ".git", "../models/a", "a/1", "README.md", "x", "a\0", "x" * 300):
        with pytest.raises((ModelNotFound, LoadError), match=r"failed to load|cannot read the model"):
            site.repository.versions(name)


def test_a_repository_that_is_not_there_is_an_error_without_its_path(site: TritonSite) -> None:
    site.folder.rmdir()
    with pytest.raises(LoadError) as caught:
        site.repository.names()
    assert caught.value.message == "cannot read the model repository: No such file or directory"


@pytest.fixture
def stamps(site: TritonSite) -> Iterator[Any]:
    site.onnx("m", "", v1=1.0, v2=1.0)
    repository = site.repository
    return lambda: repository.stamp("m")


def test_a_stamp_changes_with_the_files_of_what_it_stands_for(site: TritonSite, stamps: Any) -> None:
    first = stamps()
    assert stamps() == first and set(first) == {"", "1", "2"}
    site.write("m/2/model.onnx", b"new")
    second = stamps()
    assert [key for key in first if first[key] != second[key]] == ["2"]
    site.write("m/config.pbtxt", "")
    third = stamps()
    assert [key for key in first if second[key] != third[key]] == [""]
    site.write("m/1/__pycache__/model.pyc", b"")
    site.write("m/__pycache__/lib.pyc", b"")
    assert stamps() == third
    site.write("m/lib/tools.py", b"")
    fourth = stamps()
    assert [key for key in first if third[key] != fourth[key]] == [""]
    assert site.repository.stamp("x") is None


def test_one_version_is_read_by_its_url_as_the_mms_api_has_it(site: TritonSite) -> None:
    site.onnx("m", "version_policy { all {} }", v1=1.0, v2=1.0)
    read = site.repository.read
    assert [read(LoadOptions(url=url)).version for url in ("m", "m/", "m/1", "m/2")] == ["2", "2", "1", "2"]
    spec = read(LoadOptions(url="m", name="m", version="1", workers=3, response_timeout_s=4))
    assert (spec.version, spec.min_workers, spec.max_workers, spec.response_timeout_s) == ("1", 3, 3, 4)
    with pytest.raises(VersionNotFound):
        read(LoadOptions(url="m/3"))
    with pytest.raises(InvalidRequest, match="has the name of its folder: m"):
        read(LoadOptions(url="m", name="n"))
    with pytest.raises(ModelNotFound):
        read(LoadOptions(url="https://example.com/m.mar"))


@pytest.mark.parametrize(
    ("mode", "listed", "names"),
    [
        ("none", "", ["a", "b"]),
        ("poll", "x", ["a", "b"]),
        ("explicit", "", []),
        ("explicit", " b , x,b", ["b", "x"]),
        ("explicit", "x,*", ["a", "b"]),
        ("explicit", "ALL", ["a", "b"]),
    ],
)
def test_the_mode_says_what_is_loaded_at_start(
    site: TritonSite, mode: str, listed: str, names: list[str]
) -> None:
    site.onnx("a", v1=1.0)
    site.onnx("b", v1=1.0)
    assert startup_names(site.repository, mode, listed) == names


def test_whole_milliseconds_are_whole_numbers(site: TritonSite) -> None:
    site.onnx("m", "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 2000 }", v1=1.0)
    assert json.dumps(only(site).max_batch_delay_ms) == "2"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"batch_size": 2}, "batch_size"),
        ({"max_batch_delay_ms": 2}, "max_batch_delay"),
        ({"handler": "service:handle"}, "handler"),
        ({"runtime": "python"}, "runtime"),
        ({"sha256": "0" * 64}, "sha256"),
        ({"set_default": True}, "set_default"),
    ],
)
def test_what_only_archives_can_be_told_is_refused(
    site: TritonSite, given: dict[str, Any], named: str
) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(InvalidRequest, match=f"its files decide: {named} cannot"):
        site.repository.read(LoadOptions(url="m", **given))


def test_fewer_workers_than_none_are_refused(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    with pytest.raises(InvalidRequest, match="initial_workers cannot be negative"):
        site.repository.read(LoadOptions(url="m", workers=-1))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def parameters(**given: str) -> str:
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in given.items()
    )


def test_parameters_of_tritons_own_openvino_backend_are_named_and_not_openvinos(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.write(
        "m/config.pbtxt",
        'backend: "openvino"'
        + parameters(
            SKIP_OV_DYNAMIC_BATCHSIZE="YES",
            TARGET_DEVICE="GPU",
            INFERENCE_NUM_THREADS="2",
            NUM_STREAMS="1",
            x="y",
        ),
    )
    site.write("m/1/model.xml", b"")
    assert model(only(site))["handlerConfig"]["backend"]["options"] == {
        "INFERENCE_NUM_THREADS": "2",
        "NUM_STREAMS": "1",
    }
    assert warnings(caplog) == [
        "Model m: parameters that have no effect here: SKIP_OV_DYNAMIC_BATCHSIZE, TARGET_DEVICE, x"
    ]


def test_a_python_models_own_interpreter_is_told_to_have_no_effect(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.python("m")
    site.write(
        "m/config.pbtxt",
        'backend: "python"' + parameters(EXECUTION_ENV_PATH="$$TRITON_MODEL_DIRECTORY/env.tar.gz", mine="x"),
    )
    assert only(site).config is not None
    assert warnings(caplog) == ["Model m: parameters that have no effect here: EXECUTION_ENV_PATH"]


def test_a_number_of_threads_that_is_none_is_told_of(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.onnx("m", parameters(intra_op_thread_count="many"), v1=1.0)
    assert "threads" not in model(only(site))["handlerConfig"]["backend"]
    assert warnings(caplog) == ["Model m: parameters that have no effect here: intra_op_thread_count"]


def test_only_python_models_have_optional_inputs(site: TritonSite, caplog: pytest.LogCaptureFixture) -> None:
    optional = X.replace("}", "optional: true }")
    site.onnx("m", optional, v1=1.0)
    site.python("code")
    site.write("code/config.pbtxt", 'backend: "python"' + optional)
    only(site)
    assert warnings(caplog) == ["Model m: only python models can do without an input: x is not optional"]
    only(site, "code")
    assert len(warnings(caplog)) == 1


def test_a_group_for_a_gpu_that_is_not_there_says_so(
    site: TritonSite, caplog: pytest.LogCaptureFixture
) -> None:
    site.onnx("m", "instance_group { kind: KIND_GPU gpus: [ 0, 9 ] }", v1=1.0)
    site.defaults["devices"] = (0, 1)
    assert only(site).devices == (0,)
    assert warnings(caplog) == ["Model m: instance group m_0: there is no GPU 9"]


def test_files_that_cannot_be_written_leave_nothing_behind(
    site: TritonSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp
    full = iter([False, True])

    def mkdtemp(**given: Any) -> str:
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return made(**given)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    files = {"1/model.onnx": b"", "2/model.onnx": b""}
    with pytest.raises(LoadError, match="cannot read the files of the request: No space left on device"):
        config = '{"backend": "onnxruntime", "version_policy": {"all": {}}}'
        site.repository.versions("m", config=config, files=files)
    assert list(site.work.iterdir()) == []


def test_a_configuration_may_begin_with_a_byte_order_mark(site: TritonSite) -> None:
    site.onnx("m", v1=1.0)
    site.write("m/config.pbtxt", '\ufeffbackend: "onnxruntime" max_batch_size: 3'.encode())
    config = only(site).config
    assert config is not None and config["max_batch_size"] == 3
