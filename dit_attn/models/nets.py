"""The parts of the embedded pipelines: tokenizer, text encoders, transformers, schedulers, all stock classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_attn.eval import world
from dit_attn.models.autoencoders import exact_kl, exact_wan

TEXT_LENGTH = 16
TEXT_WIDTH = 64
HIDDEN = 128
LAYERS = 6
HEADS = 2
FLOW_SHIFT = 3.0


def build_tokenizer() -> Any:
    """A word-level tokenizer over the words of the world, with `</s>` appended."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *world.vocabulary()]
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
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def build_text_encoder(family: str, vocab_size: int) -> Any:
    """A two-layer T5 (family "image") or UMT5 (family "video") encoder of width `TEXT_WIDTH`, randomly initialised."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    classes: dict[str, tuple[Any, Any]] = {
        "image": (T5Config, T5EncoderModel),
        "video": (UMT5Config, UMT5EncoderModel),
    }
    config_class, model_class = classes[family]
    config = config_class(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return model_class(config)


def build_image_transformer() -> Any:
    """The PixArt transformer of `tiny-image`: patches of 4 x 4 pixels, 128 x 128 pixels = 1,024 tokens."""
    from diffusers import PixArtTransformer2DModel

    net: Any = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=3,
        out_channels=3,
        num_layers=LAYERS,
        cross_attention_dim=HIDDEN,
        caption_channels=TEXT_WIDTH,
        sample_size=128,
        patch_size=4,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def build_video_transformer() -> Any:
    """The Wan transformer of `tiny-video`: 9 frames of 48 x 48 pixels = 1,296 tokens."""
    from diffusers import WanTransformer3DModel

    net: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=12,
        out_channels=12,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=4 * HIDDEN,
        num_layers=LAYERS,
        rope_max_seq_len=128,
    )
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    return net


def build_pipeline(family: str, transformer: Any, text_encoder: Any, tokenizer: Any) -> Any:
    """The stock `PixArtSigmaPipeline` (family "image") or `WanPipeline` (family "video") around trained parts.

    The transformers predict the clean sample (`prediction_type="sample"`).
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, UniPCMultistepScheduler, WanPipeline

    flow = {"prediction_type": "sample", "use_flow_sigmas": True, "flow_shift": FLOW_SHIFT}
    parts = {"tokenizer": tokenizer, "text_encoder": text_encoder, "transformer": transformer}
    if family == "image":
        return PixArtSigmaPipeline(vae=exact_kl(), scheduler=DPMSolverMultistepScheduler(**flow), **parts)
    return WanPipeline(vae=exact_wan(2), scheduler=UniPCMultistepScheduler(**flow), **parts)


def save_folder(pipeline: Any, folder: Path) -> None:
    """Write `pipeline` as a diffusers folder with fp16 weights (autoencoder fp32), mode 644."""
    import copy

    small = copy.deepcopy(pipeline)
    small.transformer.to(dtype=torch.float16)
    small.text_encoder.to(dtype=torch.float16)
    small.save_pretrained(folder)
    for path in folder.rglob("tokenizer_config.json"):
        config = json.loads(path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2) + "\n")
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    entries.pop("_name_or_path", None)
    index.write_text(json.dumps(entries, indent=2) + "\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
