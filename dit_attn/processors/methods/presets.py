"""Presets: settings of the methods for particular checkpoints, with their provenance."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dit_attn.errors import unknown
from dit_attn.processors.methods.base import Method

PROVENANCES = {"paper": "from the paper", "measured": "measured on this model", "guess": "a guess, not measured"}


@dataclass(frozen=True)
class Preset:
    """One file of ``dit_attn/presets``.

    Attributes:
        name: file name without ending, e.g. ``"wan2.1-1.3b"``.
        transformer: class name of the transformer.
        config: configuration values that identify the checkpoint (all must match; empty matches the whole class).
        pair: whether it is for pipelines that switch from one transformer to another during the run (Wan 2.2 A14B),
            whose transformers have the configuration of another model.
        methods: settings by slug; ``provenance`` says where they come from (``paper | measured | guess``).
    """

    name: str
    transformer: str
    config: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    pair: bool = False

    def matches(self, model: Any, pair: bool = False) -> bool:
        """Return whether this preset is for ``model``, one of two transformers of a pipeline or the only one."""
        if type(model).__name__ != self.transformer or (self.pair and not pair):
            return False
        return all(model.config.get(key) == value for key, value in self.config.items())


@functools.cache
def presets() -> tuple[Preset, ...]:
    """Return every preset, the most specific first."""
    import yaml

    found = []
    for file in sorted(resources.files("dit_attn").joinpath("presets").iterdir(), key=lambda path: path.name):
        if file.name.endswith(".yaml"):
            data = yaml.safe_load(file.read_text())
            found.append(
                Preset(
                    file.name[: -len(".yaml")], data["transformer"], data.get("config", {}), data.get("methods", {}),
                    data.get("pair", False),
                )
            )  # fmt: skip
    return tuple(sorted(found, key=lambda preset: (not preset.pair, -len(preset.config))))


def preset_for(model: Any, name: str | None = None, pair: bool = False) -> Preset | None:
    """Return the preset for a transformer, by name or by its class and configuration.

    Args:
        model: the transformer, or anything of its class name with its ``config``.
        name: of a preset, whatever the model is.
        pair: whether the pipeline has a second transformer.

    Raises:
        DitAttnError: no preset of that name.
    """
    if name is not None:
        found = {preset.name: preset for preset in presets()}
        if name not in found:
            raise unknown("preset", name, found)
        return found[name]
    return next((preset for preset in presets() if preset.matches(model, pair)), None)


@dataclass(frozen=True)
class PresetUse:
    """How the settings of a method relate to the preset of its model.

    Attributes:
        method: the method's slug.
        preset: name of the preset.
        provenance: where its numbers come from: ``paper | measured | guess``.
        changed: settings with another value than in the preset.
    """

    method: str
    preset: str
    provenance: str
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = "the other settings of " if self.changed else ""
        return f"{self.preset} for {others}{self.method} ({PROVENANCES[self.provenance]})"


def preset_use(method: Method, model: Any, pair: bool = False) -> PresetUse | None:
    """Compare the settings of a method with those of the model's preset.

    Args:
        method: the method.
        model, pair: as for :func:`preset_for`.

    Returns:
        ``None`` where no preset has the method, or the settings are closer to the defaults.
    """
    preset = preset_for(model, pair=pair)
    if preset is None or method.slug not in preset.methods:
        return None
    given = method.to_dict()
    changed = changed_settings(given, method_for(method.slug, model, pair).to_dict())
    if len(changed) > len(changed_settings(given, type(method)().to_dict())):
        return None
    return PresetUse(method.slug, preset.name, preset.methods[method.slug].get("provenance", "guess"), changed)


def changed_settings(settings: dict[str, Any], base: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the settings that differ from ``base``; unset ones are left out."""
    given = {name: value for name, value in settings.items() if name != "method" and value is not None}
    return tuple(name for name, value in given.items() if name not in base or base[name] != value)


def method_for(slug: str, model: Any, pair: bool = False) -> Method:
    """Return a method with the settings of the model's preset, or with its defaults when there is none.

    Args:
        slug: the method.
        model, pair: as for :func:`preset_for`.

    Raises:
        DitAttnError: no such method.
    """
    preset = preset_for(model, pair=pair)
    settings = dict(preset.methods.get(slug, {})) if preset is not None else {}
    settings.pop("provenance", None)
    return Method.from_dict({**settings, "method": slug})
