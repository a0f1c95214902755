"""Image families with sequences of their own: Qwen-Image, OmniGen, Lumina 2, HiDream, Z-Image and others."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OmniGenTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from packaging.version import Version
from PIL import Image

import dit_attn
from tests.families import image_pipelines
from tests.families.mixin import SPARSE
from tests.families.test_image import HEIGHT, SIZE, WIDTH, ImageCase, PackedCase, tiny_vae


class TestQwenImage(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.bool)
        mask[1, 6:] = False
        older = {"txt_seq_lens": [10, 10]} if Version(diffusers.__version__) < Version("0.37") else {}
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.tensor([0.5, 0.5]),
            "img_shapes": [[(1, HEIGHT, WIDTH)]] * 2,
            **older,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]] | None:
        return image_pipelines.qwen_image(self.model().eval(), SIZE)


class TestQwenImageEdit(TestQwenImage):
    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 16),
            "img_shapes": [[(1, HEIGHT, WIDTH), (1, 6, 9)]] * 2,
        }

    def pipeline(self) -> None:
        return None  # the reference needs a vision encoder; the loop is Qwen-Image's


class TestOmniGen(ImageCase):
    """Instruction, time, picture; causal over the instruction, open over the picture; batch rows padded on the left."""

    kinds = ("text", "time", "image")
    sockets = 2

    def model(self) -> torch.nn.Module:
        return OmniGenTransformer2DModel(
            in_channels=4,
            patch_size=2,
            hidden_size=24,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=50,
            max_position_embeddings=1024,
            original_max_position_embeddings=1024,
            pos_embed_max_size=40,
            time_step_dim=16,
            rope_scaling={"long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
        )

    def inputs(self) -> dict[str, Any]:
        text, image, padding = 8, HEIGHT * WIDTH, 3
        total = text + 1 + image
        mask = torch.ones(2, total, total)
        mask[:, : text + 1, : text + 1] = torch.tril(torch.ones(text + 1, text + 1))
        mask[:, : text + 1, text + 1 :] = 0
        mask[1, padding:, :padding] = 0
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([0.5, 0.5]),
            "input_ids": torch.randint(0, 50, (2, text)),
            "input_img_latents": [torch.randn(1, 4, 4, 4)],
            "input_image_sizes": {0: [[1, 5]]},
            "attention_mask": mask,
            "position_ids": torch.arange(total)[None].repeat(2, 1),
        }

    def test_three_branches_of_one_batch_are_told_apart(self, net: Any) -> None:
        torch.manual_seed(3)
        arguments = self.inputs()
        latents = arguments["hidden_states"][:1].repeat(3, 1, 1, 1)
        rows = [0, 1, 0]
        for name in ("input_ids", "attention_mask", "position_ids"):
            arguments[name] = arguments[name][rows]
        arguments |= {"hidden_states": latents, "timestep": torch.full((3,), 0.5)}
        session = dit_attn.enable(net, SPARSE)
        self.call(net, arguments)
        assert session.branches(3) == ("cond", "uncond", "image")

    def test_images_of_the_prompt_have_a_branch_of_their_own_in_whole_runs(self) -> None:
        torch.manual_seed(0)
        pipe, arguments = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        red, blue = (Image.new("RGB", (64, 48), colour) for colour in ("red", "blue"))
        arguments |= {"prompt": "a square <img><|image_1|></img>", "img_guidance_scale": 1.6}

        def run_with(image: Any) -> Any:
            torch.manual_seed(0)  # the pipeline samples the latents of an image without its generator
            return self._run(pipe, {**arguments, "input_images": [image]}, 2)

        stock = run_with(red).output
        dit_attn.enable(pipe)
        run, other = run_with(red), run_with(blue)
        assert torch.equal(run.output, stock)
        assert {call.branches for call in run.calls} == {("cond", "uncond", "image")}
        spans = run.calls[0].tokens.spans
        assert tuple(span.kind for span in spans) == self.kinds and spans[-1].grid == self.grid
        assert spans[0].length > 4 * 3  # the instruction holds the tokens of its image
        first = [next(c for c in calls if c.site != calls[0].site) for calls in (run.calls, other.calls)]
        moved = [not torch.equal(*(call.out[row] for call in first)) for row in range(3)]
        assert moved == [True, False, True]  # the unconditional branch sees no image
        dit_attn.enable(pipe, SPARSE)
        assert not torch.equal(run_with(red).output, stock)
        assert dit_attn.summary(pipe).engaged == dit_attn.summary(pipe).calls == 2 * 2

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.omnigen(self.model().eval(), SIZE)


class TestLumina2(ImageCase):
    kinds = ("text", "image")
    untouched = ("refiner",)
    refined = True

    def model(self) -> torch.nn.Module:
        return Lumina2Transformer2DModel(
            sample_size=36,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=2,
            axes_dim_rope=(2, 2, 2),
            axes_lens=(64, 64, 64),
            cap_feat_dim=16,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[:, 7:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_attention_mask": mask,
        }

    def test_captions_of_different_lengths_are_declined(self, net: Any, args: Any) -> None:
        args["encoder_attention_mask"][1, 5:] = 0
        stock = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        assert torch.equal(stock[0], self.call(net, args)[0])
        assert "different lengths" in next(iter(dit_attn.summary(net).declined))

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Lumina2Pipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
        )
        embeds, mask = torch.randn(2, 1, 10, 16), torch.ones(1, 10, dtype=torch.long)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }


class TestHiDream(ImageCase):
    """A picture that is not square is padded to the longest sequence of the model."""

    kinds = ("image", "padding", "text")

    def model(self) -> torch.nn.Module:
        return HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[8, 8],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 4, 8),
            max_resolution=(36, 36),
            llama_layers=(0, 0),
            force_inference_output=True,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timesteps": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states_t5": torch.randn(2, 5, 8),
            "encoder_hidden_states_llama3": torch.randn(1, 2, 5, 8),
            "pooled_embeds": torch.randn(2, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.hidream(self.model().eval(), {"height": 256, "width": 320})


class TestHiDreamSquare(TestHiDream):
    kinds = ("image", "text")
    grid = (1, 16, 16)

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "hidden_states": torch.randn(2, 4, 32, 32)}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.hidream(self.model().eval(), {"height": 256, "width": 256})


class TestZImage(ImageCase):
    kinds = ("image", "padding", "text")
    grid = (1, 15, 18)
    untouched = ("refiner",)
    refined = True

    def model(self) -> torch.nn.Module:
        model = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        for name in ("x_pad_token", "cap_pad_token"):  # the lowest diffusers leaves them as memory has them
            torch.nn.init.normal_(getattr(model, name), std=0.02)
        return model

    def inputs(self) -> dict[str, Any]:
        return {
            "x": [torch.randn(4, 1, 30, 36) for _ in range(2)],
            "t": torch.tensor([0.5, 0.5]),
            "cap_feats": [torch.randn(9, 16), torch.randn(9, 16)],
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        _, y, x = at
        for latents in inputs["x"]:
            latents[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.z_image(self.model().eval(), {**SIZE, "height": 16 * 15})


class TestCogView4(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=36,
            pos_embed_max_size=32,
            rope_axes_dim=(32, 32),
        )

    def inputs(self) -> dict[str, Any]:
        size = torch.tensor([[256, 256]] * 2)
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([500, 500]),
            "original_size": size,
            "target_size": size,
            "crop_coords": torch.zeros(2, 2),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.cogview4(self.model().eval(), SIZE)


class TestHunyuanImage(ImageCase):
    kinds = ("image", "text")
    text_args = ("encoder_hidden_states",)
    sockets = 2
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            rope_axes_dim=(8, 8),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        return {
            "hidden_states": torch.randn(2, 4, HEIGHT, WIDTH),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "encoder_attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.hunyuan_image(self.model().eval(), {"height": 32 * HEIGHT, "width": 32 * WIDTH})


class TestHunyuanDiT(ImageCase):
    kinds = ("image",)
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return HunyuanDiT2DModel(
            sample_size=36,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=16,
            text_len=4,
            text_len_t5=4,
            activation_fn="gelu-approximate",
        )

    def inputs(self) -> dict[str, Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed

        rotary = get_2d_rotary_pos_embed(8, ((0, 0), (HEIGHT, WIDTH)), (HEIGHT, WIDTH), output_type="pt")
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 4, 16),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": torch.randn(2, 4, 16),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_meta_size": torch.tensor([[512.0, 512, 512, 512, 0, 0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": rotary,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.hunyuan_dit(self.model().eval(), SIZE)


class TestAuraFlow(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return AuraFlowTransformer2DModel(
            sample_size=36,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=576,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([0.5, 0.5]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.auraflow(self.model().eval(), SIZE)


def test_z_image_with_references_is_declined_by_layout() -> None:
    from dit_attn.processors.families.image import _z_image

    with pytest.raises(ValueError, match="reference images"):
        _z_image(None, {"x": [[torch.zeros(4, 1, 8, 8)]], "patch_size": 2, "f_patch_size": 1})
