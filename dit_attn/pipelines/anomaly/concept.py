"""A learned anomaly: an appearance embedding per defect, a mask encoder for all, and a LoRA; one safetensors file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, reason, unknown
from dit_attn.pipelines.anomaly.backbone import Backbone, Text
from dit_attn.pipelines.anomaly.mask_encoder import MaskEncoder
from dit_attn.pipelines.anomaly.mask_model import MaskModel, MaskModelSettings
from dit_attn.pipelines.anomaly.text_vectors import appended, first_vectors, prompt_vectors

FORMAT, VERSION = "dit-attn-anomaly", 1
ADAPTER = "anomaly"
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ConceptSettings:
    """What a concept consists of; stored in its file.

    Attributes:
        pipeline: class of the stock pipeline.
        model: its name.
        width: of the text's vectors.
        resolution: pixels at which it was learned.
        pairs: ``"product+defect"``, in the order of the embeddings.
        prompt, normal_prompt: templates with ``{product}`` and ``{defect}``.
        tokens: vectors of an appearance.
        mask_tokens: vectors of a mask, 0 for none.
        lora_rank: 0 for no LoRA.
        steps, lora_steps: trained, in all and with the LoRA.
        seed: of the training.
        shots: files by pair, and those held out.
        gate: thresholds and reference of every pair, see :mod:`~dit_attn.pipelines.anomaly.gate`.
        licence: of the images.
        mask_model: of the model that draws new masks; ``None`` where it was not learned.
    """

    pipeline: str
    model: str
    width: int
    resolution: int
    pairs: tuple[str, ...]
    prompt: str = "{product} with a {defect}"
    normal_prompt: str = "normal {product}"
    tokens: int = 8
    mask_tokens: int = 4
    lora_rank: int = 8
    steps: int = 0
    lora_steps: int = 0
    seed: int = 0
    shots: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    mask_model: MaskModelSettings | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConceptSettings:
        """Return the settings of ``dataclasses.asdict``."""
        model = data.get("mask_model")
        made = {"pairs": tuple(data["pairs"]), "mask_model": MaskModelSettings(**model) if model else None}
        return cls(**{**data, **made})


class Concept(torch.nn.Module):
    """The learned vectors of some (product, defect) pairs, and the state of their LoRA.

    Args:
        settings: what it consists of.

    Attributes:
        lora: weights of the LoRA by name; empty before training.
        shapes: masks of the shots by pair, (h, w) bool, cut to their boxes.
        mask_model: draws new masks; ``None`` where it was not learned.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, settings: ConceptSettings):
        super().__init__()
        self.settings = settings
        count, width = len(settings.pairs), settings.width
        self.appearance = torch.nn.Parameter(torch.zeros(count, settings.tokens, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.masks = MaskEncoder(settings.mask_tokens, width) if settings.mask_tokens else None
        self.lora: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, list[np.ndarray]] = {}
        self.mask_model = MaskModel(settings.mask_model, count, width) if settings.mask_model else None

    @torch.no_grad()
    def begin(self, texts: Sequence[Text], masked: str, generator: torch.Generator) -> None:
        """Start every appearance from the vectors of its own words, each slightly different.

        Args:
            texts: of the pairs' prompts.
            masked: name of the text's mask, ``""`` for none.
            generator: of the differences.
        """
        rows = [prompt_vectors(text, masked) for text in texts]
        every = torch.cat(rows)
        self.mean.copy_(every.mean(0))
        self.deviation.copy_(every.std(0).clamp(min=1e-3) if len(every) > 1 else torch.ones(every.shape[1]))
        self.appearance.copy_(first_vectors(rows, self.settings.tokens, self.mean, self.deviation, generator))

    def index(self, product: str, defect: str) -> int:
        """Return the number of a pair.

        Raises:
            DitAttnError: it was not learned.
        """
        name = f"{product}+{defect}"
        if name not in self.settings.pairs:
            raise unknown("defect", name, self.settings.pairs)
        return self.settings.pairs.index(name)

    def extend(self, text: Text, masked: str, pairs: torch.Tensor, masks: torch.Tensor) -> Text:
        """Append the learned vectors to the text of every sample.

        Args:
            text: of the samples.
            masked: name of the text's mask, ``""`` for none.
            pairs: (B,) number of every sample's pair.
            masks: (B, 1, H, W) in {0, 1}.
        """
        vectors = self.mean + self.deviation * self.appearance[pairs]
        if self.masks is not None:
            vectors = torch.cat([vectors, self.mean + self.deviation * self.masks(masks)], 1)
        return appended(text, masked, vectors)

    def extend_for_masks(self, text: Text, masked: str, pairs: torch.Tensor) -> Text:
        """Append the vectors of the mask model to the text of every sample; arguments as in :meth:`extend`."""
        assert self.mask_model is not None
        return appended(text, masked, self.mean + self.deviation * self.mask_model.vectors[pairs])

    def save(self, path: Path) -> None:
        """Write the concept: tensors, and its settings as JSON in the file's metadata, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written.
        """
        from safetensors.torch import save

        tensors = {f"concept.{name}": value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        loras = {"lora": self.lora, "mask_lora": self.mask_model.lora if self.mask_model is not None else {}}
        for kind, lora in loras.items():
            tensors |= {f"{kind}.{name}": value.detach().cpu().float().contiguous() for name, value in lora.items()}
        for pair, shapes in self.shapes.items():
            tensors |= {f"mask.{i}.{pair}": torch.from_numpy(one.astype(np.uint8)) for i, one in enumerate(shapes)}
        settings = json.dumps(asdict(self.settings), ensure_ascii=False)
        about = {"format": FORMAT, "version": str(VERSION), "settings": settings}
        with files.report_os_error(f"write {path}", "free some space and go on with --resume"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, save(tensors, about))

    @staticmethod
    def push_to_hub(path: Path, repo_id: str, **kwargs: Any) -> str:
        """Upload the file of a concept to a repository of the Hugging Face Hub, which is made if need be.

        Returns:
            The commit's address.

        Raises:
            DitAttnError: the Hub cannot be reached or refuses.
        """
        from huggingface_hub import HfApi

        from dit_attn.hub import is_offline

        if is_offline():
            raise DitAttnError(f"cannot upload to {repo_id}: the Hub cannot be reached; the concept is in {path}")
        try:
            hub = HfApi()
            hub.create_repo(repo_id, exist_ok=True)
            return str(hub.upload_file(path_or_fileobj=str(path), path_in_repo=path.name, repo_id=repo_id, **kwargs))
        except Exception as error:  # the client lets the errors of its HTTP library through, whichever that is
            raise DitAttnError(
                f"cannot upload to {repo_id} ({reason(error)}); the concept is in {path}: check the name, the network "
                "and `hf auth login`"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Concept:
        """Read a concept.

        Raises:
            DitAttnError: no such file, or it is no concept.
        """
        from safetensors import SafetensorError, safe_open

        path = files.user_path(path, "--concept")
        if not path.is_file():
            raise DitAttnError(f"there is no concept {path}; `dit-attn anomaly train` makes one")
        try:
            with safe_open(str(path), "pt") as opened:
                about = opened.metadata() or {}
                if about.get("format") != FORMAT or about.get("version") != str(VERSION):
                    raise DitAttnError(f"{path} is no concept of `dit-attn anomaly train`")
                data = files.parse_json(about["settings"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            concept = cls(ConceptSettings.from_dict(data))
            own = {k.removeprefix("concept."): v for k, v in tensors.items() if k.startswith("concept.")}
            concept.load_state_dict(own)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, DitAttnError):
                raise
            raise DitAttnError(f"{path} is damaged ({reason(error)}); train it again") from error
        for key in sorted(name for name in tensors if name.startswith("mask.")):
            pair = key.split(".", 2)[2]
            concept.shapes.setdefault(pair, []).append(tensors[key].numpy().astype(bool))
        concept.lora = {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}
        if concept.mask_model is not None:
            lora = {k.removeprefix("mask_lora."): v for k, v in tensors.items() if k.startswith("mask_lora.")}
            concept.mask_model.lora = lora
        return concept

    def check_model(self, backbone: Backbone) -> None:
        """Refuse a pipeline that the concept was not learned on.

        Raises:
            DitAttnError: it is of another class or has text of another width.
        """
        if backbone.name != self.settings.pipeline:
            raise DitAttnError(f"the concept was learned on {self.settings.pipeline}, not {backbone.name}")
        width = backbone.text("a")["prompt_embeds"].shape[-1] if backbone.text_encoders else self.settings.width
        if width != self.settings.width:
            raise DitAttnError(f"the concept has vectors of {self.settings.width}, the model's text {width}")


def check_peft() -> None:
    """Refuse a LoRA where peft is not installed.

    Raises:
        DitAttnError: it is not.
    """
    if importlib.util.find_spec("peft") is None:
        raise DitAttnError("a LoRA needs peft, which is not there: `pip install 'dit-attn[lora]'`, or --lora-rank 0")


def add_lora(transformer: Any, rank: int, state: dict[str, torch.Tensor] | None = None) -> list[torch.nn.Parameter]:
    """Add the LoRA of a concept to a transformer and return its parameters, fp32.

    Args:
        transformer: of the pipeline.
        rank: of the LoRA.
        state: weights to set; fresh ones, which change nothing, where ``None``.

    Raises:
        DitAttnError: peft is not installed, or weights of another model.
    """
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_LAYERS))
    inject_adapter_in_model(layers, transformer, adapter_name=ADAPTER)
    if state:
        result = set_peft_model_state_dict(transformer, dict(state), adapter_name=ADAPTER)
        if getattr(result, "unexpected_keys", None):
            remove_lora(transformer)
            raise DitAttnError("the LoRA of the concept does not fit this model; use the one it was learned on")
    parameters = [p for name, p in transformer.named_parameters() if f".{ADAPTER}." in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def remove_lora(transformer: Any) -> None:
    """Take the LoRA off a transformer again; its own layers are as before, other adapters stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer) and ADAPTER in getattr(module, "lora_A", {}):
            module.delete_adapter(ADAPTER)
            if not getattr(module, "lora_A", {}):
                parent, _, child = name.rpartition(".")
                transformer.get_submodule(parent)._modules[child] = module.get_base_layer()
    configs = getattr(transformer, "peft_config", {})
    configs.pop(ADAPTER, None)
    if not configs and "peft_config" in vars(transformer):
        del transformer.peft_config


def lora_state(transformer: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the LoRA that :func:`add_lora` added."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    return {name: value.detach().clone() for name, value in found.items()}


@contextmanager
def applied(concept: Concept | MaskModel, transformer: Any) -> Iterator[None]:
    """Have the LoRA of a concept, or of its mask model, on a transformer within a ``with`` block."""
    if not concept.lora:
        yield
        return
    add_lora(transformer, concept.settings.lora_rank, concept.lora)
    try:
        yield
    finally:
        remove_lora(transformer)
