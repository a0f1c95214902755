"""Saved methods: settings as JSON and learned tensors as safetensors, in a folder or a repository of the Hub."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, cut, shorten
from dit_attn.processors.core.parameters import LearnedModules

FILE_NAME = "dit_attn_method.json"
TENSORS = {
    "transformer": "dit_attn_method.safetensors",
    "transformer_2": "dit_attn_method_2.safetensors",
    "transformer_ref": "dit_attn_method_ref.safetensors",
    "unconditional_transformer": "dit_attn_method_unconditional.safetensors",
}
"""File of the learned tensors by the transformer's name in the pipeline."""


@dataclass(frozen=True)
class Origin:
    """What learned tensors were trained for; stored in their file.

    Attributes:
        method: slug.
        transformer: class name.
        layers: number of attention layers that methods apply to.
    """

    method: str
    transformer: str
    layers: int


def dump_tensors(modules: LearnedModules, name: str, origin: Origin) -> bytes:
    """Return the learned tensors of a method as a safetensors file.

    Args:
        modules: those of a transformer.
        name: the method's name among them.
        origin: what they were trained for.

    Raises:
        DitAttnError: they are not in memory.
    """
    return dump_state(modules.tensors(name), origin)


def dump_state(tensors: dict[str, torch.Tensor], origin: Origin) -> bytes:
    """Return tensors by layer and name as a safetensors file.

    Args:
        tensors: of one method, as :meth:`LearnedModules.tensors` has them.
        origin: what they were made for.
    """
    from safetensors.torch import save

    about = {"format": "pt", **{key: str(value) for key, value in asdict(origin).items()}}
    return save(tensors, metadata=about)


def load_tensors(source: str, component: str, origin: Origin) -> dict[str, torch.Tensor]:
    """Read the learned tensors of a method.

    Args:
        source: a folder, or ``org/name`` on the Hub.
        component: name of the transformer in its pipeline.
        origin: what they shall be for.

    Raises:
        DitAttnError: there are none, or they were trained for something else.
    """
    from safetensors import safe_open

    file = locate(source, TENSORS[component])
    tensors = files.read_weights(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata() or {}
    given = [about.get(key, "") for key in asdict(origin)]
    wanted = [str(value) for value in asdict(origin).values()]
    if given != wanted:
        raise DitAttnError(
            f"{shorten(source)} has tensors of {_describe(given)}, which do not fit {_describe(wanted)}; give the "
            "folder that was saved with this method on this model"
        )
    return tensors


def _describe(origin: list[str]) -> str:
    method, transformer, layers = (cut(value, 60) or "?" for value in origin)
    return f"{method} for {transformer} with {layers} layers"


def read_settings(source: str | Path) -> tuple[dict[str, Any], Path]:
    """Read saved settings, whose ``"weights"`` become the source where learned tensors lie beside them.

    A file ``NAME.json`` may have them in ``NAME.safetensors``. What it says under ``"about"`` is left out.

    Args:
        source: a folder, a JSON file, or ``org/name`` on the Hub.

    Returns:
        The settings, and the file they are from.

    Raises:
        DitAttnError: nothing readable there.
    """
    given = files.user_path(source, "method")
    path = given if given.is_file() else locate(str(source), FILE_NAME)
    try:
        data = files.parse_json(path.read_bytes())
    except ValueError as error:
        raise DitAttnError(f"{path} is not JSON ({error}); save it again with save_pretrained") from error
    if isinstance(data, dict):
        data.pop("about", None)
    if isinstance(data, dict) and data.get("weights") is not None:
        own = given.with_suffix(".safetensors")
        if given.is_file() and data["weights"] == own.name != TENSORS["transformer"]:
            return {**data, "weights": str(own)}, path
        if data["weights"] != TENSORS["transformer"]:
            raise DitAttnError(
                f"{path}: a saved method has its tensors beside it, in {TENSORS['transformer']}, and this one names "
                f"{shorten(data['weights'])}; give weights= in Python instead"
            )
        data["weights"] = str(given.parent if given.is_file() else source)
    return data, path


def contents(settings: dict[str, Any], tensors: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of a saved method by name.

    Args:
        settings: of the method.
        tensors: its files of learned tensors by name; the settings name them.
    """
    if "weights" in settings:
        settings = {**settings, "weights": TENSORS["transformer"] if tensors else None}
    return {**tensors, FILE_NAME: (json.dumps(settings, indent=2) + "\n").encode()}


def write(folder: str | Path, slug: str, parts: dict[str, bytes]) -> Path:
    """Write files to a folder, or none of them where one cannot be written; returns that of the settings.

    Args:
        folder: made where it is missing.
        slug: of the method, for messages.
        parts: contents by file name.

    Raises:
        DitAttnError: the folder is a file, cannot be made or takes no more bytes.
    """
    place = Path(folder).expanduser()
    with (
        files.report_os_error(f"save {slug} to {place}", "give another folder"),
        files.atomic_folder(place) as staging,
    ):
        for name, content in parts.items():
            (staging / name).write_bytes(content)
    return place / FILE_NAME


def upload(repo_id: str, slug: str, parts: dict[str, bytes], **kwargs: Any) -> str:
    """Upload files to a repository of the Hub in one commit; returns the commit's address.

    Args:
        repo_id: ``org/name``, made where it is missing.
        slug: of the method, for the commit's message.
        parts: contents by path.
        kwargs: of ``HfApi.create_commit``, e.g. ``revision``.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    operations = [CommitOperationAdd(name, content) for name, content in parts.items()]
    return str(api.create_commit(repo_id, operations, **{"commit_message": f"Upload {slug}", **kwargs}))


def saved_tensors(source: str) -> dict[str, bytes]:
    """Return the files of learned tensors of a saved method, by name.

    Raises:
        DitAttnError: there are none.
    """
    place = files.user_path(source, "weights")
    names = [name for name in TENSORS.values() if (place / name).is_file()] or [TENSORS["transformer"]]
    return {name: locate(source, name).read_bytes() for name in names}


def locate(source: str, name: str) -> Path:
    """Return a file of a saved method, downloaded where it is on the Hub.

    Args:
        source: a folder, or ``org/name`` or ``org/name/folder`` on the Hub.
        name: of the file.

    Raises:
        DitAttnError: there is no such file.
    """
    place = files.user_path(source, "method")
    if place.suffix == ".safetensors":
        if not place.is_file() or name != TENSORS["transformer"]:
            raise DitAttnError(f"there are no tensors {cut(source, 100)} of {name}; check the path")
        return place
    if place.is_dir():
        if not (place / name).is_file():
            raise DitAttnError(f"{place} has no {name} in it; give a folder that save_pretrained wrote")
        return place / name
    if source.endswith(".json"):
        raise DitAttnError(f"there is no file {cut(source, 100)} with method settings; check the path")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from dit_attn import hub

    repo, folder = "/".join(source.split("/")[:2]), source.split("/")[2:]
    try:
        return Path(hf_hub_download(repo, "/".join([*folder, name]), local_files_only=hub.is_offline()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = "method settings" if name == FILE_NAME else f"{name}"
        raise DitAttnError(
            f"no {what} at {shorten(source)}: there is no such folder, and no reachable Hub repository with "
            f"{'them' if name == FILE_NAME else 'it'} ({type(error).__name__}); check the path or the repository's name"
        ) from error
