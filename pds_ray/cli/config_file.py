"""The file of --config: YAML whose values are text, as on the command line.

YAML 1.1 would turn `out: 1.10` into 1.1, `seed: 010` into 8, `pairs: 1:30` into 90 and `no` into
false, and of an option that is given twice the last would count. Here each option's own type
decides, and what is given twice is refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pds_ray.config import ConfigError

_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """A loader of text, null, lists and mappings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - its type is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises YAMLError if it has a key twice."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # numbers that Python spells otherwise
    "tag:yaml.org,2002:float", re.compile(r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+.")
)


def read_config(path: str) -> dict[str, Any]:
    """Return the options in a YAML file, sections nested. Raises ConfigError in one line."""
    try:
        with open(path, encoding="utf-8") as stream:
            value = _Loader(stream).get_single_data()
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"--config {path} must hold fields such as 'pairs: 100', not {type(value).__name__}"
        )
    return value
