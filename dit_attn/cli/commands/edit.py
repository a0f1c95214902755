"""``dit-attn edit``: change images by instructions, with or without methods on the pipeline."""

from __future__ import annotations

import argparse

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands import generate
from dit_attn.errors import DitAttnError

GROUPS = {
    "model": (*flags.MODEL, *flags.WEIGHTS),
    "methods": (*flags.PRESET, *flags.SUBJECTS),
    "instructions": (
        flags.Flag(
            "image",
            "image to change, where the file of instructions names none; repeat for a pipeline that takes several",
            many=True,
            metavar="FILE",
            exists=True,
        ),
        flags.Flag("instruction", "what to change; repeat for more items", many=True, metavar="TEXT"),
        flags.Flag(
            "prompts", "file of instructions: .txt, .jsonl or .csv (prompt, image, seed, ... per line)", metavar="FILE"
        ),
        *flags.only(flags.PROMPT, "negative-prompt"),
    ),
    "size": flags.without(flags.SIZE, "num-frames"),
    "sampling": flags.SAMPLING,
    "output": flags.without(flags.ADDRESS_OUTPUT, "fps"),
    "run": flags.RUN,
    "workers": flags.ENGINE,
}
_EXAMPLES = """examples:
  dit-attn edit --model black-forest-labs/FLUX.1-Kontext-dev \\
      --image in.png --instruction "make the circle red, remove the cross"
  dit-attn edit --model Qwen/Qwen-Image-Edit --image in.png --method saas \\
      --instruction "make the circle red, and add a dog, and remove the cross"
  dit-attn edit --model tiny-edit --image in.png --subjects regions.json \\
      --method saas:strength=16,clamp=1,64,stop=1.0 \\
      --instruction "remove the triangle, make the circle red"
  dit-attn edit --model Qwen/Qwen-Image-Edit-2509 --image a.png --image b.png \\
      --instruction "put the cat of the second image into the first"
  dit-attn edit --model Shitao/OmniGen-v1-diffusers --prompts edits.jsonl \\
      --method saas:observe=true --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``edit``."""
    parsers.describe(
        parser,
        "edit --model NAME --image FILE --instruction TEXT [options]",
        "Change images by instructions with a stock diffusers pipeline that takes an input image.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS, parsers.TOGETHER)


def run(args: argparse.Namespace) -> int:
    """Check everything, load once, change every image. Exit codes as for ``generate``.

    Raises:
        DitAttnError: bad input, before anything is loaded where that can be known.
    """
    options = flags.merge(args, GROUPS, replaced=("instruction", "prompts"))
    if "instruction" not in options and "prompts" not in options:
        raise DitAttnError("no instruction; give --instruction TEXT, or --prompts FILE")
    if "image" not in options and "prompts" not in options:
        raise DitAttnError("no image to change; give --image FILE")
    if len(images := options.get("image", [])) == 1:
        options.values["image"] = images[0]
    return generate.run_options(options, edits=True)
