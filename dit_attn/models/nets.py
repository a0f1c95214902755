"""The parts of the embedded pipelines: tokenizer, text encoders, transformers, schedulers, all stock classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_attn.eval.inspection_world import world as inspection_world
from dit_attn.eval.shapes_world import edits, multi, world
from dit_attn.models import omnigen
from dit_attn.models.autoencoders import exact_kl, exact_wan
from dit_attn.models.recipe import NetSize

FLOW_SHIFT = 3.0
WORDS = {  # of other captions than those of one shape
    "multi": multi.vocabulary,
    "edit": edits.vocabulary,
    "inspect": inspection_world.vocabulary,
}


def build_tokenizer(kind: str, length: int) -> Any:
    """Build a word-level tokenizer of `length` over the words that captions of `kind` have, with `</s>` appended."""
    if kind == "edit":
        return omnigen.build_tokenizer(length)
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS.get(kind, world.vocabulary)()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    punctuation = [normalizers.Replace(mark, " ") for mark in ",.;"]
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), *punctuation])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
    )


def build_text_encoder(family: str, vocab_size: int, size: NetSize) -> Any:
    """Build an untrained T5 (families "image", "joint") or UMT5 ("video") encoder."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    classes: dict[str, tuple[Any, Any]] = {
        "image": (T5Config, T5EncoderModel),
        "video": (UMT5Config, UMT5EncoderModel),
        "joint": (T5Config, T5EncoderModel),
    }
    config_class, model_class = classes[family]
    config = config_class(
        vocab_size=vocab_size,
        d_model=size.text_width,
        d_kv=32,
        d_ff=2 * size.text_width,
        num_layers=size.text_layers,
        num_heads=size.text_width // 32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return model_class(config)


def build_clip_encoder(vocab_size: int, size: NetSize) -> Any:
    """Build an untrained two-layer CLIP text encoder for the tokens of the T5; two of them are as wide as it is."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = size.text_width // 2
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=size.text_length,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config)


def build_image_transformer(size: NetSize) -> Any:
    """Build the PixArt transformer of `tiny-image`: patches of 4 x 4 pixels, 128 x 128 pixels = 1,024 tokens."""
    from diffusers import PixArtTransformer2DModel

    net: Any = PixArtTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.hidden // size.heads,
        in_channels=3,
        out_channels=3,
        num_layers=size.layers,
        cross_attention_dim=size.hidden,
        caption_channels=size.text_width,
        sample_size=128,
        patch_size=4,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def build_video_transformer(size: NetSize) -> Any:
    """Build the Wan transformer of `tiny-video`: 9 frames of 48 x 48 pixels = 1,296 tokens."""
    from diffusers import WanTransformer3DModel

    net: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=size.heads,
        attention_head_dim=size.hidden // size.heads,
        in_channels=12,
        out_channels=12,
        text_dim=size.text_width,
        freq_dim=128,
        ffn_dim=4 * size.hidden,
        num_layers=size.layers,
        rope_max_seq_len=128,
    )
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def build_joint_transformer(size: NetSize) -> Any:
    """Build an SD3 transformer: patches of 4 x 4 pixels, 128 x 128 pixels = 1,024 tokens, and those of the text twice.

    Without `pos_embed_max_size` the position table is rescaled to other sizes instead of cropped.
    """
    from diffusers import SD3Transformer2DModel

    unlimited: Any = None
    net: Any = SD3Transformer2DModel(
        sample_size=128,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=size.layers,
        attention_head_dim=size.hidden // size.heads,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        caption_projection_dim=size.hidden,
        pooled_projection_dim=2 * (size.text_width // 2),
        pos_embed_max_size=unlimited,
    )
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def build_parts(family: str, vocab_size: int, size: NetSize) -> dict[str, Any]:
    """Build the trained parts of a pipeline by their names in it: transformer and text encoders.

    Family "joint" trains one CLIP encoder, which its pipeline has twice; "edit" has no text encoder.
    """
    if family == "edit":
        return {"transformer": omnigen.build_transformer(vocab_size, size)}
    builders = {"image": build_image_transformer, "video": build_video_transformer, "joint": build_joint_transformer}
    parts = {"transformer": builders[family](size)}
    if family != "joint":
        return {**parts, "text_encoder": build_text_encoder(family, vocab_size, size)}
    clip = build_clip_encoder(vocab_size, size)
    return {**parts, "text_encoder": clip, "text_encoder_3": build_text_encoder(family, vocab_size, size)}


def build_pipeline(family: str, parts: dict[str, Any], tokenizer: Any) -> Any:
    """Build the stock pipeline around trained `parts` (see `build_parts`).

    `PixArtSigmaPipeline` (family "image"), `WanPipeline` ("video"), `StableDiffusion3Pipeline` ("joint") or
    `OmniGenPipeline` ("edit"). The transformers predict the clean sample (`prediction_type="sample"`).

    Raises:
        DitAttnError: family "edit" without torchvision, which its pipeline reads images with.
    """
    import copy

    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtSigmaPipeline,
        StableDiffusion3Pipeline,
        UniPCMultistepScheduler,
        WanPipeline,
    )

    flow = {"prediction_type": "sample", "use_flow_sigmas": True, "flow_shift": FLOW_SHIFT}
    if family == "video":
        return WanPipeline(vae=exact_wan(2), scheduler=UniPCMultistepScheduler(**flow), tokenizer=tokenizer, **parts)
    if family == "edit":
        steps = UniPCMultistepScheduler(**{**flow, "flow_shift": omnigen.FLOW_SHIFT})
        return omnigen.build_pipeline(exact_kl(), steps, tokenizer, **parts)
    vae, scheduler = exact_kl(), DPMSolverMultistepScheduler(**flow)
    if family == "image":
        return PixArtSigmaPipeline(vae=vae, scheduler=scheduler, tokenizer=tokenizer, **parts)
    vae.register_to_config(shift_factor=0.0)
    second = copy.deepcopy(parts["text_encoder"])
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), tokenizer)
    return StableDiffusion3Pipeline(vae=vae, scheduler=scheduler, text_encoder_2=second, **tokenizers, **parts)


def save_folder(pipeline: Any, folder: Path) -> None:
    """Write `pipeline` as a diffusers folder with fp16 weights (autoencoder fp32), mode 644."""
    import copy

    small = copy.deepcopy(pipeline)
    for name, part in small.components.items():
        if name == "transformer" or name.startswith("text_encoder"):
            part.to(dtype=torch.float16)
        elif name.startswith("tokenizer"):  # without the padding of the last batch
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    small.save_pretrained(folder)
    for path in folder.rglob("tokenizer_config.json"):
        config = json.loads(path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2) + "\n")
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    fast = ["transformers", "PreTrainedTokenizerFast"]
    entries = {name: fast if name.startswith("tokenizer") else entry for name, entry in entries.items()}
    entries.pop("_name_or_path", None)
    index.write_text(json.dumps(entries, indent=2) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
