"""Images, videos, latents and sound are found under every name that pipelines of diffusers give them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_attn.pipelines.output import batch_of, sound_of

CLIP, LATENTS = torch.rand(5, 3, 8, 8), torch.rand(1, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("result", "video", "first"),
    [
        (SimpleNamespace(images=CLIP), False, CLIP[0]),
        (SimpleNamespace(image=CLIP), False, CLIP[0]),  # Kandinsky 5
        (SimpleNamespace(frames=CLIP[None], audio=None), True, CLIP),
        (SimpleNamespace(video=CLIP, sound=None), True, CLIP),  # Cosmos 3
        (SimpleNamespace(video=LATENTS), True, LATENTS[0]),
    ],
)
def test_a_batch_is_found_whatever_its_name(result: SimpleNamespace, video: bool, first: torch.Tensor) -> None:
    made = batch_of(result)
    assert made is not None and made.video is video and torch.equal(made.items[0], first)


def test_a_video_of_one_frame_is_the_image_it_was_asked_for() -> None:
    made = batch_of(SimpleNamespace(video=CLIP[:1], sound=None))
    assert made is not None and not made.video and torch.equal(made.items[0], CLIP[0])
    assert batch_of(SimpleNamespace(texts=["a"])) is None


def part(**config: int) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("result", "pipe", "shape", "rate"),
    [
        (  # LTX-2: the rate of the pipeline is that of its spectrograms
            SimpleNamespace(audio=torch.rand(1, 2, 100)),
            SimpleNamespace(audio_sampling_rate=16000, vocoder=part(output_sampling_rate=24000)),
            (100, 2),
            24000,
        ),
        (SimpleNamespace(audio=np.zeros((1, 100))), SimpleNamespace(audio_sample_rate=44100), (100, 1), 44100),
        (
            SimpleNamespace(sound=torch.rand(2, 100)),
            SimpleNamespace(sound_tokenizer=part(sampling_rate=48000)),
            (100, 2),
            48000,
        ),
        (SimpleNamespace(audio=torch.rand(1, 2, 100), sampling_rate=32000), SimpleNamespace(), (100, 2), 32000),
    ],
    ids=["ltx-2", "kandinsky-6", "cosmos-3", "minimax-h3"],
)
def test_sound_comes_with_its_rate(
    result: SimpleNamespace, pipe: SimpleNamespace, shape: tuple[int, int], rate: int
) -> None:
    found = sound_of(result, pipe)
    assert found is not None and found.samples.shape == shape and found.rate == rate
    assert sound_of(SimpleNamespace(audio=torch.rand(1, 2, 9)), SimpleNamespace()) is None
