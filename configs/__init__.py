"""The settings of a cluster, and where each value comes from.

Owns the schema, the loader (flags, environment, file, defaults), presets, the cluster secret and the rule which
settings fit each other. Must not know what reads them: it imports no other package of this project, and nothing heavy.
"""

from __future__ import annotations

from configs.errors import ConfigError, ConfigFault, ConfigsError, SecretError, ShadowedPackage
from configs.loader import Loaded, load, load_with_origins
from configs.schema import Settings
from configs.secret import RotatingSecrets, secret, secrets

__all__ = [
    "ConfigError",
    "ConfigFault",
    "ConfigsError",
    "Loaded",
    "RotatingSecrets",
    "SecretError",
    "Settings",
    "ShadowedPackage",
    "load",
    "load_with_origins",
    "secret",
    "secrets",
]
