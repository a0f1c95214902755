"""What can be said of a command before torch is imported, which takes seconds."""

from __future__ import annotations

from dit_attn.cli.method_options import method_variants
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import Options


def check_early(options: Options) -> None:
    """Check the names of the model, of the methods and of their settings; nothing heavy is imported.

    Raises:
        DitAttnError: there is no such model, method or setting, or ``--method`` is malformed.
    """
    if options.config.get("method") or any(kind == "method" for kind, _ in options.words):
        method_variants(options)
    if "model" in options:
        locate(options["model"], options.get("revision"))
