"""Autoencoders whose weights are set by a formula, so that nothing needs to be trained.

`silu(a) - silu(-a) = a` holds exactly, so a convolution that carries `x` and `-x`, the activation and a convolution
that subtracts the two is the identity. The normalization in between becomes a fixed scale when two (or eight) constant
channels of size K dominate its statistics. Residual blocks with zero weights are identities.

* `exact_kl`: a stock `AutoencoderKL` with latent = pixels.
* `exact_wan`: a stock `AutoencoderKLWan` with latent = space-to-depth of the pixels, one latent frame per frame.

The reconstruction error is below 1e-5 in fp32: the constants do not dominate the statistics entirely.
"""

from __future__ import annotations

from typing import Any

import torch

CONSTANT = 512.0  # K: size of the constant channels that pin the normalization
LOG_VARIANCE = -30.0  # the encoder's posterior is a point


@torch.no_grad()
def _zero(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def exact_kl(channels: int = 3) -> Any:
    """Build a stock `AutoencoderKL` (scale factor 1, `channels` latent channels) that encodes and decodes exactly."""
    from diffusers import AutoencoderKL

    width = 2 * channels + 2
    vae: Any = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(width,),
        layers_per_block=0,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
    )
    _zero(vae)
    for half in (vae.encoder, vae.decoder):
        _carry(half.conv_in, half.conv_out, channels, constants=2, taps=(1, 1))
        half.conv_norm_out.weight.data.fill_(CONSTANT * (2 / width) ** 0.5)
    vae.encoder.conv_out.bias.data[channels:] = LOG_VARIANCE
    return vae.eval()


def exact_wan(patch: int = 2) -> Any:
    """Build a stock `AutoencoderKLWan` whose latent is the space-to-depth of the pixels, `3 * patch**2` channels.

    Spatial factor `patch`, temporal factor 1. Encode videos of 4 k + 1 frames: the stock encoder takes
    the first frame, then chunks of four, and drops a shorter rest. Decoding takes any length.
    """
    from diffusers import AutoencoderKLWan

    channels = 3 * patch * patch
    width = 2 * channels + 8
    vae: Any = AutoencoderKLWan(
        base_dim=width,
        z_dim=channels,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
        scale_factor_spatial=patch,
        scale_factor_temporal=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )
    _zero(vae)
    for half in (vae.encoder, vae.decoder):
        _carry(half.conv_in, half.conv_out, channels, constants=8, taps=(-1, 1, 1))
        half.norm_out.gamma.data.fill_(CONSTANT * (8 / width) ** 0.5)
    vae.encoder.conv_out.bias.data[channels:] = LOG_VARIANCE
    for conv, rows in ((vae.quant_conv, 2 * channels), (vae.post_quant_conv, channels)):
        for row in range(rows):
            conv.weight.data[row, row, 0, 0, 0] = 1.0
    return vae.eval()


def _carry(conv_in: Any, conv_out: Any, channels: int, constants: int, taps: tuple[int, ...]) -> None:
    """Make `conv_in` emit (x, -x, constants) and `conv_out` subtract the first two, both at kernel tap `taps`."""
    for i in range(channels):
        conv_in.weight.data[(i, i, *taps)] = 1.0
        conv_in.weight.data[(channels + i, i, *taps)] = -1.0
        conv_out.weight.data[(i, i, *taps)] = 1.0
        conv_out.weight.data[(i, channels + i, *taps)] = -1.0
    bias = conv_in.bias.data
    bias[2 * channels :] = CONSTANT
    if constants == 2:  # a group norm subtracts the mean: one positive, one negative
        bias[2 * channels + 1] = -CONSTANT


@torch.no_grad()
def space_to_depth(video: torch.Tensor, patch: int) -> torch.Tensor:
    """Compute the latent of `exact_wan`, (B, 3 * patch**2, F, H / patch, W / patch), for `video` (B, 3, F, H, W)."""
    b, c, f, h, w = video.shape
    out = video.view(b, c, f, h // patch, patch, w // patch, patch)
    return out.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * patch * patch, f, h // patch, w // patch)
