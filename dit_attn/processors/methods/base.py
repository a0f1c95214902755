"""Base of every method: a frozen set of settings that can be checked, printed, saved and shared.

A ``Method`` holds no tensor and no state of a run; that lives in the run
(:class:`~dit_attn.processors.core.run_state.RunState`) and its layers.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dit_attn import files
from dit_attn.errors import DitAttnError, cut, shorten, unknown
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.methods.fields import check_fields

FILE_NAME = "dit_attn_method.json"
REGISTRY: dict[str, type[Method]] = {}
"""Every method by slug; a subclass with a slug of its own enters when it is defined."""


def setting(default: Any, help: str, *, low: float | None = None, high: float | None = None, **extra: Any) -> Any:
    """Declare a field of a method with its help text and its inclusive numeric range.

    Args:
        default: default value (immutable).
        help: one line for documentation and the command line.
        low: smallest allowed value.
        high: largest allowed value.
        extra: further metadata, e.g. ``choices=(...)``.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, **extra})


def resolve_count(amount: float | int, total: int) -> int:
    """Return ``amount`` of ``total`` as a count in [0, total]: a float is a fraction (rounded), an int is absolute."""
    count = round(amount * total) if isinstance(amount, float) else amount
    return max(0, min(int(count), total))


@dataclass(frozen=True)
class Phase:
    """A kind of step in a method's run.

    Attributes:
        name: e.g. ``"refresh"`` or ``"sparse"``.
        step: a step of the run, from 0, that shows it.
        count: steps of this kind in one period of the method.
    """

    name: str
    step: int
    count: int = 1


@dataclass(frozen=True)
class Method:
    """Base of every method.

    Class attributes:
        slug: name used by ``enable(pipe, slug)`` and on the command line.
        role: methods of one role conflict. ``"sparse"``: decides which keys are attended to; ``"guidance"``: uses the
            perturbed pass of a step.
        min_tokens: shortest sequence that the method is worth: 0, except where its point is speed.
        sites: where it applies: ``"self"`` (self and joint attention), ``"cross"`` (to the text), ``"image"`` (cross
            attention to a conditioning image, where a checkpoint has it), or ``"text"`` (cross attention to the text
            where the family has it, else joint attention). A family without such layers is refused.
        cache_on_host: whether what :meth:`cache_bytes` counts lies in main memory.
    """

    slug: ClassVar[str] = ""
    role: ClassVar[str] = ""
    min_tokens: ClassVar[int] = 0
    sites: ClassVar[tuple[str, ...]] = ("self",)

    @property
    def cache_on_host(self) -> bool:
        """Whether the cache lies in main memory."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("slug"):
            REGISTRY[cls.slug] = cls

    def __post_init__(self) -> None:
        check_fields(self)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add this method's part to ``request`` for one attention call, or decline it (``request.decline(reason)``)."""
        raise NotImplementedError

    def positions(self, site: PositionSite) -> PositionMap | tuple[PositionMap, ...] | None:
        """Return where the visual tokens of a layer are placed for its rotary embedding, ``None`` for where they are.

        Asked before the layer runs, for every call, in plain and perturbed passes alike. The maps of several methods
        are applied one after another, in the order in which the methods are enabled.

        Args:
            site: the layer and its visual tokens.
        """
        return None

    @property
    def moves_positions(self) -> bool:
        """Whether :meth:`positions` is to be asked; models without rotary tables are refused then."""
        return type(self).positions is not Method.positions

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse a model these settings do not fit; called before anything is changed.

        Args:
            transformer: class name.
            layers: number of attention layers that can be wrapped.

        Raises:
            DitAttnError: they do not fit.
        """

    def check_heads(self, transformer: str, heads: Sequence[int | None]) -> None:
        """Refuse settings for single heads that do not fit a model; called after :meth:`check_model`.

        Args:
            transformer: class name.
            heads: number of query heads of every layer that can be wrapped, ``None`` where it does not say.

        Raises:
            DitAttnError: they do not fit.
        """

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Return the bytes one layer stores for one sample from step to step.

        Args:
            tokens: visual tokens.
            heads, head_dim: of the layer.
            element: bytes of an activation.
        """
        return 0

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return the kinds of sparse steps in a run, in the order in which they must be run to be timed.

        Args:
            steps: denoising steps of the run.
        """
        return ()

    def synchronized(self) -> Method:
        """Return the method with all layers in the same phase at every step, itself where they are anyway."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with the slug under ``"method"``."""
        return {"method": self.slug, **{k: _plain(v) for k, v in dataclasses.asdict(self).items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Method:
        """Return the method described by :meth:`to_dict`.

        Raises:
            DitAttnError: unknown method or field, or a value out of range.
        """
        if not isinstance(data, dict) or "method" not in data:
            raise DitAttnError('method settings are an object with the slug under "method"; save them again')
        settings = dict(data)
        cls = method_class(settings.pop("method"))
        names = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name in settings:
            if name not in names:
                raise unknown(f"setting of {cls.slug}", name, names)
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the settings to ``folder`` as JSON, atomically; returns the file.

        Raises:
            DitAttnError: the folder is a file, cannot be made or takes no more bytes.
        """
        path = Path(folder).expanduser() / FILE_NAME
        with files.report_os_error(f"save {self.slug} to {path.parent}", "give another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, self.to_dict(), indent=2)
        return path

    @staticmethod
    def from_pretrained(source: str | Path) -> Method:
        """Read settings from a folder, a JSON file, or a repository of the Hugging Face Hub (``org/name``).

        Raises:
            DitAttnError: nothing readable there.
        """
        path = files.user_path(source, "method")
        if path.is_dir():
            path = path / FILE_NAME
            if not path.is_file():
                raise DitAttnError(f"{path.parent} has no {FILE_NAME} in it; give a folder that save_pretrained wrote")
        if not path.is_file():
            path = _download(str(source))
        try:
            data = files.parse_json(path.read_bytes())
        except ValueError as error:
            raise DitAttnError(f"{path} is not JSON ({error}); save it again with save_pretrained") from error
        try:
            return Method.from_dict(data)
        except DitAttnError as error:
            raise DitAttnError(f"{path}: {error}") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the settings to a repository of the Hugging Face Hub; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        body = (json.dumps(self.to_dict(), indent=2) + "\n").encode()
        return str(api.upload_file(path_or_fileobj=body, path_in_repo=FILE_NAME, repo_id=repo_id, **kwargs))


def is_place(name: str) -> bool:
    """Return whether a text names saved settings (a file, a folder, ``org/name``) rather than a slug."""
    return "/" in name or name.endswith(".json") or os.path.isdir(name)


def method_class(slug: object) -> type[Method]:
    """Return the class behind a slug.

    Raises:
        DitAttnError: no such method.
    """
    if not isinstance(slug, str) or slug not in REGISTRY:
        raise unknown("method", slug, REGISTRY)
    return REGISTRY[slug]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _download(repo: str) -> Path:
    if repo.endswith(".json"):
        raise DitAttnError(f"there is no file {cut(repo, 100)} with method settings; check the path")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from dit_attn import hub

    try:
        return Path(hf_hub_download(repo, FILE_NAME, local_files_only=hub.is_offline()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DitAttnError(
            f"no method settings at {shorten(repo)}: there is no such folder, and no reachable Hub repository with "
            f"them ({type(error).__name__}); check the path or the repository's name"
        ) from error
