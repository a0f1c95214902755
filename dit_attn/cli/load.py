"""Loading a pipeline for the command line: device, type, adapters, offloading, compilation."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from dit_attn.cli.args import reason
from dit_attn.cli.source import Source, go_offline_where_there_is_no_hub
from dit_attn.errors import DitAttnError, unknown

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(name: str) -> Any:
    """The torch device of ``--device``; ``auto`` prefers an accelerator.

    Raises:
        DitAttnError: no such device on this machine.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DitAttnError(f"unknown --device {name!r}; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = _no_cuda() if not torch.cuda.is_available() else f"this machine has {torch.cuda.device_count()}"
        raise DitAttnError(f"--device {name}: no such GPU ({why}); use --device cpu, or see `dit-attn doctor`")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DitAttnError("--device mps: no Apple GPU here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise DitAttnError(f"--device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def pick_dtype(name: str, source: Source, device: Any) -> Any:
    """The torch dtype of ``--dtype``; ``auto`` is float32 on a CPU and for embedded models, else bfloat16."""
    import torch

    if name == "auto":
        small = device.type == "cpu" or source.kind == "embedded"
        return torch.float32 if small else torch.bfloat16
    return getattr(torch, _DTYPES.get(name, name))


def parse_loras(texts: list[str]) -> list[dict[str, Any]]:
    """``--lora`` values: a path or org/name, or JSON (``lora_id``, ``lora_scale``, ``weight_name``, ``adapter_name``).

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
                data = json.loads(text)
            except json.JSONDecodeError as error:
                raise DitAttnError(f'--lora is not JSON ({error}); write \'{{"lora_id": "org/name"}}\'') from error
        for key in data:
            if key not in keys:
                raise unknown("key of --lora", key, keys)
        if not isinstance(data.get("lora_id"), str):
            raise DitAttnError(f"--lora {text!r} has no lora_id; give the adapter's path or org/name")
        scale = data.get("lora_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise DitAttnError(f"--lora lora_scale must be a number, got {scale!r}")
        path = Path(data["lora_id"]).expanduser()
        if not path.exists() and (data["lora_id"].count("/") != 1 or path.suffix == ".safetensors"):
            raise DitAttnError(f"--lora {data['lora_id']}: there is no such file or folder, and it is not org/name")
        out.append({"adapter_name": f"lora_{position}", "weight_name": None, **data, "lora_scale": float(scale)})
    if out and importlib.util.find_spec("peft") is None:
        raise DitAttnError("--lora needs the library peft, which is not installed: `pip install 'dit-attn[lora]'`")
    return out


def check_machine(options: dict[str, Any], device: Any) -> None:
    """Refuse combinations this machine cannot run.

    Raises:
        DitAttnError: offloading without an accelerator.
    """
    if "cpu_offload" in options and device.type == "cpu":
        raise DitAttnError(
            f"--cpu-offload {options['cpu_offload']} needs a GPU to load onto, and the device is cpu; leave it out"
        )


def check_adapters(options: dict[str, Any], source: Source) -> None:
    """Refuse adapters for a pipeline that takes none.

    Raises:
        DitAttnError: ``--lora`` with such a pipeline.
    """
    _takes_adapters(options.get("lora", []), source.pipeline)


def quiet(show_progress: bool) -> None:
    """Library chatter off; progress bars only for people who watch."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", module="huggingface_hub")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    if not show_progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def load_pipeline(source: Source, options: dict[str, Any], device: Any, dtype: Any) -> Any:
    """The pipeline on its device, adapters loaded, offloading on; not compiled yet.

    Raises:
        DitAttnError: weights that cannot be read, out of memory, an adapter or backend that does not fit.
    """
    pipe = _read(source, options, dtype)
    _adapters(pipe, options.get("lora", []))
    for key, name in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if options.get(key) and hasattr(getattr(pipe, "vae", None), name):
            getattr(pipe.vae, name)()
    if "attention_backend" in options:
        _backend(pipe, options["attention_backend"])
    _place(pipe, options.get("cpu_offload"), device)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False, position=1, desc="steps")
    return pipe


def compile_pipeline(pipe: Any, arguments: dict[str, Any] | None) -> None:
    """``--compile``: the repeated blocks of every transformer, once methods are on. ``None`` does nothing.

    Raises:
        DitAttnError: arguments ``torch.compile`` does not take.
    """
    if arguments is None:
        return
    for name in ("transformer", "transformer_2"):
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
    """The commit of a Hub model that is loaded now: the name of its snapshot folder."""
    from huggingface_hub import try_to_load_from_cache

    if source.kind != "hub":
        return None
    path = try_to_load_from_cache(source.path, "model_index.json", revision=source.revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _read(source: Source, options: dict[str, Any], dtype: Any) -> Any:
    import torch
    from safetensors import SafetensorError

    if source.kind == "embedded":
        from dit_attn import models

        return models.load(source.name, dtype)
    known = {"revision": source.revision, "variant": options.get("variant")}
    try:
        return source.pipeline.from_pretrained(
            source.path, torch_dtype=dtype, **{key: value for key, value in known.items() if value}
        )
    except torch.OutOfMemoryError as error:
        raise DitAttnError(f"{source.name} does not fit in memory; try --dtype bf16 or --cpu-offload model") from error
    except ImportError as error:
        raise DitAttnError(f"{source.name} needs a library that is not installed ({reason(error)})") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DitAttnError(
            f"{source.name} cannot be loaded ({reason(error)}); check that its files are complete and that --variant "
            "and --revision exist"
        ) from error


def _takes_adapters(texts: list[str], pipeline: type) -> None:
    if texts and not hasattr(pipeline, "load_lora_weights"):
        raise DitAttnError(f"{pipeline.__name__} takes no LoRA adapters; leave out --lora")


def _adapters(pipe: Any, texts: list[str]) -> None:
    specs = parse_loras(texts)
    _takes_adapters(texts, type(pipe))
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
        raise DitAttnError(f"--attention-backend {name!r} cannot be used ({reason(error)})") from error


def _place(pipe: Any, offload: str | None, device: Any) -> None:
    import torch

    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "group":
            pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
        else:
            pipe.to(device)
    except torch.OutOfMemoryError as error:
        raise DitAttnError(f"the model does not fit on {device}; try --cpu-offload model or --dtype bf16") from error


def _no_cuda() -> str:
    import torch

    return "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or GPU found"
