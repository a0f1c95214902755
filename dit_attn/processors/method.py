"""What a method is: a frozen set of settings that can be checked, printed, saved and shared.

A ``Method`` holds no tensor and no state of a run; that lives in the :class:`~dit_attn.processors.session.Session`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dit_attn.errors import DitAttnError, unknown
from dit_attn.processors.fields import check_fields

if TYPE_CHECKING:
    from dit_attn.processors.executor import AttentionCall, Request

FILE_NAME = "dit_attn_method.json"
_REGISTRY: dict[str, type[Method]] = {}


def setting(default: Any, help: str, *, low: float | None = None, high: float | None = None, **extra: Any) -> Any:
    """A field of a method with its help text and its inclusive numeric range.

    Args:
        default: default value (immutable).
        help: one line for documentation and the command line.
        low: smallest allowed value.
        high: largest allowed value.
        extra: further metadata, e.g. ``choices=(...)``.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, **extra})


def share(amount: float | int, total: int) -> int:
    """``amount`` of ``total`` as a count in [0, total]: a float is a fraction (rounded), an int is absolute."""
    count = round(amount * total) if isinstance(amount, float) else amount
    return max(0, min(int(count), total))


@dataclass(frozen=True)
class Method:
    """Base of every method.

    Class attributes:
        slug: name used by ``enable(pipe, slug)`` and on the command line.
        role: methods of one exclusive role conflict (``"reader"`` decides which keys are read: one per session).
    """

    slug: ClassVar[str] = ""
    role: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("slug"):
            _REGISTRY[cls.slug] = cls

    def __post_init__(self) -> None:
        check_fields(self)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add this method's part to ``request`` for one attention call, or decline it (``request.decline(reason)``)."""
        raise NotImplementedError

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse a model these settings do not fit; asked before anything is changed.

        Args:
            transformer: class name.
            layers: attention layers that can be touched.

        Raises:
            DitAttnError: they do not fit.
        """

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Bytes one layer keeps for one sample from step to step.

        Args:
            tokens: visual tokens.
            heads, head_dim: of the layer.
            element: bytes of an activation.
        """
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON values, with the slug under ``"method"``."""
        return {"method": self.slug, **{k: _plain(v) for k, v in dataclasses.asdict(self).items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Method:
        """The method described by :meth:`to_dict`.

        Raises:
            DitAttnError: unknown method or field, or a value out of range.
        """
        if not isinstance(data, dict) or "method" not in data:
            raise DitAttnError('settings of a method are an object with its slug under "method"; save them again')
        settings = dict(data)
        cls = method_class(settings.pop("method"))
        names = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name in settings:
            if name not in names:
                raise unknown(f"setting of {cls.slug}", name, names)
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the settings to ``folder`` as JSON, whole or not at all; returns the file.

        Raises:
            DitAttnError: the folder is a file, cannot be made or takes no more bytes.
        """
        path = Path(folder).expanduser() / FILE_NAME
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise DitAttnError(f"cannot save {self.slug} to {path.parent} ({why}); give another folder") from error
        return path

    @staticmethod
    def from_pretrained(source: str | Path) -> Method:
        """Read settings from a folder, a JSON file, or a repository of the Hugging Face Hub (``org/name``).

        Raises:
            DitAttnError: nothing readable there.
        """
        path = Path(source).expanduser()
        if path.is_dir():
            path = path / FILE_NAME
            if not path.is_file():
                raise DitAttnError(f"{path.parent} has no {FILE_NAME} in it; give a folder that save_pretrained wrote")
        if not path.is_file():
            path = _download(str(source))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON, or of the text's encoding
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


def methods() -> dict[str, type[Method]]:
    """Every method by slug."""
    import dit_attn.processors.block_sparse  # they register themselves
    import dit_attn.processors.guidance
    import dit_attn.processors.re_ttention
    import dit_attn.processors.rectified_spaattn  # noqa: F401

    return dict(_REGISTRY)


def is_place(name: str) -> bool:
    """Whether a text names saved settings (a file, a folder, ``org/name``) and not a slug."""
    return "/" in name or name.endswith(".json") or Path(name).is_dir()


def method_class(slug: object) -> type[Method]:
    """The class behind a slug.

    Raises:
        DitAttnError: no such method.
    """
    known = methods()
    if not isinstance(slug, str) or slug not in known:
        raise unknown("method", slug, known)
    return known[slug]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _download(repo: str) -> Path:
    if repo.endswith(".json"):
        raise DitAttnError(f"there is no file {repo} with settings of a method; check the path")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from dit_attn.processors import hub

    try:
        return Path(hf_hub_download(repo, FILE_NAME, local_files_only=hub.out_of_reach()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DitAttnError(
            f"no method settings at {repo!r}: there is no such folder, and no reachable Hub repository with them "
            f"({type(error).__name__}); check the path or the repository's name"
        ) from error
