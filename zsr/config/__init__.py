"""Configuration: what can be set, how it is loaded and overridden, and what is said when it is wrong."""

from zsr.config.base import Config, PixelUnits, Positive, Weight
from zsr.config.errors import ConfigError, describe_errors
from zsr.config.load import load_config, load_tree, preset_names, to_yaml, validate
from zsr.config.overrides import apply_overrides, merge
from zsr.config.plugins import Plugin, PluginConfig, PluginField, Registry
from zsr.config.schema import (
    ATTACKS,
    DEFENSES,
    OBJECTIVES,
    SCHEDULES,
    TRACKERS,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "ATTACKS",
    "DEFENSES",
    "OBJECTIVES",
    "SCHEDULES",
    "TRACKERS",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimConfig",
    "PixelUnits",
    "Plugin",
    "PluginConfig",
    "PluginField",
    "Positive",
    "Registry",
    "RunConfig",
    "TrackingConfig",
    "TrainConfig",
    "Weight",
    "apply_overrides",
    "describe_errors",
    "load_config",
    "load_tree",
    "merge",
    "preset_names",
    "to_yaml",
    "validate",
]
