"""What the tests of the command line share: running a command, and small pipelines of many kinds."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass

import pytest

from dit_attn.cli import main
from tests._support import forked_workers

FAST = ("--height", "32", "--width", "32", "--steps", "1")


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    def refused(self, *parts: str) -> None:
        """Assert that this is bad input: exit 2, one line on standard error that has every part, no traceback."""
        assert self.code == 2, self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("dit-attn: error: ")
        for part in parts:
            assert part in lines[0]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """``cli("generate", ...)`` runs the command in this process, in an empty folder, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def quick_workers(monkeypatch):
    """Workers that have imported the libraries when they start."""
    forked_workers.use(monkeypatch)


@pytest.fixture(params=["local", "ray"])
def engine(request, monkeypatch):
    """The words for two workers of either engine."""
    if request.param == "ray":
        pytest.importorskip("ray")
    forked_workers.use(monkeypatch)
    return "--workers", "2", "--engine", request.param


@pytest.fixture
def image(cli):
    """``image(...)`` is `generate` on the embedded image model, as small and fast as it goes."""
    return lambda *words: cli("generate", "--model", "tiny-image", *FAST, *words)


@pytest.fixture(scope="session")
def folder_model(tmp_path_factory):
    """A local copy of the embedded image model."""
    from dit_attn import models

    target = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(models.info("tiny-image").folder, target)
    return target


@pytest.fixture(scope="session")
def image_to_video_model(tmp_path_factory):
    """A random one-layer image-to-video pipeline around the embedded video model's parts."""
    import torch
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

    from dit_attn import models

    torch.manual_seed(0)
    pipe = models.load("tiny-video")
    channels = 2 * pipe.vae.config.z_dim + pipe.vae.config.scale_factor_temporal
    transformer = WanTransformer3DModel.from_config(
        {**pipe.transformer.config, "in_channels": channels, "num_layers": 1}
    )
    target = tmp_path_factory.mktemp("models") / "image-to-video"
    WanImageToVideoPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        scheduler=pipe.scheduler,
        transformer=transformer,
    ).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def flux_parts():
    """The parts of a random two-layer Flux around the embedded joint model's; no distilled guidance."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel

    from dit_attn import models

    torch.manual_seed(0)
    parts = models.load("tiny-joint")
    transformer = FluxTransformer2DModel(
        in_channels=4 * parts.vae.config.latent_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.text_encoder_3.config.d_model,
        pooled_projection_dim=parts.text_encoder.config.hidden_size,
        axes_dims_rope=(4, 6, 6),
    )
    return {
        "tokenizer": parts.tokenizer,
        "text_encoder": CLIPTextModel(parts.text_encoder.config),
        "tokenizer_2": parts.tokenizer_3,
        "text_encoder_2": parts.text_encoder_3,
        "vae": parts.vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": transformer,
    }


@pytest.fixture(scope="session")
def flux_model(flux_parts, tmp_path_factory):
    """A Flux pipeline of these parts."""
    from diffusers import FluxPipeline

    target = tmp_path_factory.mktemp("models") / "flux"
    FluxPipeline(**flux_parts).save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def modular_model(flux_parts, tmp_path_factory):
    """The same as a modular pipeline alone."""
    from diffusers import FluxAutoBlocks

    target = tmp_path_factory.mktemp("models") / "modular"
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**flux_parts)
    pipe.save_pretrained(str(target), overwrite_modular_index=True)
    return target


@pytest.fixture
def broken_torchvision(monkeypatch, tmp_path):
    """A torchvision that was built for another torch: it is there, and its import raises ``RuntimeError``."""
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
