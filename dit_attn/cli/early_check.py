"""What can be said of a command before torch is imported, which takes seconds."""

from __future__ import annotations

import itertools
from importlib import resources

from dit_attn.cli.method_index import check_method
from dit_attn.cli.method_options import CALL, method_variants
from dit_attn.cli.model_source import check_reachable, locate
from dit_attn.cli.options import Options
from dit_attn.errors import unknown


def check_early(options: Options, reachable: bool = True) -> None:
    """Check the model's name, the methods, their settings and the preset; nothing heavy is imported.

    Args:
        options: the flags.
        reachable: also refuse a Hub model that is neither cached nor reachable.

    Raises:
        DitAttnError: there is no such model, method, setting or preset; a value of a setting does not fit; ``--method``
            is malformed.
    """
    named = options.config.get("method") or any(kind == "method" for kind, _ in options.words)
    for spec in itertools.chain.from_iterable(method_variants(options) if named else ()):
        if spec.name != CALL:
            check_method(spec.name, spec.settings)
    if options.get("preset") not in (None, "auto", "none") and options["preset"] not in preset_names():
        raise unknown("preset", options["preset"], ("auto", "none", *preset_names()))
    if "model" in options:
        kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
        if kind == "hub" and reachable:
            check_reachable(path, options.get("revision"))


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, in alphabetical order."""
    files = [file.name for file in resources.files("dit_attn").joinpath("presets").iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))
