"""Loading a pipeline for the command line: device, type, adapters, offloading, compilation."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn import files
from dit_attn.cli import modular_source
from dit_attn.cli.model_source import Source, cached_index, describe, go_offline_where_there_is_no_hub
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries, on_terminal
from dit_attn.errors import DitAttnError, reason, require_torchvision, shorten, unknown
from dit_attn.processors.attach.components import COMPONENTS

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class LoadConfig:
    """Which pipeline is loaded, and how.

    Attributes:
        source: the model.
        device, dtype: of the weights.
        variant: weight variant of the checkpoint.
        lora: adapters, as ``--lora`` takes them.
        attention_backend: of diffusers, for dense calls.
        cpu_offload: ``"model"``, ``"group"`` or ``None``.
        vae_tiling, vae_slicing: decode piece by piece.
        compile: arguments of ``torch.compile``; ``None`` does not compile.
        parts: of a modular pipeline, by name; ``None``: all.
    """

    source: Source
    device: Any
    dtype: Any
    variant: str | None = None
    lora: tuple[str, ...] = ()
    attention_backend: str | None = None
    cpu_offload: str | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: dict[str, Any] | None = None
    parts: tuple[str, ...] | None = None

    @classmethod
    def from_options(cls, options: Options, show_progress: bool = False, modular: bool = False) -> LoadConfig:
        """Check the flags and read the model's configuration; no weights are loaded.

        Args:
            options: the flags.
            show_progress: let diffusers and transformers draw their bars while they load.
            modular: whether a modular pipeline will do.

        Raises:
            DitAttnError: no such model, device, adapter or library; a combination that this machine or pipeline
                cannot do.
        """
        lora = tuple(options.get("lora", ()))
        parse_loras(lora)
        offload = options.get("cpu_offload")
        no_gpu = DitAttnError(f"--cpu-offload {offload} needs a GPU to load onto, and the device is cpu; leave it out")
        if offload and options.get("device") == "cpu":  # before torch is imported
            raise no_gpu
        with loading_libraries(not options.get("json")):
            device = pick_device(options.get("device", "auto"))
            if offload and device.type == "cpu":
                raise no_gpu
            quiet(show_progress)
            source = describe(options["model"], options.get("revision"), options.get("variant"), modular)
        _check_takes_adapters(lora, source.pipeline)
        require_torchvision(source.pipeline.__name__, type(source.transformer).__name__)
        dtype = pick_dtype(options.get("dtype", "auto"), source, device)
        rest = options.pick("variant", "attention_backend", "vae_tiling", "vae_slicing", "compile")
        return cls(source, device, dtype, lora=lora, cpu_offload=offload, **rest)

    def for_jobs(self, jobs: Iterable[Job]) -> LoadConfig:
        """Return the same with those parts alone that the jobs need, where that can be known."""
        if self.source.opened is None:
            return self
        calls = ({"prompt": job.prompt, **job.call} for job in jobs)
        return replace(self, parts=modular_source.parts_of(self.source.opened, calls))


def pick_device(name: str) -> Any:
    """Return the torch device of ``--device``; ``auto`` prefers an accelerator.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        DitAttnError: no such device on this machine.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = _no_cuda() if not torch.cuda.is_available() else f"this machine has {torch.cuda.device_count()}"
        raise DitAttnError(f"--device {name}: no such GPU ({why}); use --device cpu, or see `dit-attn doctor`")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DitAttnError("--device mps: no Apple GPU here; use --device cpu")
    return device


def pick_dtype(name: str, source: Source, device: Any) -> Any:
    """Return the torch dtype of ``--dtype``; ``auto`` is float32 on a CPU and for embedded models, else bfloat16."""
    import torch

    if name == "auto":
        small = device.type == "cpu" or source.kind == "embedded"
        return torch.float32 if small else torch.bfloat16
    return getattr(torch, _DTYPES.get(name, name))


def parse_loras(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Parse ``--lora``: a path, org/name, or JSON (``lora_id``, ``lora_scale``, ``weight_name``, ``adapter_name``).

    Raises:
        DitAttnError: malformed JSON, unknown key, missing folder, or peft is not installed.
    """
    import importlib.util

    keys = ("lora_id", "lora_scale", "adapter_name", "weight_name")
    out = []
    for position, text in enumerate(texts):
        data: Any = {"lora_id": text}
        if text.lstrip().startswith("{"):
            try:
                data = files.parse_json(text)
            except ValueError as error:
                raise DitAttnError(f'--lora is not JSON ({error}); write \'{{"lora_id": "org/name"}}\'') from error
        for key in data:
            if key not in keys:
                raise unknown("key of --lora", key, keys)
        if not isinstance(data.get("lora_id"), str):
            raise DitAttnError(f"--lora {shorten(text)} has no lora_id; give the adapter's path or org/name")
        scale = data.get("lora_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise DitAttnError(f"--lora lora_scale must be a number, got {shorten(scale)}")
        path = files.user_path(data["lora_id"], "--lora")
        if not path.exists() and (data["lora_id"].count("/") != 1 or path.suffix == ".safetensors"):
            raise DitAttnError(f"--lora {data['lora_id']}: there is no such file or folder, and it is not org/name")
        out.append({"adapter_name": f"lora_{position}", "weight_name": None, **data, "lora_scale": float(scale)})
    if out and importlib.util.find_spec("peft") is None:
        raise DitAttnError("--lora needs the library peft, which is not installed: `pip install 'dit-attn[lora]'`")
    return out


def quiet(show_progress: bool) -> None:
    """Silence the libraries; bars of loading only where they are wanted."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="huggingface_hub")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    # It logs every error that it raises, with a traceback for each block around it.
    logging.getLogger("diffusers.modular_pipelines.modular_pipeline").setLevel(logging.CRITICAL)
    if not show_progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def load_pipeline(config: LoadConfig, bar: bool = False) -> Any:
    """Load the pipeline onto its device, adapters and offloading included; it is not compiled yet.

    Args:
        config: what to load.
        bar: let the pipeline draw a bar over its steps, on terminals.

    Raises:
        DitAttnError: weights that cannot be read, out of memory, an adapter or backend that does not fit.
    """
    pipe = _read(config)
    _adapters(pipe, config.lora)
    for wanted, name in ((config.vae_tiling, "enable_tiling"), (config.vae_slicing, "enable_slicing")):
        if wanted and hasattr(getattr(pipe, "vae", None), name):
            getattr(pipe.vae, name)()
    if config.attention_backend is not None:
        _backend(pipe, config.attention_backend)
    _place(pipe, config)
    show_steps(pipe, "steps", bar)
    return pipe


def show_steps(pipe: Any, desc: str, bar: bool = True) -> None:
    """Let a pipeline draw a bar over its steps, on terminals.

    Args:
        pipe: the pipeline.
        desc: what the steps are of.
        bar: ``False`` for none at all.
    """
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=not (bar and on_terminal()), leave=False, position=1, desc=desc)


def compile_pipeline(pipe: Any, arguments: dict[str, Any] | None) -> None:
    """Compile the repeated blocks of every transformer, once methods are enabled. ``None`` does nothing.

    Raises:
        DitAttnError: arguments ``torch.compile`` does not take.
    """
    if arguments is None:
        return
    for name in COMPONENTS:
        model = getattr(pipe, name, None)
        if model is None:
            continue
        try:
            if getattr(model, "_repeated_blocks", None):
                model.compile_repeated_blocks(**{"fullgraph": True, **arguments})
            else:
                model.compile(**arguments)
        except (TypeError, RuntimeError, ValueError) as error:
            raise DitAttnError(f"--compile {json.dumps(arguments)} cannot be used ({reason(error)})") from error


def commit_of(source: Source) -> str | None:
    """Return the commit of a Hub model that is loaded now: the name of its snapshot folder."""
    path = cached_index(source.path, source.revision) if source.kind == "hub" else None
    return path.parent.name if path is not None else None


def _read(config: LoadConfig) -> Any:
    import torch

    source = config.source
    if source.kind == "embedded":
        from dit_attn import models

        return models.load(source.name, config.dtype)
    known = {"revision": source.revision, "variant": config.variant}
    try:
        if source.opened is not None:
            place = (source.opened, source.path, source.revision)
            return modular_source.load(*place, config.parts, config.dtype, config.variant)
        return source.pipeline.from_pretrained(
            source.path, torch_dtype=config.dtype, **{key: value for key, value in known.items() if value}
        )
    except torch.OutOfMemoryError as error:
        raise DitAttnError(f"{source.name} does not fit in memory; try --dtype bf16 or --cpu-offload model") from error
    except ImportError as error:
        raise DitAttnError(f"{source.name} needs a library that is not installed ({reason(error)})") from error
    except Exception as error:  # what diffusers raises for damaged files is any exception
        raise DitAttnError(
            f"{source.name} cannot be loaded ({reason(error)}); check that its files are complete and that --variant "
            "and --revision exist"
        ) from error


def _check_takes_adapters(texts: Sequence[str], pipeline: type) -> None:
    if texts and not hasattr(pipeline, "load_lora_weights"):
        raise DitAttnError(f"{pipeline.__name__} takes no LoRA adapters; leave out --lora")


def _adapters(pipe: Any, texts: Sequence[str]) -> None:
    specs = parse_loras(texts)
    _check_takes_adapters(texts, type(pipe))
    if any(not Path(spec["lora_id"]).expanduser().exists() for spec in specs):
        go_offline_where_there_is_no_hub()
    for spec in specs:
        try:
            pipe.load_lora_weights(spec["lora_id"], adapter_name=spec["adapter_name"], weight_name=spec["weight_name"])
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise DitAttnError(
                f"--lora {spec['lora_id']} cannot be loaded ({reason(error)}); it must be made for this model"
            ) from error
    if specs:
        names = [spec["adapter_name"] for spec in specs]
        pipe.set_adapters(names, adapter_weights=[spec["lora_scale"] for spec in specs])


def _backend(pipe: Any, name: str) -> None:
    model = getattr(pipe, "transformer", None)
    if model is None or not hasattr(model, "set_attention_backend"):
        raise DitAttnError(f"{type(pipe).__name__} has no choice of attention backends; leave out --attention-backend")
    try:
        model.set_attention_backend(name)
    except (ValueError, ImportError, RuntimeError, NotImplementedError, KeyError) as error:
        raise DitAttnError(f"--attention-backend {shorten(name)} cannot be used ({reason(error)})") from error


def _place(pipe: Any, config: LoadConfig) -> None:
    import torch

    offload, device = config.cpu_offload, config.device
    try:
        if offload and config.source.opened is not None:
            modular_source.offload(pipe, offload, device)
        elif offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "group":
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
        else:
            pipe.to(device)
    except torch.OutOfMemoryError as error:
        raise DitAttnError(f"the model does not fit on {device}; try --cpu-offload model or --dtype bf16") from error
    except NotImplementedError as error:  # parts of another class than their weights stay without any
        raise DitAttnError(
            f"{type(pipe).__name__} has parts without weights ({reason(error)}); check model_index.json and the weights"
        ) from error


def _no_cuda() -> str:
    import torch

    return "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or GPU found"
