"""Every option of the server, once: its field, default, meaning, property key and flag.

Reads config.properties as Java does and lays file, command line and environment over the defaults. The
command line, the MMS_* variables and docs/configuration.md all derive from the table `OPTIONS`.
"""

# ruff: noqa: RUF009 - `_option` returns a dataclasses.field

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mms_lite.address import Address
from mms_lite.errors import ConfigError
from mms_lite.properties import parse_properties

T = TypeVar("T")

MINUTES_KEY = "default_response_timeout"
SECONDS_KEY = "default_response_timeout_seconds"
ENABLE_KEY = "enable_envvars_config"
WORKERS_KEY = "NUM_WORKERS"
PRESETS = {"sagemaker": Path(__file__).parent / "configs" / "sagemaker.properties"}  # names for --mms-config
# Where the addresses listen that nobody names, under --model-repository.
TRITON_PORTS = {"inference_address": 8000, "grpc_address": 8001, "metrics_address": 8002}
_CONTROL_MODES = ("none", "poll", "explicit")
GIB = 1 << 30
_FRAME_HEADROOM = 1 << 20  # what a message between processes holds besides the body


def _integer(text: str) -> int:
    # The word of Java's Integer.parseInt, which scripts may look for. Blanks around are ours to forgive.
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ConfigError(f'For input string: "{text}"')
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[+-]?[0-9]{1,10}(\.[0-9]{1,9})?", text.strip()):
        raise ConfigError(f'For input string: "{text}"')
    return float(text)


def _switch(text: str) -> bool:
    return text.lower() == "true"


def _address_or_none(text: str, *, port: int = 8082) -> Address | None:
    if text.strip().lower() == "none":
        return None
    return Address.parse(text, http_port=port, https_port=port)


def _control_mode(text: str) -> str:
    mode = text.strip().lower()
    if mode not in _CONTROL_MODES:
        raise ConfigError(f'"{text}" is none of {", ".join(_CONTROL_MODES)}')
    return mode


@dataclass(frozen=True, slots=True)
class Kind:
    """What an option's text means: a word for the documentation, and the parser."""

    word: str
    parse: Callable[[str], object]


TEXT = Kind("text", str)
PATH = Kind("path", Path)
INTEGER = Kind("integer", _integer)
BYTES = Kind("bytes", _integer)
SECONDS = Kind("seconds", _seconds)
SWITCH = Kind("true or false", _switch)
INFERENCE = Kind("address", Address.parse)
MANAGEMENT = Kind("address", partial(Address.parse, http_port=8081, https_port=8444))
CONTROL_MODE = Kind("none, poll or explicit", _control_mode)
GRPC = Kind("address or none", partial(_address_or_none, port=8070))
METRICS = Kind("address or none", _address_or_none)
SECRET = Kind("secret text", str)  # never printed
_TEXTS = (TEXT, PATH, SECRET)


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table. `flag` and `env` are "" where the option cannot be set in that way.

    A field of Config gives what differs from the rule; `OPTIONS` fills in the rest.
    """

    kind: Kind
    doc: str
    key: str = ""
    flag: str | None = None
    env: str | None = None
    minimum: float | None = None
    name: str = ""
    default: object = None


def _option(default: T, kind: Kind, doc: str, minimum: float | None = None, **names: str) -> T:
    return field(default=default, metadata={"option": Option(kind, doc, minimum=minimum, **names)})


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one server. Relative paths are relative to the server's working directory."""

    inference_address: Address = _option(
        Address("http", "127.0.0.1", 8080), INFERENCE, "Where the inference API listens."
    )
    management_address: Address = _option(
        Address("http", "127.0.0.1", 8081), MANAGEMENT, "Where the management API listens; may be the same."
    )
    metrics_address: Address | None = _option(
        Address("http", "127.0.0.1", 8082), METRICS, "Where Prometheus scrapes `/metrics`; `none`: nowhere."
    )
    grpc_address: Address | None = _option(
        Address("http", "127.0.0.1", 8070),
        GRPC,
        "Where gRPC is served (KServe v2, TensorFlow Serving); `none`: nowhere.",
    )
    model_store: Path | None = _option(None, PATH, "Folder of the model archives.")
    model_repository: Path | None = _option(None, PATH, "Folder of a Triton model repository.")
    model_control_mode: str = _option(
        "none",
        CONTROL_MODE,
        "What changes which models of the repository are served, besides the management API: `none` nothing,"
        " `poll` the folder, `explicit` KServe v2's load and unload.",
    )
    repository_poll_s: float = _option(
        15.0,
        SECONDS,
        "Time between two looks at the repository in mode poll.",
        0.1,
        key="repository_poll_secs",
    )
    server_name: str = _option(
        "", TEXT, "The name in KServe v2's server metadata; unset: mms-lite, with model_repository triton."
    )
    load_models: str = _option(
        "", TEXT, "Load at start: `ALL` in model_store, or `[name=]location,...`", flag="--models"
    )
    default_workers_per_model: int = _option(
        0, INTEGER, "Workers where none are asked for; 0: at start one per GPU, else CPU.", minimum=0
    )
    response_timeout_s: float = _option(
        120.0, SECONDS, "How long one batch may run in a worker.", minimum=0.1, key=SECONDS_KEY
    )
    load_timeout_s: float = _option(600.0, SECONDS, "How long a worker may take to load.", minimum=1)
    job_queue_size: int = _option(100, INTEGER, "Requests that may wait per model; more: 503.", minimum=1)
    max_request_size: int = _option(6_553_500, BYTES, "Largest request body (MMS API).", minimum=1)
    max_response_size: int = _option(6_553_500, BYTES, "Largest response body (MMS API).", minimum=1)
    max_tensor_request_size: int = _option(
        64 << 20, BYTES, "Largest request of KServe v2 and TensorFlow Serving, HTTP and gRPC.", minimum=1
    )
    max_frame_bytes: int = _option(GIB, BYTES, "Largest batch, or answer, of a worker.", minimum=1)
    max_bytes_in_flight: int = _option(
        GIB, BYTES, "Largest sum of request bodies held, per address.", minimum=1
    )
    drain_timeout_s: float = _option(30.0, SECONDS, "How long a stop waits for open requests.", minimum=0)
    start_timeout_s: float = _option(
        300.0, SECONDS, "How long `--start` waits until ready.", flag="--start-timeout", minimum=1
    )
    number_of_gpu: int | None = _option(None, INTEGER, "GPUs to use at most; unset: all.", minimum=0)
    decode_input_request: bool = _option(True, SWITCH, "Decode text and JSON; false: handlers get bytes.")
    default_service_handler: str | None = _option(None, TEXT, "`module:function` for models that name none.")
    unregister_model_timeout_s: float = _option(
        120.0, SECONDS, "How long a model's workers may take to stop.", 0, key="unregister_model_timeout"
    )
    blacklist_env_vars: str = _option("", TEXT, "Regex: environment variables that workers do not get.")
    preload_model: str = _option("false", TEXT, "Accepted as in MMS and logged: nothing is forked here.")
    debug: bool = _option(False, SWITCH, "One worker per model, and no time limits on what it does.")
    allowed_urls: str = _option(
        "", TEXT, "Where models may come from by http(s): `scheme://host[:port]/prefix,...`; unset: nowhere."
    )
    max_download_bytes: int = _option(10 * GIB, BYTES, "Largest archive that is downloaded.", minimum=1)
    download_timeout_s: float = _option(600.0, SECONDS, "How long a download may take.", minimum=1)
    private_key_file: Path | None = _option(None, PATH, "Private key for https (PEM, not encrypted).")
    certificate_file: Path | None = _option(None, PATH, "Certificate for https (PEM), or a chain.")
    keystore: Path | None = _option(None, PATH, "PKCS12 file with key and certificate; wins over PEM files.")
    keystore_pass: str = _option("changeit", SECRET, "The keystore's password.", flag="")
    keystore_type: str = _option("PKCS12", TEXT, "The keystore's type; only PKCS12 is read.")
    cors_allowed_origin: str | None = _option(
        None, TEXT, "Sent as Access-Control-Allow-Origin with every response."
    )
    cors_allowed_methods: str | None = _option(None, TEXT, "Sent as Access-Control-Allow-Methods.")
    cors_allowed_headers: str | None = _option(None, TEXT, "Sent as Access-Control-Allow-Headers.")
    management_token_file: Path | None = _option(
        None, PATH, "File (0600) with the token for managing from other machines; made where there is none."
    )
    management_open: bool = _option(
        False, SWITCH, "Let whoever reaches the management address manage, without a token."
    )
    metric_time_interval_s: float = _option(
        60.0, SECONDS, "Time between two lines of host metrics.", 1, key="metric_time_interval", env=""
    )
    strict: bool = _option(False, SWITCH, "End with exit code 3 when any model fails to load at start.")
    log_location: Path = _option(Path("logs"), PATH, "Folder of the log files.", env="LOG_LOCATION")
    metrics_location: Path = _option(Path("logs"), PATH, "Folder of metrics files.", env="METRICS_LOCATION")
    console_log: bool | None = _option(
        None,
        SWITCH,
        "Write the log to stdout too. Unset: in the foreground, and where stdout is that of process 1 (in a"
        " container).",
    )
    temp_directory: Path | None = _option(
        None, PATH, "Folder for extracted archives; unset: TEMP, else the system's."
    )
    enable_envvars_config: bool = _option(
        False, SWITCH, "Let MMS_* variables override the rest; in the file only.", flag="", env=""
    )

    @classmethod
    def load(
        cls, file: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str]
    ) -> LoadedConfig:
        """Return the configuration: defaults < file < overrides < environment, as in MMS.

        `overrides` are the command line's, by field name: text or the field's type; None is not set.

        Raises:
            ConfigError: the file cannot be read, or a value cannot be used.
        """
        notes: list[str] = []
        settings = _file_settings(file, environ, notes)
        enabled = ENABLE_KEY in settings and _switch(settings[ENABLE_KEY].text)
        settings.update(_override_settings(overrides))
        settings.update(_environ_settings(environ, enabled, notes))
        for key, setting in _environ_defaults(environ):
            settings.setdefault(key, setting)
        _resolve_response_timeout(settings, notes)
        # The fallback that MMS reads but does not document.
        if (workers := settings.pop(WORKERS_KEY, None)) is not None:
            settings.setdefault("default_workers_per_model", workers)
        values: dict[str, Any] = {}
        origins = {}
        for option in OPTIONS:
            given = settings.get(option.key)
            values[option.name] = option.default if given is None else _value(option, given, notes)
            origins[option.name] = "default" if given is None else given.origin
        if values["preload_model"].strip().lower() not in ("", "false", "no", "n", "0"):
            notes.append(
                f"preload_model={values['preload_model']} has no effect: workers are started, never forked"
            )
        for name in ("max_request_size", "max_tensor_request_size"):
            if values[name] + _FRAME_HEADROOM > values["max_frame_bytes"]:
                raise ConfigError(f"{name} must be smaller than max_frame_bytes by a mebibyte")
        if values["model_repository"] is not None:
            if values["model_store"] is not None:
                raise ConfigError("model_store and model_repository exclude each other")
            for name, port in TRITON_PORTS.items():
                if origins[name] == "default":
                    values[name] = replace(values[name], port=port)
        return LoadedConfig(cls(**values), origins, tuple(notes), file)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration, where each value came from (by field name), and what the log should tell of it.

    An origin is "default", "file PATH", "preset NAME", "command line" or "environment NAME". `file` is the
    properties file, also one that is missing.
    """

    config: Config
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    file: Path | None = None

    def with_ports(self, ports: Mapping[str, int | None]) -> LoadedConfig:
        """Return the configuration with these ports, by the field of the address; None leaves one as it is.

        Raises:
            ConfigError: the address has no port, or the number is not one.
        """
        origins = dict(self.origins)
        changed: dict[str, Any] = {}
        for name, port in ports.items():
            if port is None or origins[name].startswith("environment"):
                continue
            address: Any = getattr(self.config, name) or next(o.default for o in OPTIONS if o.name == name)
            if address.scheme == "unix" or not 0 <= port <= 65535:
                raise ConfigError(f"{address} cannot have the port {port} ({name}, command line)")
            changed[name] = replace(address, port=port)
            origins[name] = "command line"
        return replace(self, config=replace(self.config, **changed), origins=origins)


def _options() -> Iterator[Option]:
    for entry in fields(Config):
        row: Option = entry.metadata["option"]
        key = row.key or entry.name
        flag = "--" + key.replace("_", "-") if row.flag is None else row.flag
        env = "MMS_" + key.upper() if row.env is None else row.env
        yield replace(row, key=key, flag=flag, env=env, name=entry.name, default=entry.default)


OPTIONS: tuple[Option, ...] = tuple(_options())
JAVA_ONLY = (
    "async_logging", "io_ratio", "model_server_home", "netty_client_threads", "number_of_netty_threads",
    "plugins_path", "prefer_direct_buffer", "use_native_io", "vmargs", "PYTHON_EXECUTABLE",
)  # fmt: skip
_READ_KEYS = (*(option.key for option in OPTIONS), MINUTES_KEY, WORKERS_KEY)
KNOWN_KEYS = (*_READ_KEYS, *JAVA_ONLY)


@dataclass(frozen=True, slots=True)
class _Setting:
    value: object
    origin: str

    @property
    def text(self) -> str:
        return str(self.value)


def find_config_file(flag: str | None, environ: Mapping[str, str]) -> Path | None:
    """Return the properties file to read: MMS_CONFIG_FILE, else `--mms-config`, else ./config.properties.

    `--mms-config sagemaker` is a preset that comes with the server, as in MMS. Files are returned unseen:
    the command line refuses a missing `--mms-config`, and `Config.load` goes on without a missing
    MMS_CONFIG_FILE, as MMS does, but leaves a note.
    """
    if environ.get("MMS_CONFIG_FILE"):
        return Path(environ["MMS_CONFIG_FILE"])
    if flag:
        return PRESETS.get(flag) or Path(flag)
    default = Path("config.properties")
    return default if default.is_file() else None


def _file_settings(file: Path | None, environ: Mapping[str, str], notes: list[str]) -> dict[str, _Setting]:
    if file is None:
        return {}
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        notes.append(f"configuration file not found, going on without it: {file}")
        return {}
    except OSError as err:
        raise ConfigError(f"cannot read {file}: {err.strerror}") from err
    # A byte order mark is how an editor says UTF-8; Java would take it for a part of the first key.
    marked = data.startswith(b"\xef\xbb\xbf")
    entries = parse_properties(data.decode("utf-8-sig" if marked else "latin-1", "replace"))
    origin = next((f"preset {name}" for name, preset in PRESETS.items() if preset == file), f"file {file}")
    settings = {}
    for key, value in entries.items():
        text = re.sub(r"\$\$([^$]{2,})\$\$", partial(_environ_value, environ), value)
        if key in _READ_KEYS:
            settings[key] = _Setting(text, origin)
        else:
            notes.append(f"{_unused_note(key)} ({origin})")
    return settings


def _environ_value(environ: Mapping[str, str], match: re.Match[str]) -> str:
    if match[1] not in environ:
        raise ConfigError(f"Invalid Environment Variable {match[1]}")
    return environ[match[1]]


def _unused_note(key: str) -> str:
    if key in JAVA_ONLY:
        return f"{key} concerns Java only, ignored"
    near = difflib.get_close_matches(key, KNOWN_KEYS, 1)
    return f"unknown key: {key}" + (f"; did you mean {near[0]}?" if near else "")


def _override_settings(overrides: Mapping[str, object]) -> dict[str, _Setting]:
    keys = {option.name: option.key for option in OPTIONS}
    if unknown := overrides.keys() - keys.keys():
        raise ConfigError(f"unknown option: {', '.join(sorted(unknown))}")
    return {
        keys[name]: _Setting(value, "command line") for name, value in overrides.items() if value is not None
    }


def _environ_settings(environ: Mapping[str, str], enabled: bool, notes: list[str]) -> dict[str, _Setting]:
    keys = {option.env: option.key for option in OPTIONS if option.env}
    keys["MMS_" + MINUTES_KEY.upper()] = MINUTES_KEY
    settings = {}
    for name, text in environ.items():
        origin = f"environment {name}"
        if name in ("LOG_LOCATION", "METRICS_LOCATION"):  # MMS reads these two always
            if text:
                settings[keys[name]] = _Setting(text, origin)
        elif name not in keys:
            near = difflib.get_close_matches(name, keys, 1, 0.9) if name.startswith("MMS_") else []
            notes.extend(f"unknown {origin}; did you mean {known}?" for known in near)
        elif not enabled:
            notes.append(f"{origin} is ignored: no file says {ENABLE_KEY}=true")
        else:
            settings[keys[name]] = _Setting(text, origin)
    return settings


def _environ_defaults(environ: Mapping[str, str]) -> Iterator[tuple[str, _Setting]]:
    """Yield what the environment implies where nothing else is said."""
    if environ.get("TEMP"):
        yield "temp_directory", _Setting(environ["TEMP"], "environment TEMP")
    # SageMaker sets it in its containers for several models, and then manages them from outside.
    if environ.get("SAGEMAKER_MULTI_MODEL") == "true":
        yield "management_open", _Setting("true", "environment SAGEMAKER_MULTI_MODEL")


def _resolve_response_timeout(settings: dict[str, _Setting], notes: list[str]) -> None:
    # As in MMS: seconds win over minutes wherever either was set, and negative seconds mean not set.
    minutes, seconds = settings.pop(MINUTES_KEY, None), settings.get(SECONDS_KEY)
    if seconds is not None and seconds.text.strip().startswith("-"):
        del settings[SECONDS_KEY]
        seconds = None
    if minutes is None:
        return
    if seconds is not None:
        notes.append(f"{MINUTES_KEY} is ignored: {SECONDS_KEY} is set ({seconds.origin})")
        return
    count = _parsed(MINUTES_KEY, minutes, _integer)
    timeout_s = count * 60.0
    settings[SECONDS_KEY] = _Setting(timeout_s, minutes.origin)
    notes.append(
        f"{MINUTES_KEY} counts minutes, as in MMS: {count} is {timeout_s:g} s ({minutes.origin});"
        f" {SECONDS_KEY} counts seconds"
    )


def _parsed(key: str, setting: _Setting, parse: Callable[[str], T]) -> T:
    try:
        return parse(setting.text)
    except ConfigError as err:
        raise ConfigError(f"{err.message} ({key}, {setting.origin})") from err


def _value(option: Option, setting: _Setting, notes: list[str]) -> object:
    value, where = setting.value, f"({option.key}, {setting.origin})"
    if isinstance(value, str):
        if option.kind in _TEXTS and not value:
            return option.default
        if option.kind in _TEXTS and value != value.rstrip():
            notes.append(f"the value ends in a blank, which is kept {where}")
        if option.kind is SWITCH and value.lower() not in ("true", "false"):
            notes.append(f'"{value}" is neither true nor false and counts as false {where}')
        value = _parsed(option.key, setting, option.kind.parse)
    if option.minimum is not None and isinstance(value, int | float) and value < option.minimum:
        raise ConfigError(f"{option.key} must be at least {option.minimum:g}, not {value} ({setting.origin})")
    return value


PAGE = """\
<!-- python -m mms_lite.config > docs/configuration.md -->
# Configuration

`config.properties` has the syntax of Java properties; `$$NAME$$` in a value stands for an environment
variable. The file is the one that MMS_CONFIG_FILE names, else `--mms-config`, else `./config.properties`;
`--mms-config sagemaker` takes [a preset](sagemaker.md). Relative paths are relative to the server's working
directory. `mms-lite --print-config` shows every value and where it comes from.

The file overrides the defaults, the command line the file, and `MMS_*` variables override both, but only if
the file says `enable_envvars_config=true`. LOG_LOCATION and METRICS_LOCATION always count. A value that can
not be used ends the start with `Invalid configuration: ...` and exit code 1; an unknown key gives a warning.

Addresses are `http://HOST:PORT`, `https://HOST:PORT` (an IPv6 HOST in brackets) or `unix:/PATH`; port 0 takes
a free port. When both APIs have the same address, one listener serves both.

| key | default | type | meaning | command line | environment |
|---|---|---|---|---|---|
{rows}

`default_response_timeout` is read too: it counts **minutes**, as in MMS, and gives way to
`default_response_timeout_seconds`.

Keys of MMS that concern Java only and are ignored: {java_only}.

How a model's workers share the CPUs is in [performance.md](performance.md#threads).
"""


def render_markdown() -> str:
    """Return docs/configuration.md."""
    rows = []
    for option in OPTIONS:
        default = f"{option.default:g}" if isinstance(option.default, float) else str(option.default or "")
        if isinstance(option.default, bool) or option.default == 0:
            default = str(option.default).lower()
        cells = [_code(option.key), _code(default), option.kind.word, option.doc]
        rows.append(f"| {' | '.join([*cells, _code(option.flag), _code(option.env)])} |")
    return PAGE.format(rows="\n".join(rows), java_only=", ".join(map(_code, JAVA_ONLY)))


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
