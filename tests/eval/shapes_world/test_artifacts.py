"""Real images have neither over-saturated pixels nor artifacts; each kind of damage is seen for what it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.artifacts import artifact_rate, artifacts, oversaturated

SCENES = [item for item in world.held_out_sample("image", 12, seed=5) if isinstance(item, world.Scene)]


def drawn(size: int) -> np.ndarray:
    return (world.render_scenes(SCENES, size) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def strengthened(frames: np.ndarray, gain: float) -> np.ndarray:
    """Colors moved away from their gray, and clipped where they leave the range."""
    gray = frames.mean(-1, keepdims=True)
    return (gray + gain * (frames - gray)).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("damage", ["none", "blur", "noise"])
def test_real_images_have_no_artifacts_however_blurred_or_noisy(size: int, damage: str) -> None:
    images = drawn(size)
    if damage == "blur":
        images = ndimage.gaussian_filter(images, (0, size / 96, size / 96, 0))
    if damage == "noise":
        noise = 12 * np.random.default_rng(0).normal(size=images.shape)
        images = (images + noise).clip(0, 255).round().astype(np.uint8)
    assert artifact_rate(images) == 0.0
    if damage != "noise":
        assert oversaturated(images) == 0.0


def test_a_video_that_was_compressed_still_counts_as_real(tmp_path) -> None:
    import imageio.v3 as iio

    scene = next(item for item in world.held_out_sample("video", 5) if isinstance(item, world.VideoScene))
    frames = (world.render_videos([scene], 9, 96)[0] * 255).round().byte().permute(1, 2, 3, 0).numpy()
    iio.imwrite(tmp_path / "video.mp4", frames, fps=8, plugin="FFMPEG", macro_block_size=16)
    back = np.stack(list(iio.imiter(tmp_path / "video.mp4", plugin="FFMPEG")))
    assert artifact_rate(back) == 0.0 and oversaturated(back) < 0.01


def test_the_share_of_over_saturated_pixels_grows_with_the_strength_of_colors() -> None:
    shares = [oversaturated(strengthened(drawn(64), gain)) for gain in (0.7, 1.0, 1.2, 1.6)]
    assert shares[:2] == [0.0, 0.0] and 0.2 < shares[2] < shares[3]


@pytest.mark.parametrize("color", world.COLORS)
def test_every_color_of_the_palette_is_allowed_and_its_clipped_version_is_not(color: str) -> None:
    rgb = np.array(world.COLORS[color])
    patch = np.full((1, 8, 8, 3), 255 * rgb).round().astype(np.uint8)
    pure = np.full((1, 8, 8, 3), 255 * (rgb > rgb.mean())).astype(np.uint8)
    assert oversaturated(patch) == 0.0 and oversaturated(pure) == 1.0


def test_compared_with_dense_the_same_image_scores_zero_and_a_stronger_one_more() -> None:
    dense = strengthened(drawn(64), 0.6)
    assert oversaturated(dense, dense) == 0.0
    assert oversaturated(drawn(64), dense) > 0.5 and oversaturated(strengthened(dense, 0.5), dense) == 0.0


def test_gray_images_have_no_color_to_saturate() -> None:
    gray = np.full((1, 16, 16, 3), 128, dtype=np.uint8)
    assert oversaturated(gray) == 0.0 and oversaturated(gray, gray) == 0.0


SCENE = world.Scene("square", "red", "large", "center", 1, "white")


def broken(how: str) -> np.ndarray:
    image = (world.render_scenes([SCENE], 128)[0] * 255).round().byte().permute(1, 2, 0).numpy().copy()
    red = image[64, 64].copy()
    if how == "an object of no color of the world":
        image[(image == red).all(-1)] = (120, 60, 20)
    elif how == "a colored background":
        image[(image == 255).all(-1)] = (255, 170, 170)
    elif how == "an object that no shape fits":
        image[:] = 255
        image[10:118, 10:20] = image[108:118, 10:118] = red
    elif how == "specks":
        image[4:124:12, 4:124:12] = image[5:125:12, 4:124:12] = image[4:124:12, 5:125:12] = (20, 30, 240)
    elif how == "holes of another color":
        image[54:74, 54:74] = (30, 200, 60)
    return image


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("nothing", set()),
        ("an object of no color of the world", {"color"}),
        ("a colored background", {"color"}),
        ("an object that no shape fits", {"shape"}),
        ("specks", {"stray"}),
        ("holes of another color", {"stray"}),
    ],
)
def test_damage_is_named(how: str, kinds: set[str]) -> None:
    assert {name for name, there in artifacts(broken(how)).items() if there} == kinds


def test_the_rate_is_the_share_of_frames() -> None:
    assert artifact_rate(np.stack([broken("nothing"), broken("specks"), broken("nothing")])) == pytest.approx(1 / 3)
