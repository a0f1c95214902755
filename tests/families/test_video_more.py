"""Video families with text in cross attention and a time or layout of their own: the mixin on tiny models."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from PIL import Image

import dit_attn
from tests.families.mixin import SPARSE, FamilyMixin
from tests.families.outputs import same
from tests.families.test_video import wan_vae


class VideoCase(FamilyMixin):
    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2


class TestWanAnimate(VideoCase):
    kinds = ("reference", "video")
    grid = (3, 8, 10)
    probe = (1, 3, 5)
    untouched = ("attn2", "face_adapter", "motion_encoder", "face_encoder")

    def model(self) -> torch.nn.Module:
        return WanAnimateTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,
            latent_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            image_dim=4,
            rope_max_seq_len=32,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 12, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.tensor([500, 500]),
            "pose_hidden_states": torch.randn(2, 4, 3, 16, 20),
            "face_pixel_values": torch.randn(2, 3, 9, 16, 16),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, :, 1 + t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        vision = CLIPVisionConfig(
            hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
        )
        pipe = WanAnimatePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            image_processor=CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
            image_encoder=CLIPVisionModel(vision).eval(),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "image": Image.new("RGB", (80, 64), "red"),
            "pose_video": [Image.new("RGB", (80, 64), "green")] * 9,
            "face_video": [Image.new("RGB", (16, 16), "blue")] * 9,
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 64,
            "width": 80,
            "segment_frame_length": 9,
        }


class TestAllegro(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_width=20,
            sample_height=16,
            sample_frames=4,
            caption_channels=16,
        )

    def inputs(self) -> dict[str, Any]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

        freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
            embed_dim=12,
            crops_coords=((0, 0), (8, 10)),
            grid_size=(8, 10),
            temporal_size=4,
            interpolation_scale=(1.0, 1.0, 1.0),
        )
        rotary = (freqs_t, freqs_h, freqs_w)
        grid = tuple(torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T[:, None].contiguous())
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 1, 7, 16),
            "timestep": torch.tensor([500, 500]),
            "attention_mask": torch.ones(2, 4, 16, 20),
            "encoder_attention_mask": torch.ones(2, 1, 7),
            "image_rotary_emb": (rotary, grid),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = AllegroPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLAllegro(
                block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
            ),
            scheduler=EulerAncestralDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt": None,
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 16,
        }


class NothingToCheck(torch.nn.Module):
    """Stands where the pipeline wants a safety checker: random weights, no prompt, and a run that stops at latents."""

    device, dtype = torch.device("cpu"), torch.float32


class TestCosmos(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return CosmosTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "attention_mask": torch.ones(2, 7),
            "fps": 30,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]] | None:
        pipe = CosmosTextToWorldPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
            vae=None,
            scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, prediction_type="epsilon"),
            safety_checker=NothingToCheck(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 25,
        }


class TestCosmosPredict25(TestCosmos):
    """The 2.5 style: projected text, an image context in attn2, one timestep for every frame."""

    def settings(self) -> dict[str, Any]:
        if "use_crossattn_projection" not in inspect.signature(CosmosTransformer3DModel.__init__).parameters:
            pytest.skip("this diffusers has no Cosmos Predict 2.5")
        text = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 8, "encoder_hidden_states_channels": 16}
        image = {"img_context_dim_in": 6, "img_context_num_tokens": 5, "img_context_dim_out": 32}
        return {**super().settings(), "extra_pos_embed_type": None, **text, **image}

    def inputs(self) -> dict[str, Any]:
        times = torch.full((2, 1, 4, 1, 1), 0.6)
        times[:, :, 0] = 0.1
        context = (torch.randn(2, 7, 8), torch.randn(2, 5, 6))
        return {**super().inputs(), "encoder_hidden_states": context, "attention_mask": None, "timestep": times}

    def pipeline(self) -> None:
        return None  # the loop is that of Cosmos 1, and the first frame would need a trained encoder


class TestKandinsky5(VideoCase):
    kinds = ("video",)
    untouched = ("text_transformer_blocks", "cross_attention")

    def model(self) -> torch.nn.Module:
        return Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 16, 20, 4),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "pooled_projections": torch.randn(1, 8),
            "visual_rope_pos": (torch.arange(4), torch.arange(8), torch.arange(10)),
            "text_rope_pos": torch.arange(7),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Kandinsky5T2VPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=AutoencoderKLHunyuanVideo(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                mid_block_add_attention=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            transformer=self.model().eval(),
        )
        qwen, clip, lengths = torch.randn(2, 1, 7, 16), torch.randn(2, 1, 8), torch.tensor([0, 7], dtype=torch.int32)
        return pipe, {
            "prompt_embeds_qwen": qwen[0],
            "prompt_embeds_clip": clip[0],
            "prompt_cu_seqlens": lengths,
            "negative_prompt_embeds_qwen": qwen[1],
            "negative_prompt_embeds_clip": clip[1],
            "negative_prompt_cu_seqlens": lengths,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }

    def test_its_own_sparse_attention_is_left_alone(self, net: Any, args: Any) -> None:
        # It reorders the tokens into squares of 8 x 8 and brings a block mask.
        net.set_attention_backend("flex")
        args = {
            **args,
            "hidden_states": torch.randn(1, 4, 16, 32, 4),
            "visual_rope_pos": (torch.arange(4), torch.arange(8), torch.arange(16)),
            "sparse_params": {"sta_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool), "P": 0.9, "to_fractal": True},
        }
        before = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        assert same(before, self.call(net, args))
        assert dit_attn.summary(net).declined == {"BlockMask attention mask": 2}


class TestLtx2(VideoCase):
    kinds = ("video",)
    untouched = ("audio", "attn2")

    def model(self) -> torch.nn.Module:
        return LTX2VideoTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 320, 4),
            "audio_hidden_states": torch.randn(1, 6, 4),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "audio_encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "num_frames": 4,
            "height": 8,
            "width": 10,
            "audio_num_frames": 6,
            "fps": 25.0,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, (at[0] * 8 + at[1]) * 10 + at[2]] += 1.0

    def test_key_frames_are_appended_to_the_video(self, net: Any, args: Any) -> None:
        # The condition pipeline joins key frame tokens and their coordinates to the end of the sequence.
        session = dit_attn.enable(net)
        coords = net.rope.prepare_video_coords(1, 4, 8, 10, torch.device("cpu"), fps=25.0)
        longer = {
            **args,
            "hidden_states": torch.cat([args["hidden_states"], torch.randn(1, 80, 4)], dim=1),
            "video_coords": torch.cat([coords, coords[:, :, 160:240]], dim=2),
        }
        before = self._first_keys(net, longer)
        assert [(span.kind, span.start, span.stop) for span in before.tokens.spans] == [
            ("video", 0, 320),
            ("reference", 320, 400),
        ]
        moved = copy.deepcopy(longer)
        self.poke_token(moved, self.probe)
        assert self._changed(before, self._first_keys(net, moved)) == {(2 * 8 + 3) * 10 + 5}
        named = dict.fromkeys(("num_frames", "height", "width"))
        self.call(net, {**args, **named, "video_coords": coords})
        assert session.tokens(320).grid == (4, 8, 10)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        ltx2 = pytest.importorskip("diffusers.pipelines.ltx2", reason="this diffusers has no LTX-2")
        stream = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
        connectors = ltx2.LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=1,
            **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in stream.items()},
            rope_double_precision=False,
        )
        vae = AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        )
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        )
        pipe = LTX2Pipeline(
            text_encoder=None,
            tokenizer=None,
            vocoder=None,
            vae=vae,
            audio_vae=audio_vae,
            connectors=connectors,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 8, 16), torch.ones(1, 8)
        scales = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0}
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            **scales,
            **{f"audio_{name}": value for name, value in scales.items()},
            "spatio_temporal_guidance_blocks": None,
            "height": 512,
            "width": 640,
            "num_frames": 49,
        }

    def test_perturbed_passes_have_their_own_branch(self) -> None:
        torch.manual_seed(0)
        pipe, arguments = self.pipeline()
        pipe.register_modules(transformer=LTX2VideoTransformer3DModel(**self.settings(), perturbed_attn=True).eval())
        pipe.set_progress_bar_config(disable=True)
        dit_attn.enable(pipe, SPARSE)
        scales = {f"{kind}{name}": 2.0 for kind in ("", "audio_") for name in ("stg_scale", "modality_scale")}
        run = self._run(pipe, {**arguments, **scales, "spatio_temporal_guidance_blocks": [1]}, 2)
        seen = [(call.step, call.branches) for call in self._first_layer(run.calls)]
        passes = [("uncond", "cond"), ("perturbed",), ("perturbed",)]
        assert seen == [(step, branches) for step in range(2) for branches in passes]


def test_linear_attention_is_refused_with_the_reason() -> None:
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    with pytest.raises(dit_attn.DitAttnError, match=r"SanaVideoTransformer3DModel.*linear"):
        dit_attn.enable(model)
