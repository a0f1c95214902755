"""What a model is, read from its configuration files alone: a command is checked before weights are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dit_attn import files
from dit_attn.cli import modular_source
from dit_attn.cli.built_in_shape import SHAPES, BuiltInShape, built_in_shape
from dit_attn.errors import DitAttnError, cut, reason, shorten, unknown

SAMPLE, SAMPLES = 1 << 16, 16  # bytes, and how many such pieces of a large file are looked at


@dataclass(frozen=True)
class Source:
    """A model before it is loaded.

    Attributes:
        name: as the user wrote it.
        kind: ``"embedded"``, ``"folder"`` or ``"hub"``.
        path: what ``from_pretrained`` takes.
        revision: branch, tag or commit of a Hub model, or ``None``.
        pipeline: the pipeline's class.
        transformer: stands for it: class name, ``config``, and ``pair``, whether there is a second one;
            ``None`` for pipelines without one.
        defaults: arguments every call needs (embedded models and trainings of them).
        fingerprint: changes when the files of an embedded model or a folder change; the revision otherwise.
        components: ``model_index.json``.
        opened: a modular pipeline without weights, see :mod:`~dit_attn.cli.modular_source`; ``None`` for others.
    """

    name: str
    kind: str
    path: str
    revision: str | None
    pipeline: Any
    transformer: Any
    defaults: dict[str, Any]
    fingerprint: str
    components: dict[str, Any] = field(repr=False)
    opened: Any = field(default=None, repr=False)

    @cached_property
    def without_weights(self) -> Any:
        """The pipeline without weights, see :func:`skeleton`."""
        if self.opened is not None:
            return modular_source.without_weights(self.opened, self.path, self.revision)
        return skeleton(self)

    @cached_property
    def with_tokenizers(self) -> Any:
        """The same with its tokenizers, and the configurations of its text encoders: what ``dit_attn.spans`` needs."""
        return self.without_weights if self.opened is not None else skeleton(self, tokenizers=True)


def describe(name: str, revision: str | None = None, variant: str | None = None, modular: bool = False) -> Source:
    """Find a model and read its configuration.

    Args:
        name: embedded model, local folder, or ``org/name``.
        revision: branch, tag or commit of a Hub model.
        variant: weight variant, refused where there is none.
        modular: whether a modular pipeline will do.

    Raises:
        DitAttnError: there is no such model, or it is not a diffusers pipeline this diffusers knows.
    """
    kind, path, defaults = locate(name, revision, variant)
    index, opened = _model_index(name, kind, path, revision), None
    if index is None:
        if not modular:
            raise DitAttnError(
                f"{shorten(name)} is a modular pipeline ({modular_source.INDEX}), which this command does not take; "
                "generate, edit, compare, inspect and explain do"
            )
        opened = modular_source.open_pipeline(name, path, revision)
        transformer = modular_source.transformer_of(opened, path, revision)
    else:
        transformer = _transformer(path, revision, index)
    return Source(
        name=name,
        kind=kind,
        path=path,
        revision=revision,
        pipeline=_pipeline_class(name, index) if index is not None else type(opened),
        transformer=transformer,
        defaults=defaults,
        fingerprint=revision or "main" if kind == "hub" else fingerprint(Path(path)),
        components=index or {},
        opened=opened,
    )


def skeleton(source: Source, tokenizers: bool = False) -> Any:
    """The pipeline without weights: transformer and autoencoder on the meta device, everything else left out.

    Args:
        source: the model.
        tokenizers: load these, and stand-ins for the text encoders that have their configuration.
    """
    import inspect

    import diffusers
    from accelerate import init_empty_weights

    parts: dict[str, Any] = {}
    for name in inspect.signature(source.pipeline.__init__).parameters:
        library, kind = component(source.components, name) if name != "self" else (None, None)
        cls = getattr(diffusers, str(kind), None) if library == "diffusers" else None
        if name.startswith(("transformer", "vae")) and cls is not None:
            config = cls.load_config(source.path, subfolder=name, revision=source.revision)
            with init_empty_weights():
                parts[name] = cls.from_config(config)
        elif tokenizers and library == "transformers" and name.startswith(("tokenizer", "text_encoder", "processor")):
            parts[name] = _text_component(source, name, str(kind))
        elif name in source.components and name != "self":
            value = source.components[name]
            parts[name] = None if isinstance(value, (list, tuple)) else value
    try:
        return source.pipeline(**parts)
    except (AttributeError, ImportError, NameError, TypeError, ValueError):
        return _bare(source.pipeline, parts)  # it looks into a part that was left out, or needs an optional library


def _text_component(source: Source, name: str, kind: str) -> Any:
    """A tokenizer or processor of a model, or an empty module that has the configuration of a text encoder."""
    import torch
    import transformers

    place = {"subfolder": name, "revision": source.revision}
    if not name.startswith("text_encoder"):
        return getattr(transformers, kind).from_pretrained(source.path, **place)
    config = transformers.AutoConfig.from_pretrained(source.path, **place)
    facts = {"config": config, "dtype": torch.float32, "device": torch.device("cpu")}
    return type(kind, (torch.nn.Module,), facts)()


def _bare(pipeline: Any, parts: dict[str, Any]) -> Any:
    """A pipeline that was never initialised: its parts and the compression of its autoencoder, nothing else."""
    pipe = pipeline.__new__(pipeline)
    pipe.__dict__.update(parts)
    vae = parts.get("vae")
    for name in ("spatial", "temporal"):
        for owner in (vae, getattr(vae, "config", None)):
            for key in (f"scale_factor_{name}", f"{name}_compression_ratio"):
                value = getattr(owner, key, None)
                if isinstance(value, int):
                    pipe.__dict__[f"vae_scale_factor_{name}"] = value
    return pipe


def locate(name: str, revision: str | None = None, variant: str | None = None) -> tuple[str, str, dict[str, Any]]:
    """Find a model by its name alone; nothing heavy is imported.

    Args:
        name, revision, variant: as for :func:`describe`.

    Returns:
        ``kind``, ``path`` and ``defaults`` of :class:`Source`.

    Raises:
        DitAttnError: there is no such model, or a folder is none; a revision or variant of an embedded one.
    """
    from dit_attn import models

    entries = models.available()
    if name in entries:
        if revision:
            raise DitAttnError(
                f"--revision {shorten(revision)} is for models of the Hub; {name} is embedded: leave it out"
            )
        if variant:
            raise DitAttnError(
                f"--variant {shorten(variant)}: {name} is embedded and has one kind of weights; leave it out"
            )
        return "embedded", str(entries[name].folder), models.call_defaults(name)
    if not name:
        raise DitAttnError("--model is empty; give an embedded model, a local folder, or org/name")
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # pathlib raises for names that no file can have
        if not any((folder / index).is_file() for index in ("model_index.json", modular_source.INDEX)):
            raise DitAttnError(
                f"{folder} is not a diffusers pipeline (no model_index.json); give the folder that holds it"
            )
        return "folder", str(folder), _trained_defaults(folder)
    if os.path.exists(folder):
        raise DitAttnError(f"--model {name} is a file; give the folder that holds model_index.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return "hub", name, {}
    if "/" in name or name.startswith((".", "~")):
        raise DitAttnError(f"--model {cut(name, 100)}: there is no such folder; check the path")
    shape = built_in_shape(name)
    public = f"Or give a local folder, or org/name on the Hugging Face Hub{f', e.g. {shape.example}' if shape else ''}."
    raise unknown("model", name, entries, public)


def _trained_defaults(folder: Path) -> dict[str, Any]:
    """Call arguments of a folder that ``dit-attn train`` wrote: those of the embedded model it is a training of."""
    from dit_attn import models
    from dit_attn.models.registry import MODELS

    try:
        name = files.parse_json((folder / "training.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # any other pipeline
    return models.call_defaults(name) if name in MODELS else {}


def _model_index(name: str, kind: str, path: str, revision: str | None) -> dict[str, Any] | None:
    """``model_index.json``, ``None`` for a modular pipeline, which has another index."""
    from diffusers import DiffusionPipeline

    if kind == "folder" and not (Path(path) / "model_index.json").is_file():
        return None

    if kind == "embedded" and not (Path(path) / "model_index.json").is_file():
        raise DitAttnError(f"{path} is not a diffusers pipeline (no model_index.json); reinstall dit-attn")
    offline = kind == "hub" and go_offline_where_there_is_no_hub()
    try:
        return dict(DiffusionPipeline.load_config(path, revision=revision, local_files_only=offline))
    except (OSError, ValueError) as error:
        if kind == "hub" and _has_modular_index(name, revision):
            return None
        if offline:
            raise _unreachable(name) from error
        if kind == "hub":
            raise DitAttnError(
                f"cannot get {shorten(name)} from the Hugging Face Hub ({reason(error)}); check the name, --revision "
                "and the network, or give a local folder. It is no embedded model and no folder here"
            ) from error
        raise DitAttnError(f"model_index.json in {path} cannot be read ({reason(error)}); download it again") from error


def _has_modular_index(name: str, revision: str | None) -> bool:
    """Whether a Hub model is known to be one of blocks: its index is in the local cache, or the Hub gives it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return bool(hf_hub_download(name, modular_source.INDEX, revision=revision))
    except (HfHubHTTPError, OSError, ValueError):
        return False


def check_reachable(name: str, revision: str | None = None) -> None:
    """Refuse a Hub model that is not in the local cache while the Hub cannot be reached; nothing heavy is imported.

    Raises:
        DitAttnError: so it is.
    """
    try:
        cached = cached_index(name, revision)
    except ValueError:  # no name of a repository: the Hub's own message is better
        return
    if cached is None and go_offline_where_there_is_no_hub():
        raise _unreachable(name)


def cached_index(name: str, revision: str | None = None) -> Path | None:
    """Return the index of a Hub model in the local cache, ``None`` where it is not there.

    Raises:
        ValueError: that is no name of a repository.
    """
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(name, x, revision=revision) for x in ("model_index.json", modular_source.INDEX)]
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _unreachable(name: str) -> DitAttnError:
    return DitAttnError(
        f"{shorten(name)} is not in the local cache and the Hugging Face Hub cannot be reached; check the network (or "
        "HF_HUB_OFFLINE), or give a local folder. It is no embedded model and no folder here"
    )


def _pipeline_class(name: str, index: dict[str, Any]) -> Any:
    import diffusers

    wanted = cut(str(index.get("_class_name")), 100)
    try:
        cls = getattr(diffusers, wanted, None)
    except Exception as error:  # diffusers imports it now, and with it what it needs
        raise DitAttnError(f"{name} needs the pipeline {wanted}, which cannot be imported ({reason(error)})") from error
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise DitAttnError(
            f"{name} needs the pipeline {wanted}, which diffusers {diffusers.__version__} does not have; "
            "update diffusers with `pip install -U diffusers`"
        )
    return cls


def component(index: dict[str, Any], name: str) -> tuple[str | None, str | None]:
    """Library and class of a part of a pipeline, by its ``model_index.json``; ``None`` for a part that is left out.

    Raises:
        DitAttnError: the entry of a model's part is no such pair.
    """
    value = index.get(name)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(x is None or isinstance(x, str) for x in value):
        return value[0], value[1]
    if value is not None and name.startswith(("transformer", "vae")):
        raise DitAttnError(
            f"model_index.json: {name} must be a pair of library and class, got {shorten(value)}; download it again"
        )
    return None, None


def _transformer(path: str, revision: str | None, index: dict[str, Any]) -> Any:
    import diffusers

    library, kind = component(index, "transformer")
    cls = getattr(diffusers, str(kind), None) if library == "diffusers" else None
    if cls is None:
        return None
    try:
        config = cls.load_config(path, subfolder="transformer", revision=revision)
    except (OSError, ValueError) as error:
        raise DitAttnError(
            f"transformer/config.json of {path} cannot be read ({reason(error)}); download the model again"
        ) from error
    stand_in = type(str(kind), (SimpleNamespace,), {})
    return stand_in(config=dict(config), pair=component(index, "transformer_2")[0] is not None)


def fingerprint(place: Path) -> str:
    """Names, sizes and samples of a file or of a folder: cheap, the same for a copy, another for new weights."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(json.dumps([path.relative_to(place).as_posix(), size]).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(start)
                found.update(file.read(SAMPLE))
    return found.hexdigest()[:16]


def go_offline_where_there_is_no_hub() -> bool:
    """Return whether the Hub is out of reach; then only the cache is used, instead of retrying for minutes."""
    from huggingface_hub import constants

    from dit_attn import hub

    offline = hub.is_offline()
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or offline
    return offline


def offline_shape(
    name: str, revision: str | None = None, variant: str | None = None, configs: Collection[str] | None = None
) -> BuiltInShape | None:
    """Return the built-in shape of a Hub model that is neither cached nor reachable, ``None`` for what can be read.

    Args:
        name, revision, variant: of the model, as for :func:`locate`.
        configs: rows of shapes that will do; default: all.

    Raises:
        DitAttnError: it cannot be read, and there is no such shape.
    """
    kind, path, _ = locate(name, revision, variant)
    if kind != "hub":
        return None
    try:
        check_reachable(path, revision)
    except DitAttnError as error:
        fitting = [one for one in SHAPES if configs is None or one.config in configs]
        shape = built_in_shape(path)
        if shape not in fitting:
            known = ", ".join(one.title for one in fitting)
            raise DitAttnError(f"{error}. Shapes that are built in: {known}") from error
        return shape
    return None
