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


class MaskEncoder(torch.nn.Module):
    """Encode masks as text vectors: (B, 1, H, W) -> (B, tokens, width), zero before training.

    Learned queries attend to an 8 x 8 grid of features; no statistic is shared over the batch.
    """

    def __init__(self, tokens: int, width: int, hidden: int = 64):
        super().__init__()
        layers: list[torch.nn.Module] = []
        for inner, outer in ((1, hidden // 2), (hidden // 2, hidden), (hidden, hidden)):
            layers += [torch.nn.Conv2d(inner, outer, 3, 2, 1), torch.nn.GroupNorm(8, outer), torch.nn.SiLU()]
        self.features = torch.nn.Sequential(*layers)
        self.places = torch.nn.Parameter(0.1 * torch.randn(64, hidden))
        self.queries = torch.nn.Parameter(torch.randn(tokens, hidden))
        self.attention = torch.nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.out = torch.nn.Linear(hidden, width)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """Encode (B, 1, H, W) in {0, 1}."""
        grid = self.features(torch.nn.functional.adaptive_avg_pool2d(masks, 64)).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(masks), -1, -1)
        found, _ = self.attention(queries, grid + self.places, grid, need_weights=False)
        return self.out(found)


class Concept(torch.nn.Module):
    """The learned vectors of some (product, defect) pairs, and the state of their LoRA.

    Args:
        settings: what it consists of.

    Attributes:
        lora: weights of the LoRA by name; empty before training.
        shapes: masks of the shots by pair, (h, w) bool, cut to their boxes.
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

    @torch.no_grad()
    def begin(self, texts: Sequence[Text], masked: str, generator: torch.Generator) -> None:
        """Start every appearance from the vectors of its own words, each slightly different.

        Args:
            texts: of the pairs' prompts.
            masked: name of the text's mask, ``""`` for none.
            generator: of the differences.
        """
        rows = []
        for text in texts:
            vectors = text["prompt_embeds"][0].float().cpu()
            rows.append(vectors[text[masked][0].bool().cpu()] if masked else vectors)
        every = torch.cat(rows)
        self.mean.copy_(every.mean(0))
        self.deviation.copy_(every.std(0).clamp(min=1e-3) if len(every) > 1 else torch.ones(every.shape[1]))
        for index, vectors in enumerate(rows):
            start = vectors[torch.arange(self.settings.tokens) % len(vectors)]
            start = (start - self.mean) / self.deviation
            self.appearance[index] = start + 0.02 * torch.randn(start.shape, generator=generator)

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
        words = text["prompt_embeds"]
        out = {**text, "prompt_embeds": torch.cat([words, vectors.to(words)], 1)}
        if masked:
            exists = text[masked]
            out[masked] = torch.cat([exists, exists.new_ones(len(exists), vectors.shape[1])], 1)
        return out

    def save(self, path: Path) -> None:
        """Write the concept: tensors, and its settings as JSON in the file's metadata, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written.
        """
        from safetensors.torch import save

        tensors = {f"concept.{name}": value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        tensors |= {f"lora.{name}": value.detach().cpu().float().contiguous() for name, value in self.lora.items()}
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
        from huggingface_hub.errors import HfHubHTTPError

        from dit_attn.hub import is_offline

        if is_offline():
            raise DitAttnError(f"cannot upload to {repo_id}: the Hub cannot be reached; the concept is in {path}")
        try:
            hub = HfApi()
            hub.create_repo(repo_id, exist_ok=True)
            return str(hub.upload_file(path_or_fileobj=str(path), path_in_repo=path.name, repo_id=repo_id, **kwargs))
        except (HfHubHTTPError, ValueError, OSError) as error:
            raise DitAttnError(f"cannot upload to {repo_id} ({reason(error)}); the concept is in {path}") from error

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
            settings = ConceptSettings(**{**data, "pairs": tuple(data["pairs"])})
            concept = cls(settings)
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
def applied(concept: Concept, transformer: Any) -> Iterator[None]:
    """Have the LoRA of a concept on a transformer within a ``with`` block."""
    if not concept.lora:
        yield
        return
    add_lora(transformer, concept.settings.lora_rank, concept.lora)
    try:
        yield
    finally:
        remove_lora(transformer)
