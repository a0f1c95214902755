"""What can be said of a command before torch is imported, which takes seconds."""

from __future__ import annotations

import itertools
from importlib import resources

from dit_attn.cli.method_index import check_method, check_roles
from dit_attn.cli.method_options import CALL, method_variants
from dit_attn.cli.model_source import check_reachable, locate
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError, unknown


def check_early(options: Options, reachable: bool = True, together: bool = False) -> None:
    """Check the model's name, the methods, their settings and the preset; nothing heavy is imported.

    Args:
        options: the flags.
        reachable: also refuse a Hub model that is neither cached nor reachable.
        together: the command enables all methods together, rather than each as a variant.

    Raises:
        DitAttnError: there is no such model, method, setting or preset; a value of a setting does not fit; methods that
            cannot run together; ``--method`` is malformed.
    """
    named = options.config.get("method") or any(kind == "method" for kind, _ in options.words)
    variants = method_variants(options) if named else []
    for spec in itertools.chain.from_iterable(variants):
        if spec.name != CALL:
            check_method(spec.name, spec.settings)
    for variant in [list(itertools.chain.from_iterable(variants))] if together else variants:
        check_roles(spec.name for spec in variant)
    if options.get("preset") not in (None, "auto", "none") and options["preset"] not in preset_names():
        raise unknown("preset", options["preset"], ("auto", "none", *preset_names()))
    if options.get("preset") in preset_names() and not named and together:
        raise DitAttnError(f"--preset {options['preset']} without a method does nothing; add --method NAME")
    if "model" in options:
        kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
        if kind == "hub" and reachable:
            check_reachable(path, options.get("revision"))


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, in alphabetical order."""
    files = [file.name for file in resources.files("dit_attn").joinpath("presets").iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))
