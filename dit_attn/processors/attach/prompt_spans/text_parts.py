"""How the transformers get the text that their pipelines encode, as data.

Most take it as it is encoded. A row is needed where text comes in several parts, is reordered, has other tokens before
it, or is not encoded by ``encode_prompt``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.components import unwrap
from dit_attn.processors.attach.prompt_spans.text_block import encode_by_block, text_block

Leaf = torch.Tensor | list[torch.Tensor]
_RESULTS = ("_embeds", "_mask", "_cu_seqlens", "lora_scale")  # arguments of encode_prompt that replace its work
Assemble = Callable[[Any, Sequence[torch.Tensor]], torch.Tensor]


def _in_turn(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One part after another: (rows, S, n) marks of each."""
    columns = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, columns - part.shape[-1])) for part in parts], 1)


def _after_registers(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """AuraFlow's learned tokens stand before the text."""
    return torch.nn.functional.pad(_in_turn(pipe, parts), (0, 0, pipe.transformer.register_tokens.shape[1], 0))


def _compact(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens of all parts in turn, padding last."""
    marks = _in_turn(pipe, parts)
    order = torch.argsort((~marks.any(-1)).int(), dim=1, stable=True)
    return marks.gather(1, order[..., None].expand_as(marks))


def _glyphs_first(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """HunyuanImage and HunyuanVideo 1.5: the quoted texts, then the prompt, then the padding of both."""
    return _compact(pipe, list(reversed(parts)))


def _llama_twice(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """HiDream: T5, the last layer of Llama, and the layer of the block."""
    return _in_turn(pipe, [*parts, *parts[1:]])


def _connected(pipe: Any, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """LTX-2: connectors with registers move the tokens to the front."""
    registers = pipe.connectors.video_connector.learnable_registers
    return _in_turn(pipe, parts) if registers is None else _compact(pipe, parts)


def _no_lead(pipe: Any, arguments: Mapping[str, Any], used: torch.Tensor, length: int) -> int:
    return 0


def _image_keys(pipe: Any, arguments: Mapping[str, Any], used: torch.Tensor, length: int) -> int:
    """Wan without projections of its own for an image: the tokens of the image are the first keys."""
    return length - used.shape[1]


def _image_embedding(pipe: Any, arguments: Mapping[str, Any], used: torch.Tensor, length: int) -> int:
    """Framepack: the image embedding stands first; a single row is given without its padding."""
    return length - (int(used.sum()) if len(used) == 1 else used.shape[1])


def _image_condition(pipe: Any, arguments: Mapping[str, Any], used: torch.Tensor, length: int) -> int:
    """HunyuanVideo 1.5: the embedding of an image stands first, that of no image last."""
    return 0 if arguments.get("image") is None else pipe.vision_num_semantic_tokens


def taken_by(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's ``encode_prompt``; none where it has no such method."""
    method = getattr(type(pipe), "encode_prompt", None)
    return inspect.signature(method).parameters if method is not None else {}


def encode_prompt(twin: Any, arguments: Mapping[str, Any], more: Mapping[str, Any], negative: bool) -> Any:
    """Call a pipeline's ``encode_prompt`` with the arguments of its call that it takes, or run its block for text.

    Where it knows no negative prompt, the pipeline encodes that as it does a prompt.
    """
    if text_block(twin) is not None:
        return encode_by_block(twin, arguments, negative)
    taken = taken_by(twin)
    given = dict(arguments)
    if negative and "negative_prompt" not in taken:
        sign = "negative_"
        given |= {name.removeprefix(sign): value for name, value in given.items() if name.startswith(sign)}
    given = {
        name: value for name, value in given.items() if name in taken and not any(word in name for word in _RESULTS)
    }
    fixed = {"device": torch.device("cpu"), "dtype": torch.float32, "do_classifier_free_guidance": negative}
    named = [x for x in taken.values() if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY) and x.name != "self"]
    needed = {x.name: None for x in named if x.default is x.empty}
    return twin.encode_prompt(**{**needed, **given, **{k: v for k, v in fixed.items() if k in taken}, **more})


def _omnigen(twin: Any, arguments: Mapping[str, Any], more: Mapping[str, Any], negative: bool) -> Any:
    """OmniGen embeds token ids in the transformer; its processor makes them, of all branches in one batch."""
    if negative:
        raise DitAttnError("OmniGen has a negative prompt of its own, which no argument changes")
    prompt = arguments["prompt"]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    images = arguments.get("input_images")
    images = [images] if images is not None and isinstance(prompt, str) else images
    names = ("height", "width", "use_input_image_size_as_output", "num_images_per_prompt")
    options = {name: arguments[name] for name in names if arguments.get(name) is not None}
    ids = twin.multimodal_processor(prompts, images, **options)["input_ids"]
    return ids[: len(prompts) * (options.get("num_images_per_prompt") or 1), :, None]


def _interleaved(twin: Any, arguments: Mapping[str, Any], more: Mapping[str, Any], negative: bool) -> Any:
    """HunyuanVideo image-to-video keeps every second or fourth image token, as its transformer says."""
    name = "image_embed_interleave"
    kept = {"latent_concat": 2, "token_replace": 4}.get(twin.transformer.config.image_condition_type, 1)
    return encode_prompt(twin, {**arguments, name: arguments.get(name) or kept}, more, negative)


def _normalized(twin: Any, arguments: Mapping[str, Any], more: Mapping[str, Any], negative: bool) -> Any:
    """Cosmos 2.5 normalizes every token, which leaves no mark; all tokens keep their places."""
    encode_prompt(twin, arguments, more, negative)
    return twin.text_encoder.results


@dataclass(frozen=True)
class TextPart:
    """How a transformer gets the text of its pipeline.

    Attributes:
        names: class names of the transformer or of the pipeline.
        assemble: ``assemble(pipe, parts)``: the marks (rows, S, n) of the text part, from those of every part encoded.
        passes: arguments of the calls that encode, where one is not enough.
        encode: makes such a call.
        mark_ids: whether the transformer embeds the token ids.
        variables: local variables of the pipeline's call that ``encode_prompt`` gets in the place of an argument.
        overwrites_lists: whether the pipeline changes a list of prompts that it is given.
        lead: ``lead(pipe, arguments, used, length)``: tokens before it in a text part of ``length`` tokens; ``used``
            (rows, S) bool says which places of the encoded text hold a token.
        tail: whether padding or tokens of another kind may stand behind it.
    """

    names: tuple[str, ...] = ()
    assemble: Assemble = _in_turn
    passes: tuple[Mapping[str, Any], ...] = field(default_factory=lambda: ({},))
    encode: Callable[[Any, Mapping[str, Any], Mapping[str, Any], bool], Any] = encode_prompt
    mark_ids: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    overwrites_lists: bool = False
    lead: Callable[[Any, Mapping[str, Any], torch.Tensor, int], int] = _no_lead
    tail: bool = False


_WANS = (
    "ChronoEditTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "WanAnimateTransformer3DModel",
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
)
_PARTS = (
    TextPart(("AuraFlowTransformer2DModel",), _after_registers),
    TextPart(("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"), encode=_normalized),
    TextPart(("HiDreamImageTransformer2DModel",), _llama_twice),
    TextPart(("HunyuanImageTransformer2DModel",), _glyphs_first, tail=True),
    TextPart(("HunyuanVideo15Transformer3DModel",), _glyphs_first, lead=_image_condition, tail=True),
    TextPart(("HunyuanVideoFramepackTransformer3DModel",), lead=_image_embedding),
    TextPart(("HunyuanVideoImageToVideoPipeline",), encode=_interleaved),
    TextPart(("LTX2VideoTransformer3DModel",), _connected),
    TextPart(("QwenImageEditPipeline", "QwenImageEditInpaintPipeline"), variables={"image": "prompt_image"}),
    TextPart(("QwenImageEditPlusPipeline",), variables={"image": "condition_images"}),
    TextPart(_WANS, lead=_image_keys),
    TextPart(("ZImageTransformer2DModel",), tail=True, overwrites_lists=True),  # padded to a multiple of 32
    TextPart(("OmniGenTransformer2DModel",), encode=_omnigen, mark_ids=True),
    TextPart(
        ("HunyuanDiT2DModel",),
        passes=(
            {"text_encoder_index": 0, "max_sequence_length": 77},
            {"text_encoder_index": 1, "max_sequence_length": 256},
        ),
    ),
)


def text_part_of(pipe: Any) -> TextPart:
    """Return how the transformer of a pipeline gets its text."""
    parts = (type(unwrap(getattr(pipe, "transformer", None))), type(pipe))
    names = {base.__name__ for kind in parts for base in kind.__mro__}
    return next((part for part in _PARTS if names & set(part.names)), TextPart())
