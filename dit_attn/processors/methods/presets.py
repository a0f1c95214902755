"""Presets: settings of the methods for particular checkpoints, with their provenance."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from dit_attn.errors import unknown
from dit_attn.processors.methods.base import Method


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
