"""Plug-ins: one file holds a config with a ``name`` and a class; writing the class registers it.

    class TecoaConfig(ObjectiveConfig):
        name: Literal["tecoa"] = "tecoa"

    class Tecoa(Objective[TecoaConfig]):
        ...

Objectives, attacks, schedules and trackers all have this shape. A registry knows the package where its plug-ins live and
imports that package's modules the first time it is asked, so a new file is found without being listed anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Any, ClassVar, Generic, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from zsr.config.base import Config


class PluginConfig(Config):
    """Settings of one plug-in; subclasses narrow ``name`` to a ``Literal`` with a default."""

    name: str


class Registry:
    """The plug-ins of one kind, by name.

    Args:
        kind: what a user calls it ("objective"); used in messages.
        package: the package whose modules define the plug-ins, imported on first use.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._plugins: dict[str, tuple[type[PluginConfig], type[Any]]] = {}
        self._discovered = False

    def add(self, config_class: type[PluginConfig], plugin_class: type[Any]) -> None:
        name = config_class.model_fields["name"].default
        if not isinstance(name, str):
            raise TypeError(f'{config_class.__name__}.name needs a default, as in name: Literal["x"] = "x"')
        known = self._plugins.get(name)
        if known is not None and known[1].__module__ != plugin_class.__module__:
            raise TypeError(
                f"two plug-ins of kind {self.kind} are called {name!r}: {known[1].__module__} and {plugin_class.__module__}"
            )
        self._plugins[name] = (config_class, plugin_class)

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._plugins)

    def config_class(self, name: str) -> type[PluginConfig]:
        """The settings class called ``name``.

        Raises:
            ValueError: no such plug-in; the sentence says which exist and which is closest.
        """
        self._discover()
        if name not in self._plugins:
            raise ValueError(f"is not a known {self.kind}{suggest(name, self.names())}")
        return self._plugins[name][0]

    def build(self, config: PluginConfig, *args: Any, **kwargs: Any) -> Any:
        """Make the plug-in that belongs to ``config``."""
        self._discover()
        return self._plugins[config.name][1](config, *args, **kwargs)

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


ConfigT = TypeVar("ConfigT", bound=PluginConfig)


class Plugin(Generic[ConfigT]):
    """Base of all plug-ins. A direct kind sets ``registry``; subclasses that name a config class are registered."""

    registry: ClassVar[Registry]

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, PluginConfig):
                    cls.registry.add(argument, cls)


class PluginField:
    """Annotation for a field that holds the config of any plug-in of a registry.

    ``objective: Annotated[PluginConfig, PluginField(OBJECTIVES)]`` accepts a config object, a mapping with a ``name``, or
    the name alone.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda config: config.model_dump()),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        options = [self.registry.config_class(name).model_json_schema() for name in self.registry.names()]
        return {"title": self.registry.kind, "anyOf": options}

    def _validate(self, value: Any) -> PluginConfig:
        if isinstance(value, PluginConfig):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise ValueError(f"should be the settings of one {self.registry.kind}: a mapping with a name")
        name = value.get("name")
        if name is None:
            raise ValueError(f"needs a name; there are {', '.join(self.registry.names())}")
        # A nested ValidationError keeps its own locations; pydantic prefixes this field's (zsr/config/errors.py).
        return self.registry.config_class(str(name)).model_validate(value)


def suggest(word: str, known: list[str], most: int = 12) -> str:
    """The closest known word, or else what exists (at most so many), ready to append to a message."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"; there are {', '.join(known[:most])}{more}"
