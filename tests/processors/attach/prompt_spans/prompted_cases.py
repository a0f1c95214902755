"""The pipelines of every family, with a tokenizer of the kind that its checkpoints have."""

from __future__ import annotations

from tests._support import tiny_tokenizers as kinds
from tests._support.prompted_pipelines import Prompted, clip_and, hidream, omnigen, one, sd3, with_glyphs

REFINER = ("transformer.context_embedder.token_refiner",)
CASES = {
    "flux": Prompted("flux.TestFlux", clip_and(kinds.t5, "_2"), more={"max_sequence_length": 32}),
    "kontext": Prompted("flux.TestFluxKontext", clip_and(kinds.t5, "_2"), more={"max_sequence_length": 32}),
    "flux-2": Prompted("flux_2.TestFlux2", one(kinds.qwen, 40), more={"text_encoder_out_layers": (10,)}),
    "klein": Prompted("flux_2.TestFlux2Klein", one(kinds.qwen, 40), more={"text_encoder_out_layers": (10,)}),
    "chroma": Prompted("chroma.TestChroma", one(kinds.t5)),
    "sd3": Prompted("sd3.TestSD3", sd3, more={"max_sequence_length": 32}),
    "pixart": Prompted("pixart.TestPixArt", one(kinds.t5), joint=False),
    "qwen-image": Prompted("qwen_image.TestQwenImage", one(kinds.qwen)),
    "lumina-2": Prompted(
        "lumina_2.TestLumina2",
        one(kinds.gemma),
        without_mixing=("transformer.context_refiner",),
        config={"axes_lens": (300, 64, 64)},
    ),
    "omnigen": Prompted("omnigen.TestOmniGen", omnigen, config={"vocab_size": 1200}),
    "hidream": Prompted("hidream.TestHiDream", hidream),
    "z-image": Prompted("z_image.TestZImage", one(kinds.qwen), without_mixing=("transformer.context_refiner",)),
    "cogview-4": Prompted("cogview_4.TestCogView4", one(kinds.llama3)),
    "hunyuan-image": Prompted("hunyuan_image.TestHunyuanImage", with_glyphs, without_mixing=REFINER),
    "hunyuan-dit": Prompted(
        "hunyuan_dit.TestHunyuanDiT",
        clip_and(kinds.t5),
        joint=False,
        config={"text_len": 77, "text_len_t5": 256},
        constant=("transformer.time_extra_emb.pooler",),
    ),
    "auraflow": Prompted("auraflow.TestAuraFlow", one(kinds.llama)),
    "wan": Prompted("wan.TestWan", one(kinds.t5), joint=False),
    "wan-image": Prompted("wan.TestWanImageToVideo", one(kinds.t5), joint=False),
    "skyreels-v2": Prompted("skyreels_v2.TestSkyReelsV2", one(kinds.t5), joint=False),
    "wan-animate": Prompted("wan_animate.TestWanAnimate", one(kinds.t5), image_keys=5, joint=False),
    "hunyuan-video": Prompted("hunyuan_video.TestHunyuanVideo", clip_and(kinds.llama3), without_mixing=REFINER),
    "framepack": Prompted("framepack.TestFramepack", clip_and(kinds.llama3), without_mixing=REFINER),
    "hunyuan-video-1.5": Prompted("hunyuan_video_1_5.TestHunyuanVideo15", with_glyphs, without_mixing=REFINER),
    "cogvideox": Prompted("cogvideox.TestCogVideoX2b", one(kinds.t5), prompt="a red cube"),
    "ltx-video": Prompted("ltx_video.TestLtxVideo", one(kinds.t5), joint=False),
    "ltx-2": Prompted(
        "ltx_2.TestLtx2",
        one(kinds.gemma, 0),
        without_mixing=("connectors.video_connector.transformer_blocks",),
        joint=False,
    ),
    "mochi": Prompted("mochi.TestMochi", one(kinds.t5), constant=("transformer.time_embed.pooler",)),
    "allegro": Prompted("allegro.TestAllegro", one(kinds.t5), joint=False),
    "cosmos": Prompted("cosmos.TestCosmos", one(kinds.t5), joint=False),
    "kandinsky-5": Prompted(
        "kandinsky_5.TestKandinsky5",
        clip_and(kinds.qwen),
        without_mixing=("transformer.text_transformer_blocks",),
        joint=False,
    ),
    "easyanimate": Prompted("easyanimate.TestEasyAnimate", one(kinds.qwen)),
}
