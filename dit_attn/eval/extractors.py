"""Load the networks behind FID, CLIP score and LPIPS, from given or cached files, without silent replacements."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dit_attn.errors import DitAttnError, reason
from dit_attn.files import read_weights

CLIP_DEFAULT = "openai/clip-vit-large-patch14"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
# Layer of the metrics that take no weights file themselves (FID does).
_INCEPTION_LAYERS = {"KernelInceptionDistance": "2048", "InceptionScore": "logits_unbiased"}
BACKBONE_FILES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


@dataclass(frozen=True)
class Networks:
    """Where the networks are.

    Attributes:
        inception: Inception-v3 of the original FID (a file of torch-fidelity); ``None`` for torch's hub cache.
        clip: folder or Hub name of a CLIP model.
        lpips: backbone of LPIPS: ``alex``, ``vgg`` or ``squeeze``.
        lpips_weights: torchvision's weights of that backbone; ``None`` for torch's hub cache.
        features: a module that takes uint8 images (N, 3, H, W) and gives (N, F), to use instead of Inception for FID,
            KID and IS; it must have a ``name``, which the score is labelled with.
    """

    inception: Path | None = None
    clip: str = CLIP_DEFAULT
    lpips: str = "alex"
    features: nn.Module | None = None
    lpips_weights: Path | None = None


def inception_options(networks: Networks) -> tuple[dict[str, Any], str]:
    """Return the arguments for torchmetrics' FID, KID and IS, and the label of the network.

    Raises:
        DitAttnError: torch-fidelity or its weights are missing; the message names the file and the offline metric.
    """
    if networks.features is not None:
        return {"feature": networks.features}, str(getattr(networks.features, "name", type(networks.features).__name__))
    if importlib.util.find_spec("torch_fidelity") is None:
        raise DitAttnError(
            "FID, KID and IS need the Inception network of torch-fidelity: pip install torch-fidelity; without network "
            "access use fid-world and kid-world, which need nothing"
        )
    cached = _cached(INCEPTION_FILE)
    if networks.inception is not None and not networks.inception.is_file():
        raise DitAttnError(f"no Inception weights at {networks.inception}; give the file {INCEPTION_FILE}")
    given = networks.inception or (cached if cached.is_file() else None)
    return {"feature_extractor_weights_path": None if given is None else str(given)}, "inception-v3"


def clip_pair(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    """Build the function that torchmetrics' CLIPScore takes: it returns model and processor.

    transformers 5 returns an output object where torchmetrics 1.9 expects the features themselves; the model that is
    returned here gives them.

    Raises:
        DitAttnError: the model is neither a folder nor in the cache nor on the Hub.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DitAttnError(
            f"no CLIP model {name!r}: {str(error).splitlines()[0]}; give a local folder with config.json and "
            "model.safetensors, or use clip-world, which needs no download"
        ) from error
    return lambda: (PooledClip(model).eval(), processor)


class PooledClip(nn.Module):
    """A CLIP model whose feature functions return tensors (N, F) under any version of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute (N, F) of pixel values."""
        return _pooled(cast(Any, self.model).get_image_features(*args, **kwargs))

    def get_text_features(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute (N, F) of token ids."""
        return _pooled(cast(Any, self.model).get_text_features(*args, **kwargs))


def _pooled(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def with_inception(build: Callable[..., Any], networks: Networks, **options: Any) -> tuple[Any, str]:
    """Build a torchmetrics metric on Inception, or on ``networks.features``; also the label of the network.

    Raises:
        DitAttnError: as :func:`inception_options`, or weights that cannot be fetched or read.
    """
    found, judge = inception_options(networks)
    if networks.features is not None:
        return build(**found, **options), judge
    try:
        layer = _INCEPTION_LAYERS.get(getattr(build, "__name__", ""))
        with _as_data(found["feature_extractor_weights_path"]) as file:
            found = {"feature_extractor_weights_path": file}
            if layer is not None:
                from torchmetrics.image.fid import NoTrainInceptionV3

                found = {"feature": NoTrainInceptionV3("inception-v3-compat", [layer], file)}
            return build(**found, **options), judge
    except Exception as error:  # of reading a broken file; urllib raises anything without a network
        cause = f"{networks.inception} cannot be read" if networks.inception else f"{INCEPTION_FILE} is not available"
        raise DitAttnError(
            f"FID, KID and IS need the Inception weights: {cause} ({reason(error)[:200]}); give --inception FILE with "
            f"{INCEPTION_FILE} of torch-fidelity, or use fid-world and kid-world, which need nothing"
        ) from error


def check_lpips(networks: Networks) -> None:
    """Raise DitAttnError unless LPIPS can be built without a download."""
    backbone = networks.lpips
    if backbone not in BACKBONE_FILES:
        raise DitAttnError(f"unknown LPIPS backbone {backbone!r}; use one of {', '.join(BACKBONE_FILES)}")
    if networks.lpips_weights is not None and not networks.lpips_weights.is_file():
        raise DitAttnError(f"no LPIPS weights at {networks.lpips_weights}; give the file {BACKBONE_FILES[backbone]}")
    if importlib.util.find_spec("torchvision") is None:
        raise DitAttnError("LPIPS needs torchvision: pip install torchvision; PSNR and SSIM need nothing")
    file = networks.lpips_weights or _cached(BACKBONE_FILES[backbone])
    if not file.is_file():
        raise DitAttnError(
            f"LPIPS needs the weights of its backbone at {file}; fetch {BACKBONE_FILES[backbone]} from "
            "download.pytorch.org/models and give --lpips-weights FILE, or use PSNR and SSIM, which need nothing"
        )


def lpips_metric(networks: Networks) -> Any:
    """Build torchmetrics' LPIPS for images in [0, 1].

    Raises:
        DitAttnError: as :func:`check_lpips`, or weights that are not those of the backbone.
    """
    check_lpips(networks)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    file = networks.lpips_weights or _cached(BACKBONE_FILES[networks.lpips])
    try:
        with _hub_with(file, BACKBONE_FILES[networks.lpips]):
            return LearnedPerceptualImagePatchSimilarity(cast(Any, networks.lpips), normalize=True)
    except Exception as error:  # of reading a broken file, or of weights that do not fit the network
        raise DitAttnError(
            f"the LPIPS weights in {file} are not those of {networks.lpips} ({reason(error)[:200]}); give the file "
            f"{BACKBONE_FILES[networks.lpips]}"
        ) from error


def _cached(name: str) -> Path:
    """A file of torch's hub cache, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


@contextmanager
def _hub_with(file: Path, name: str) -> Iterator[None]:
    """torch's hub cache as one that holds ``file``, read as data, under the name that torchvision asks for.

    torchvision loads what it finds there with ``weights_only=False``, which runs the code of a prepared file.
    """
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "checkpoints", name)
        place.parent.mkdir()
        torch.save(read_weights(file), place)
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


@contextmanager
def _as_data(file: str | None) -> Iterator[str | None]:
    """A copy of a weights file that holds its tensors and nothing else, for libraries that unpickle what they load."""
    if file is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(file).with_suffix(".pth").name)
        torch.save(read_weights(Path(file)), copy)
        yield str(copy)
