"""OmniGen: instruction, time and picture in one sequence, images of the prompt in a third branch."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
from PIL import Image

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase, tiny_vae
from tests._support.family_mixin import SPARSE


def omnigen(model: torch.nn.Module, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """OmniGen with a word tokenizer, both branches in one batch, the prompt first."""
    from diffusers.utils import is_torchvision_available
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not is_torchvision_available():
        pytest.skip("the pipeline of OmniGen reads images with torchvision, which is not installed")
    words = Tokenizer(models.WordLevel({"[pad]": 0, "[unk]": 1, "a": 2, "red": 3, "square": 4}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = diffusers.OmniGenPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=tiny_vae(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]"),
    )
    return pipe, {"prompt": "a red square", "guidance_scale": 3.0, **size}


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
        first = [next(c for c in calls if c.layer != calls[0].layer) for calls in (run.calls, other.calls)]
        moved = [not torch.equal(*(call.out[row] for call in first)) for row in range(3)]
        assert moved == [True, False, True]  # the unconditional branch sees no image
        dit_attn.enable(pipe, SPARSE)
        assert not torch.equal(run_with(red).output, stock)
        assert dit_attn.summary(pipe).sparse_calls == dit_attn.summary(pipe).calls == 2 * 2

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return omnigen(self.model().eval(), SIZE)
