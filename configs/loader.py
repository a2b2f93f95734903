"""Settings from flags, environment, file and defaults, in this order of precedence, checked as a whole.

    file    --config FILE, else $CELERIAC_CONFIG, else cluster.yaml of the cluster that runs in the default run folder
    env     CELERIAC_<SECTION>__<NAME>, such as CELERIAC_TRANSFER__PROTOCOL=tcp
    flags   dotted paths with their text, from the command line

So a worker that is started by hand beside a running `celeriac up` needs no flags: it finds broker, secret and model.
Every fault of every source is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from configs.errors import ConfigError, ConfigFault
from configs.fields import all_fields
from configs.relations import relation_faults
from configs.run_dir import CLUSTER_FILE, SECRET_FILE, default_run_dir, is_running
from configs.schema import Settings
from configs.suggest import did_you_mean
from configs.values import BadValue, parse_value
from configs.yaml_source import read_yaml

ENV_PREFIX: Final = "CELERIAC_"
CONFIG_VARIABLE: Final = "CELERIAC_CONFIG"
SECRET_VARIABLE: Final = "CELERIAC_CLUSTER_SECRET"
DEFAULT: Final = "default"
_VARIABLE: Final = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Given:
    """A value that somebody set. `origin`: `--port`, `CELERIAC_GATEWAY__PORT`, `cluster.yaml:12`."""

    path: str
    text: str | None
    origin: str


@dataclass(frozen=True)
class Loaded:
    """Settings with the origin of each value by dotted path; `default` where nobody set it. `file`: what was read."""

    settings: Settings
    origins: Mapping[str, str]
    file: Path | None = None
    notices: tuple[str, ...] = ()

    def is_default(self, path: str) -> bool:
        return self.origins[path] == DEFAULT


def load(
    path: str | Path | None = None, *, env: Mapping[str, str] | None = None, flags: Mapping[str, str] | None = None
) -> Settings:
    """The settings of this process; see the module for where they come from.

    Args:
        flags: text by dotted path, such as {"gateway.port": "0"}.

    Raises:
        ConfigError: with every fault that was found.
    """
    return load_with_origins(path, env=env, flags=flags).settings


def load_with_origins(
    path: str | Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
    flag_names: Mapping[str, str] | None = None,
    join_running: bool = True,
) -> Loaded:
    """`load`, and where each value comes from.

    Args:
        flag_names: how each flag is called on the command line, for messages.
        join_running: whether a cluster that runs in the default run folder lends its settings.

    Raises:
        ConfigError: with every fault that was found.
    """
    env = os.environ if env is None else env
    file, where = _config_file(path, env, join_running=join_running)
    faults: list[ConfigFault] = []
    notices: list[str] = []
    layers: list[Given] = []  # lowest precedence first
    if file is not None:
        layers += _from_file(file, where, env, faults, notices)
    layers += _from_env(env)
    names = flag_names or {}
    layers += [Given(key, text, names.get(key, f"--set {key}")) for key, text in (flags or {}).items()]

    values, origins = _typed(layers, faults)
    if faults:
        raise ConfigError(faults)
    settings = _built(values)
    _fill_paths(settings, origins, env)
    faults += relation_faults(settings, origins)
    if faults:
        raise ConfigError(faults)
    return Loaded(settings, {**dict.fromkeys(all_fields(), DEFAULT), **origins}, file, tuple(notices))


def _config_file(path: str | Path | None, env: Mapping[str, str], *, join_running: bool) -> tuple[Path | None, str]:
    """The file to read, and how messages call it ("": by its path)."""
    if path is not None:
        return Path(path), ""
    if env.get(CONFIG_VARIABLE):
        return Path(env[CONFIG_VARIABLE]), ""
    run_dir = default_run_dir(env)
    if join_running and is_running(run_dir) and (run_dir / CLUSTER_FILE).exists():
        return run_dir / CLUSTER_FILE, f"running cluster {run_dir}"
    return None, ""


def _from_file(
    file: Path, where: str, env: Mapping[str, str], faults: list[ConfigFault], notices: list[str]
) -> list[Given]:
    content = read_yaml(file)
    faults += content.faults
    if content.is_empty:
        notices.append(f"{file} is empty: every setting has its default.")
    layer = []
    for scalar in content.scalars:
        origin = where or f"{file}:{scalar.line}"
        text = scalar.text
        for name in _VARIABLE.findall(text or ""):
            if name not in env:
                fault = ConfigFault(origin, scalar.path, f"the environment has no variable {name}", "it to be set")
                faults.append(fault)
        if text is not None:
            text = _VARIABLE.sub(lambda match: env.get(match[1], match[0]), text)
        layer.append(Given(scalar.path, text, origin))
    return layer


def _from_env(env: Mapping[str, str]) -> list[Given]:
    """`CELERIAC_A__B` is the setting a.b. Without a double underscore only the settings at the top are meant."""
    top = {field.env_name for path, field in all_fields().items() if "." not in path}
    return [
        Given(name.removeprefix(ENV_PREFIX).lower().replace("__", "."), text, name)
        for name, text in sorted(env.items())
        if name.startswith(ENV_PREFIX) and (name in top or "__" in name)
    ]


def _typed(layers: list[Given], faults: list[ConfigFault]) -> tuple[dict[str, Any], dict[str, str]]:
    fields = all_fields()
    sections = {path.split(".")[0] for path in fields if "." in path}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for given in layers:
        field = fields.get(given.path)
        if field is None:
            if given.text is None and given.path in sections:
                continue  # a section with nothing under it
            what = "a section, not a setting" if given.path in sections else "unknown setting"
            hint = did_you_mean(given.path, fields)
            faults.append(ConfigFault(given.origin, given.path, what, hint=hint or "`celeriac config show` lists all"))
            continue
        try:
            values[given.path] = parse_value(field, given.text)
            origins[given.path] = given.origin
        except BadValue as bad:
            faults.append(ConfigFault(given.origin, given.path, bad.what, bad.expected, bad.hint))
    return values, origins


def _built(values: Mapping[str, Any]) -> Settings:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return msgspec.convert(tree, Settings)


def _fill_paths(settings: Settings, origins: dict[str, str], env: Mapping[str, str]) -> None:
    """Run folder, secret and certificates become absolute: processes of one cluster may run in different folders."""
    if not settings.run_dir:
        settings.run_dir = str(default_run_dir(env))
        origins.pop("run_dir", None)
    settings.run_dir = str(Path(settings.run_dir).expanduser().absolute())
    if not settings.secret_file:
        settings.secret_file = str(Path(settings.run_dir) / SECRET_FILE)
        origins.pop("secret_file", None)
    settings.secret_file = str(Path(settings.secret_file).expanduser().absolute())
    for name in ("tls_certificate", "tls_key", "tls_ca"):
        if path := getattr(settings.transfer, name):
            setattr(settings.transfer, name, str(Path(path).expanduser().absolute()))


def with_values(loaded: Loaded, values: Mapping[str, Any], origin: str) -> Loaded:
    """A copy with some values decided by the program, such as a free port instead of 0."""
    settings = msgspec.convert(msgspec.to_builtins(loaded.settings), Settings)
    for path, value in values.items():
        *sections, name = path.split(".")
        node: Any = settings
        for section in sections:
            node = getattr(node, section)
        setattr(node, name, value)
    return replace(loaded, settings=settings, origins={**loaded.origins, **dict.fromkeys(values, origin)})
