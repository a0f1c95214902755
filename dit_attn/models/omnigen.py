"""The parts of `tiny-edit`: tokenizer, transformer and sequence of a stock `OmniGenPipeline`, at toy size.

OmniGen has no text encoder: its transformer embeds the words of the instruction, with the patches of the input image
among them, before the time token and the patches of the output. Its processor counts a token for 16 x 16 pixels, which
with an autoencoder of scale factor 1 makes patches of 768 numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.errors import require_torchvision
from dit_attn.eval.shapes_world import edits
from dit_attn.models.recipe import NetSize

PATCH = 16  # pixels of a token's side; fixed by the pipeline's processor
GRID = 16  # most tokens along a side: 256 pixels
WAVES = (0.2, 2.8)  # slowest and fastest frequency of the position table, radians per token
STRENGTH = 1.5  # amplitude of the position table
STILL = 4  # one of so many pairs of rotary dimensions turns from token to token, the others hardly do
FAR = 1e4  # by which their turns are slowed
FLOW_SHIFT = 12.0  # of the sampling steps: what to draw is decided where the image is almost only noise
IMAGE = "<|image_1|>"
TAG = f"<img>{IMAGE}</img>"
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>", "<img>", "</img>")


def prompt_of(text: str) -> str:
    """Return the prompt of an instruction for one input image, as the pipeline takes it."""
    return f"{TAG} {text}".rstrip()


def framed(prompt: str) -> str:
    """Return `prompt` in the chat template of the pipeline's processor, as it tokenizes it."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    unused: Any = None
    return OmniGenMultiModalProcessor.add_prefix_instruction(unused, prompt)


def negative_prompt() -> str:
    """Return the negative prompt that the pipeline gives the branch without conditions."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    return inspect.signature(OmniGenMultiModalProcessor.__call__).parameters["negative_prompt"].default


def build_tokenizer(length: int) -> Any:
    """Build a word-level tokenizer of instructions, `<s>` (1) first, padded on the left with `</s>` (2).

    The fixed words of the pipeline, its system sentence and its negative prompt, are removed: the negative prompt is
    an empty instruction, no longer than any other. "and" is a comma.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, ",", *edits.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    system = framed("").split("\n")[1]
    removed = [normalizers.Replace(text.lower(), "") for text in (system, negative_prompt())]
    commas = [normalizers.Replace(Regex(mark), ",") for mark in ("[.;]", ",? and ")]
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *removed, *commas])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=length,
        padding_side="left",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def build_transformer(vocab_size: int, size: NetSize) -> Any:
    """Build the untrained OmniGen transformer of `tiny-edit`, which predicts the clean image."""
    from diffusers import OmniGenTransformer2DModel

    pairs = size.hidden // size.heads // 2
    turns = [1.0 if pair < pairs // STILL else FAR for pair in range(pairs)]
    net: Any = OmniGenTransformer2DModel(
        in_channels=3,
        patch_size=PATCH,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=round(8 / 3 * size.hidden / 64) * 64,
        num_layers=size.layers,
        pad_token_id=SPECIAL.index("</s>"),
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        rope_scaling={"short_factor": turns, "long_factor": turns},
        pos_embed_max_size=GRID,
    )
    _start_from_places(net, size.heads)
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


@torch.no_grad()
def _start_from_places(net: Any, heads: int) -> None:
    """Let every output patch attend to the input patch at its own place, and to itself, in the first layer.

    Places take half of the width, which patches leave empty at first, and the turns of the rotary embedding that hardly
    move. Nothing of it is fixed: all weights are trained.
    """
    width = net.config.hidden_size
    waves = width // 8  # of each axis, a sine and a cosine each
    net.patch_embedding.pos_embed.copy_(_positions(width, waves))
    for patches in (net.patch_embedding.input_image_proj, net.patch_embedding.output_image_proj):
        patches.weight[: 4 * waves] = 0
        patches.bias[: 4 * waves] = 0
    attention, size = net.layers[0].self_attn, width // heads
    first, half = size // 2 // STILL, size // 2
    rows = [*range(first, half), *range(half + first, size)]  # of a head, in turns that hardly move
    for head in range(heads):
        chosen = [(i * waves // (len(rows) // 4) + head) % waves for i in range(len(rows) // 4)]
        for row, column in zip(rows, (part * waves + wave for wave in chosen for part in range(4))):
            for weight in (attention.to_q.weight, attention.to_k.weight):
                weight[head * size + row] = 0
                weight[head * size + row, column] = 1


def _positions(width: int, waves: int) -> torch.Tensor:
    """Table (1, GRID * GRID, width) of sines and cosines of x and of y, which tells neighbors apart; the rest is 0.

    The table of the class spreads its frequencies over thousands of tokens.
    """
    turns = torch.logspace(math.log10(WAVES[0]), math.log10(WAVES[1]), waves)
    angles = (torch.arange(GRID) - GRID / 2)[:, None] * turns
    axis = STRENGTH * torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    table = torch.cat([columns, rows], -1)
    return torch.nn.functional.pad(table, (0, width - table.shape[-1])).reshape(1, GRID * GRID, width)


@dataclass(frozen=True)
class Sequences:
    """Condition of a batch as the transformer takes it, longest row first: rotary positions are those of row 0.

    Args:
        ids: (B, L) int64 tokens of the instruction, 0 where a patch of an input image belongs.
        mask: (B, S, S), 1 where a token may attend, S = L + 1 + output patches.
        order: (B,) int64, the row of the arguments that is in each row here.
        rest: the other arguments of a call: positions, input images and where they are.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    order: torch.Tensor
    rest: dict[str, Any]


def sequences(tokenizer: Any, prompts: Sequence[str], images: torch.Tensor, size: int) -> Sequences:
    """Arrange prompts and input images as the pipeline's processor does.

    Args:
        prompts: as the pipeline takes them, with one image tag or none.
        images: (B, 3, H, W) latents; those of prompts without a tag are not used.
        size: height and width of the output in pixels.
    """
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    rows = [_row(tokenizer, prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    arranged = [rows[i] for i in order]
    ids, positions, mask, _, inputs, places = OmniGenCollator().process_mllm_input(arranged, [(size, size)] * len(rows))
    device = images.device
    rest = {"position_ids": positions.to(device), "input_img_latents": inputs, "input_image_sizes": places}
    return Sequences(ids.to(device), mask.to(device), torch.tensor(order), rest)


def _row(tokenizer: Any, prompt: str, image: torch.Tensor) -> dict[str, Any]:
    """Tokens of one prompt, with a placeholder (0) for every patch of the image where its tag is."""
    before, tag, after = framed(prompt).partition(IMAGE)
    ids = tokenizer(before).input_ids
    if not tag:
        return {"input_ids": ids, "pixel_values": None, "image_sizes": None}
    count = image.shape[-2] * image.shape[-1] // PATCH**2
    span = [len(ids), len(ids) + count]
    ids = [*ids, *[0] * count, *tokenizer(after).input_ids[1:]]
    return {"input_ids": ids, "pixel_values": [image], "image_sizes": [span]}


def build_pipeline(vae: Any, scheduler: Any, tokenizer: Any, transformer: Any) -> Any:
    """Build the stock `OmniGenPipeline`.

    Raises:
        DitAttnError: torchvision is missing.
    """
    from diffusers import OmniGenPipeline

    require_torchvision("OmniGenPipeline")
    return OmniGenPipeline(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer)
