"""Transformers of known models at their real size, for measuring time and memory, which do not depend on the weights.

Sizes are those of the published ``transformer/config.json`` files.
"""

from __future__ import annotations

from dit_attn.errors import unknown
from dit_attn.models import step_inputs
from dit_attn.models.architecture import Architecture


def architecture(name: str) -> Architecture:
    """Return the architecture of a known model.

    Raises:
        DitAttnError: unknown name.
    """
    found = {row.name: row for row in ARCHITECTURES}
    if name not in found:
        raise unknown("--config", name, found)
    return found[name]


_WAN = {"attention_head_dim": 128, "text_dim": 4096, "qk_norm": "rms_norm_across_heads"}
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "wan2.1-1.3b",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        pixels=(81, 480, 832),
        text=512,
        inputs=step_inputs.wan,
        wide=("ffn_dim",),
    ),
    Architecture(
        "wan2.1-14b",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        pixels=(81, 720, 1280),
        text=512,
        inputs=step_inputs.wan,
        wide=("ffn_dim",),
    ),
    Architecture(
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40},
        pixels=(129, 720, 1280),
        text=256,
        inputs=step_inputs.hunyuan_video,
    ),
    Architecture(
        "cogvideox-5b",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        pixels=(49, 480, 720),
        text=226,
        inputs=step_inputs.cogvideox,
    ),
    Architecture(
        "flux",
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 19,
            "num_single_layers": 38,
            "guidance_embeds": True,
        },
        pixels=(1, 1024, 1024),
        text=512,
        inputs=step_inputs.flux,
    ),
    Architecture(
        "pixart-sigma",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "num_layers": 28,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
            "caption_channels": 4096,
        },
        pixels=(1, 1024, 1024),
        text=300,
        inputs=step_inputs.pixart,
        wide=("cross_attention_dim",),
    ),
    Architecture(
        "ltx-video",
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28},
        pixels=(161, 512, 704),
        text=128,
        inputs=step_inputs.ltx_video,
        token_pixels=32,
        latent_frames=8,
        wide=("cross_attention_dim",),
    ),
    Architecture(
        "qwen-image-2.1",  # the sizes are the defaults of its class
        "QwenImage21Transformer2DModel",
        {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 32},
        pixels=(1, 1024, 1024),
        text=256,
        inputs=step_inputs.qwen_image_2_1,
    ),
    Architecture(
        "krea-2",  # the sizes are the defaults of its class, as are those of the next two
        "Krea2Transformer2DModel",
        {
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 28,
            "intermediate_size": 16384,
            "text_hidden_dim": 2560,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "text_intermediate_size": 6912,
        },
        pixels=(1, 1024, 1024),
        text=512,
        inputs=step_inputs.krea_2,
        wide=(
            *("num_key_value_heads", "intermediate_size", "text_hidden_dim", "text_num_attention_heads"),
            *("text_num_key_value_heads", "text_intermediate_size"),
        ),
        multiples={"text_hidden_dim": 128},
    ),
    Architecture(
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 56,
            "attention_head_dim": 128,
            "hidden_size": 5376,
            "num_layers": 50,
            "ffn_dim": 14336,
            "time_embed_hidden_dim": 5376,
            "time_embed_dim": 2688,
        },
        pixels=(124, 768, 1344),
        text=256,
        inputs=step_inputs.minimax_h3,
        token_pixels=32,
        chunk_frames=17,
        wide=("hidden_size", "ffn_dim", "time_embed_hidden_dim", "time_embed_dim"),
    ),
    Architecture(
        "cosmos-3",  # Nano
        "Cosmos3OmniTransformer",
        {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_hidden_layers": 36,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "sound_gen": True,
            "sound_dim": 64,
            "action_gen": True,
            "action_dim": 64,
        },
        pixels=(189, 720, 1280),
        text=512,
        inputs=step_inputs.cosmos_3,
        token_pixels=32,
        pads=True,
        single=True,
        names=("num_hidden_layers", "head_dim"),
        wide=("num_key_value_heads", "hidden_size", "intermediate_size"),
    ),
)
