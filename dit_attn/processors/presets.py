"""Settings of a method for one particular model, with their provenance."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dit_attn.errors import unknown
from dit_attn.processors.method import Method


@dataclass(frozen=True)
class Preset:
    """One file of ``dit_attn/presets``.

    Attributes:
        name: file name without ending, e.g. ``"wan2.1-1.3b"``.
        transformer: class name of the transformer.
        config: configuration values that identify the checkpoint (all must match; empty matches the whole class).
        methods: settings by slug; ``provenance`` says where they come from (``paper | measured | guess``).
    """

    name: str
    transformer: str
    config: dict[str, Any]
    methods: dict[str, dict[str, Any]]

    def matches(self, model: Any) -> bool:
        """Whether this preset was made for ``model``."""
        if type(model).__name__ != self.transformer:
            return False
        return all(model.config.get(key) == value for key, value in self.config.items())


@functools.cache
def presets() -> tuple[Preset, ...]:
    """Every preset, the most specific first."""
    import yaml

    found = []
    for file in sorted(resources.files("dit_attn").joinpath("presets").iterdir(), key=lambda path: path.name):
        if file.name.endswith(".yaml"):
            data = yaml.safe_load(file.read_text())
            found.append(
                Preset(file.name[: -len(".yaml")], data["transformer"], data.get("config", {}), data.get("methods", {}))
            )
    return tuple(sorted(found, key=lambda preset: -len(preset.config)))


def preset_for(model: Any, name: str | None = None) -> Preset | None:
    """The preset for a transformer, by name or by its class and configuration.

    Raises:
        DitAttnError: no preset of that name.
    """
    if name is not None:
        found = {preset.name: preset for preset in presets()}
        if name not in found:
            raise unknown("preset", name, found)
        return found[name]
    return next((preset for preset in presets() if preset.matches(model)), None)


def method_for(slug: str, model: Any) -> Method:
    """A method with the settings of the model's preset, or with its defaults when there is none.

    Raises:
        DitAttnError: no such method.
    """
    preset = preset_for(model)
    settings = dict(preset.methods.get(slug, {})) if preset is not None else {}
    settings.pop("provenance", None)
    return Method.from_dict({**settings, "method": slug})
