"""Options: what a file, the command line and the environment may say, and who wins."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from mms_lite.address import Address
from mms_lite.config import (
    JAVA_ONLY,
    OPTIONS,
    PRESETS,
    Config,
    LoadedConfig,
    find_config_file,
    render_markdown,
)
from mms_lite.errors import ConfigError
from mms_lite.properties import parse_properties

ROOT = Path(__file__).parent.parent


def load(
    tmp_path: Path, text: str = "", overrides: Mapping[str, object] | None = None, **environ: str
) -> LoadedConfig:
    file = tmp_path / "config.properties"
    file.write_text(text, encoding="latin-1")
    return Config.load(file, overrides or {}, environ)


def test_a_file_is_latin_1_unless_a_byte_order_mark_says_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "config.properties"
    file.write_bytes(b"model_store=caf\xe9")
    assert Config.load(file, {}, {}).config.model_store == Path("caf\u00e9")
    file.write_bytes(b"\xef\xbb\xbfmodel_store=caf\xc3\xa9")
    loaded = Config.load(file, {}, {})
    assert (loaded.config.model_store, loaded.notes) == (Path("caf\u00e9"), ())


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("http://127.0.0.1:8080", Address("http", "127.0.0.1", 8080)),
        ("HTTPS://Host:1", Address("https", "Host", 1)),
        ("http://host", Address("http", "host", 80)),
        ("https://host", Address("https", "host", 443)),
        ("http://host:0", Address("http", "host", 0)),
        ("http://host:65535/", Address("http", "host", 65535)),
        (" http://host:8080 ", Address("http", "host", 8080)),
        ("http://[::1]:8080", Address("http", "::1", 8080)),
        ("unix:/run/mms.sock", Address("unix", "", 0, "/run/mms.sock")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:80",
        "ftp://host",
        "http://",
        "http://host:",
        "http://host:x",
        "http://::1:80",
        "http://[x]:1",
        "http://host:80/path",
        "http://a b:80",
        "unix:relative",
        "unix:/",
        "http://host:-1",
        "http://u@h:1:2",
    ],
)
def test_what_is_no_address_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse(text)
    assert caught.value.message == f"Invalid binding address: {text}"


@pytest.mark.parametrize("port", ["65536", "100000", "9" * 5000])
def test_a_port_over_65535_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match=r"^Invalid port number: http://h:"):
        Address.parse(f"http://h:{port}")


def test_addresses_without_a_port_take_that_of_their_api(tmp_path: Path) -> None:
    config = load(tmp_path, "inference_address=https://h\nmanagement_address=https://h").config
    assert (config.inference_address.port, config.management_address.port) == (443, 8444)
    assert load(tmp_path, "management_address=http://h").config.management_address.port == 8081


def test_without_file_and_flags_everything_is_a_default() -> None:
    loaded = Config.load(None, {}, {})
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.notes == ()


# What MMS has where nothing is set, by key: as it is written in a file.
DEFAULTS_OF_MMS = {
    "inference_address": "http://127.0.0.1:8080",
    "management_address": "http://127.0.0.1:8081",
    "default_workers_per_model": "0",
    "unregister_model_timeout": "120",
    "job_queue_size": "100",
    "max_request_size": "6553500",
    "max_response_size": "6553500",
    "decode_input_request": "true",
    "preload_model": "false",
    "keystore_pass": "changeit",
    "keystore_type": "PKCS12",
    "debug": "false",
}
UNSET_IN_MMS = [
    *("model_store", "load_models", "number_of_gpu", "default_service_handler", "blacklist_env_vars"),
    *("cors_allowed_origin", "cors_allowed_methods", "cors_allowed_headers"),
    *("keystore", "private_key_file", "certificate_file"),
]


@pytest.mark.parametrize("key", [*DEFAULTS_OF_MMS, *UNSET_IN_MMS])
def test_defaults_and_variables_are_those_of_mms(tmp_path: Path, key: str) -> None:
    (option,) = (option for option in OPTIONS if option.key == key)
    default = load(tmp_path)
    if key in UNSET_IN_MMS:
        assert getattr(default.config, option.name) in (None, "")
    else:
        same = load(tmp_path, f"{key}={DEFAULTS_OF_MMS[key]}")
        assert getattr(same.config, option.name) == getattr(default.config, option.name)
    sample = DEFAULTS_OF_MMS.get(key, "7").replace(":80", ":70")
    by_variable = load(tmp_path, "enable_envvars_config=true", {}, **{f"MMS_{key.upper()}": sample})
    assert by_variable.origins[option.name] == f"environment MMS_{key.upper()}"


def test_host_metrics_are_taken_each_minute_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path).config.metric_time_interval_s == 60
    text = "enable_envvars_config=true\nmetric_time_interval=5"
    assert load(tmp_path, text, {}, MMS_METRIC_TIME_INTERVAL="9").config.metric_time_interval_s == 5


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().strict = True  # type: ignore[misc]


def test_every_option_is_read_from_the_file_and_the_overrides(tmp_path: Path) -> None:
    address = "http://h:1"
    samples = {"address": address, "address or none": address, "true or false": "true", "path": "p"}
    samples |= {"text": "t", "secret text": "t", "none, poll or explicit": "poll"}
    for option in OPTIONS:
        if option.name == "preload_model":
            continue  # told wherever it is set
        text = "77777777" if option.name == "max_frame_bytes" else samples.get(option.kind.word, "7")
        by_file = load(tmp_path, f"{option.key}={text}")
        by_flag = load(tmp_path, "", {option.name: text})
        assert by_file.notes == by_flag.notes == ()
        assert getattr(by_file.config, option.name) == getattr(by_flag.config, option.name)
        assert str(getattr(by_file.config, option.name)).removesuffix(".0").lower() == text
        assert by_file.origins[option.name].startswith("file ")
        assert by_flag.origins[option.name] == "command line"


def test_file_then_command_line_then_environment(tmp_path: Path) -> None:
    text = "job_queue_size=1\n"
    flags: dict[str, object] = {"job_queue_size": 2, "model_store": None}
    loaded = load(tmp_path, text)
    assert (loaded.config.job_queue_size, loaded.origins["job_queue_size"]) == (
        1,
        f"file {tmp_path / 'config.properties'}",
    )
    loaded = load(tmp_path, text, flags)
    assert (loaded.config.job_queue_size, loaded.origins["job_queue_size"]) == (2, "command line")
    assert loaded.config.model_store is None
    loaded = load(tmp_path, text + "enable_envvars_config=TRUE", flags, MMS_JOB_QUEUE_SIZE="3")
    assert loaded.config.job_queue_size == 3
    assert loaded.origins["job_queue_size"] == "environment MMS_JOB_QUEUE_SIZE"


def test_the_environment_counts_only_if_the_file_says_so(tmp_path: Path) -> None:
    flags = {"enable_envvars_config": "true"}
    loaded = load(tmp_path, "", flags, MMS_JOB_QUEUE_SIZE="3", MMS_ENABLE_ENVVARS_CONFIG="true")
    assert loaded.config.job_queue_size == 100
    assert (
        "environment MMS_JOB_QUEUE_SIZE is ignored: no file says enable_envvars_config=true" in loaded.notes
    )


def test_log_folders_come_from_their_own_variables_always(tmp_path: Path) -> None:
    loaded = load(tmp_path, "log_location=a", {}, LOG_LOCATION="b", METRICS_LOCATION="c")
    assert (loaded.config.log_location, loaded.config.metrics_location) == (Path("b"), Path("c"))
    assert loaded.origins["log_location"] == "environment LOG_LOCATION"
    assert load(tmp_path, "log_location=a", {}, LOG_LOCATION="").config.log_location == Path("a")


@pytest.mark.parametrize(
    ("text", "timeout_s", "notes"),
    [
        ("", 120, 0),
        ("default_response_timeout_seconds=5", 5, 0),
        ("default_response_timeout_seconds=0.5", 0.5, 0),
        ("default_response_timeout=2", 120, 1),
        ("default_response_timeout=120", 7200, 1),
        ("default_response_timeout=2\ndefault_response_timeout_seconds=5", 5, 1),
        ("default_response_timeout=3\ndefault_response_timeout_seconds=-1", 180, 1),
        ("default_response_timeout_seconds=-1", 120, 0),
    ],
)
def test_response_timeout_in_seconds_or_in_the_minutes_of_mms(
    tmp_path: Path, text: str, timeout_s: float, notes: int
) -> None:
    loaded = load(tmp_path, text)
    assert loaded.config.response_timeout_s == timeout_s
    assert len(loaded.notes) == notes


def test_the_note_on_minutes_names_both_units(tmp_path: Path) -> None:
    (note,) = load(tmp_path, "default_response_timeout=120").notes
    assert note.startswith("default_response_timeout counts minutes, as in MMS: 120 is 7200 s")
    assert note.endswith("default_response_timeout_seconds counts seconds")


def test_minutes_from_the_environment_lose_to_seconds_from_the_file(tmp_path: Path) -> None:
    text = "enable_envvars_config=true\ndefault_response_timeout_seconds=5"
    assert load(tmp_path, text, {}, MMS_DEFAULT_RESPONSE_TIMEOUT="9").config.response_timeout_s == 5


def test_variables_are_replaced_in_values(tmp_path: Path) -> None:
    loaded = load(tmp_path, "model_store=$$HOME$$/$$SUB$$/$$X$$", {}, HOME="/$1\\", SUB="$$HOME$$")
    assert loaded.config.model_store == Path("/$1\\/$$HOME$$/$$X$$")


def test_an_unset_variable_is_an_error_even_in_an_unused_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Invalid Environment Variable NOPE$"):
        load(tmp_path, "vmargs=$$NOPE$$")


@pytest.mark.parametrize("text", ["7", "7 ", "+7", "007", "7\\t"])
def test_integers_that_are_accepted(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"job_queue_size={text}").config.job_queue_size == 7


@pytest.mark.parametrize("text", ["", "x", "7.5", "1_000", "0x7", "7 8", "\\u0667", "9" * 30])
def test_integers_that_are_refused_in_the_words_of_java(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"job_queue_size={text}")
    assert caught.value.message.startswith('For input string: "')
    assert caught.value.message.endswith(f"(job_queue_size, file {tmp_path / 'config.properties'})")


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "1e5", "1.", "9" * 30])
def test_seconds_that_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="For input string"):
        load(tmp_path, f"load_timeout_s={text}")


@pytest.mark.parametrize(
    "text",
    [
        "job_queue_size=0",
        "job_queue_size=-5",
        "default_workers_per_model=-1",
        "number_of_gpu=-1",
        "default_response_timeout_seconds=0",
        "default_response_timeout=0",
        "max_request_size=0",
    ],
)
def test_numbers_below_their_minimum_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        load(tmp_path, text)


def test_numbers_of_the_command_line_have_the_same_minimum(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^job_queue_size must be at least 1, not 0 \(command line\)$"):
        load(tmp_path, "", {"job_queue_size": 0})


@pytest.mark.parametrize(
    ("text", "value", "notes"),
    [("true", True, 0), ("TrUe", True, 0), ("False", False, 0), ("yes", False, 1), ("true ", False, 1)],
)
def test_only_true_is_true_and_the_rest_is_told(tmp_path: Path, text: str, value: bool, notes: int) -> None:
    loaded = load(tmp_path, f"decode_input_request={text}")
    assert loaded.config.decode_input_request is value
    assert len(loaded.notes) == notes


def test_an_empty_text_or_path_is_not_set(tmp_path: Path) -> None:
    config = load(tmp_path, "model_store=\ndefault_service_handler=\nlog_location=").config
    assert (config.model_store, config.default_service_handler, config.log_location) == (
        None,
        None,
        Path("logs"),
    )


def test_a_blank_at_the_end_of_a_path_is_kept_and_told(tmp_path: Path) -> None:
    loaded = load(tmp_path, "model_store=models ")
    assert loaded.config.model_store == Path("models ")
    assert "ends in a blank" in loaded.notes[0]


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("job_queu_size", "unknown key: job_queu_size; did you mean job_queue_size?"),
        ("zzz", "unknown key: zzz"),
        ("vmargs", "vmargs concerns Java only, ignored"),
        ("io_ratio", "io_ratio concerns Java only, ignored"),
    ],
)
def test_keys_without_effect_are_told(tmp_path: Path, key: str, note: str) -> None:
    (told,) = load(tmp_path, f"{key}=1").notes
    assert told == f"{note} (file {tmp_path / 'config.properties'})"


def test_no_key_is_both_an_option_and_ignored() -> None:
    keys = [option.key for option in OPTIONS] + list(JAVA_ONLY)
    assert len(keys) == len(set(keys))


def test_asking_for_what_happens_anyway_is_not_told(tmp_path: Path) -> None:
    assert load(tmp_path, "preload_model=false\ncors_allowed_origin=").notes == ()


def test_preload_model_is_accepted_and_told(tmp_path: Path) -> None:
    loaded = load(tmp_path, "preload_model=true")
    assert loaded.config.preload_model == "true"
    assert loaded.notes == ("preload_model=true has no effect: workers are started, never forked",)


def test_num_workers_counts_where_default_workers_per_model_is_not_set(tmp_path: Path) -> None:
    assert load(tmp_path, "NUM_WORKERS=3").config.default_workers_per_model == 3
    both = load(tmp_path, "NUM_WORKERS=3\ndefault_workers_per_model=2").config
    assert both.default_workers_per_model == 2


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    assert load(tmp_path, "metrics_address=None").config.metrics_address is None
    assert load(tmp_path, "metrics_address=http://h:1").config.metrics_address == Address("http", "h", 1)


def test_variables_without_effect_are_told(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "enable_envvars_config=true",
        {},
        MMS_KEYSTORE="x",
        MMS_JOB_QUEU_SIZE="1",
        MMS_CONFIG_FILE="x",
        OTHER="x",
    )
    assert loaded.notes == ("unknown environment MMS_JOB_QUEU_SIZE; did you mean MMS_JOB_QUEUE_SIZE?",)


def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown option: job_queue"):
        load(tmp_path, "", {"job_queue": 1})


def test_a_missing_file_is_passed_over_with_a_note(tmp_path: Path) -> None:
    loaded = Config.load(tmp_path / "none", {}, {})
    assert loaded.config == Config()
    assert "not found" in loaded.notes[0]


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read "):
        Config.load(tmp_path, {}, {})


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config_file(None, {}) is None
    (tmp_path / "config.properties").touch()
    assert find_config_file(None, {"MMS_CONFIG_FILE": ""}) == Path("config.properties")
    assert find_config_file("flag", {}) == Path("flag")
    assert find_config_file("flag", {"MMS_CONFIG_FILE": "env"}) == Path("env")
    assert find_config_file("sagemaker", {}) == PRESETS["sagemaker"]
    assert find_config_file("sagemaker", {"MMS_CONFIG_FILE": "env"}) == Path("env")
    assert find_config_file(None, {"MMS_CONFIG_FILE": "sagemaker"}) == Path("sagemaker")


@pytest.mark.parametrize(
    ("said", "text", "is_open"),
    [("true", "", True), ("true", "management_open=false", False), ("false", "", False), ("", "", False)],
)
def test_in_a_sagemaker_container_for_several_models_management_is_open(
    tmp_path: Path, said: str, text: str, is_open: bool
) -> None:
    loaded = load(tmp_path, text, {}, SAGEMAKER_MULTI_MODEL=said)
    assert loaded.config.management_open is is_open
    if is_open:
        assert loaded.origins["management_open"] == "environment SAGEMAKER_MULTI_MODEL"


def test_the_file_is_told_even_if_it_is_missing(tmp_path: Path) -> None:
    assert load(tmp_path).file == tmp_path / "config.properties"
    assert Config.load(tmp_path / "none", {}, {}).file == tmp_path / "none"
    assert Config.load(None, {}, {}).file is None


def test_the_committed_page_is_the_rendering_of_the_table() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == render_markdown(), "run: python -m mms_lite.config > docs/configuration.md"


def test_the_page_names_every_key() -> None:
    page = render_markdown()
    assert all(f"`{key}`" in page for key in [*(option.key for option in OPTIONS), *JAVA_ONLY])


def test_the_example_file_shows_known_keys_and_sets_none() -> None:
    example = ROOT / "config.properties"
    assert Config.load(example, {}, {}).config == Config()
    shown = [line[1:] for line in example.read_text().splitlines() if line.startswith("#") and "=" in line]
    text = "\n".join(line for line in shown if not line.startswith(" "))
    assert parse_properties(text).keys() <= {option.key for option in OPTIONS}
    assert len(parse_properties(text)) >= 8


def test_a_triton_repository_has_tritons_ports_where_nobody_names_others(tmp_path: Path) -> None:
    loaded = load(tmp_path, "grpc_address=http://127.0.0.1:7000\n", {"model_repository": str(tmp_path)})
    config = loaded.config
    assert config.inference_address.port == 8000
    assert config.grpc_address is not None and config.grpc_address.port == 7000
    assert config.metrics_address is not None and config.metrics_address.port == 8002
    with pytest.raises(ConfigError, match="exclude each other"):
        load(tmp_path, "", {"model_repository": str(tmp_path), "model_store": str(tmp_path)})


def test_a_port_takes_the_place_of_an_addresss(tmp_path: Path) -> None:
    loaded = load(tmp_path, "inference_address=http://0.0.0.0:9\ngrpc_address=none\n")
    ported = loaded.with_ports({"inference_address": 5, "grpc_address": 6, "metrics_address": None})
    assert str(ported.config.inference_address) == "http://0.0.0.0:5"
    assert str(ported.config.grpc_address) == "http://127.0.0.1:6"
    assert ported.origins["inference_address"] == "command line"
    assert ported.config.metrics_address == loaded.config.metrics_address
    with pytest.raises(ConfigError, match="cannot have the port 70000"):
        loaded.with_ports({"inference_address": 70000})
