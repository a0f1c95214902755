"""Heads that were chosen to be left out, the refitted projections that go with them, and their file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn import api, files
from dit_attn.processors.attach.session import Session
from dit_attn.processors.methods.head_drop import HeadDrop, Kept
from dit_attn.processors.methods.saved import Origin, dump_state


@dataclass
class DroppedHeads:
    """Heads to leave out, as a choice from a profile.

    Attributes:
        transformer: class name.
        layers: number of its self-attention layers.
        heads: number of heads of every layer that was measured.
        kept: heads that stay, for every part of the run; layers that keep all are left out.
        until: where each part but the last ends, fractions of the steps.
        tensors: changes of the output projections, by layer and name; empty without refit.
        expected: predicted relative squared error of the transformer's output, to first order.
        about: what the file says besides, JSON values.
    """

    transformer: str
    layers: int
    heads: dict[str, int]
    kept: tuple[Kept, ...]
    until: tuple[float, ...] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    expected: float = 0.0
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Number of heads that are left out, for every part of the run."""
        return tuple(sum(self.heads[name] - len(heads) for name, heads in part.items()) for part in self.kept)

    @property
    def method(self) -> HeadDrop:
        """The method that leaves them out, without the refit."""
        parts = [";".join(self._address(name, heads) for name, heads in part.items()) for part in self.kept]
        return HeadDrop(heads=" / ".join(parts), until=self.until)

    def enabled(self, pipe: Any) -> AbstractContextManager[Session]:
        """Leave the heads out for the length of a ``with`` block.

        Raises:
            DitAttnError: as for :func:`dit_attn.enable`.
        """
        return enabled_file(pipe, self.save)

    def _address(self, name: str, kept: tuple[int, ...]) -> str:
        return f"{name}:{','.join(str(head) for head in range(self.heads[name]) if head not in kept)}"

    def save(self, path: str | Path) -> Path:
        """Write a JSON file that ``enable`` and ``--method`` take, and the refit beside it as safetensors.

        Args:
            path: ``NAME.json``; the refit goes into ``NAME.safetensors``.

        Returns:
            The JSON file.

        Raises:
            DitAttnError: it cannot be written.
        """
        about = {**self.about, "dropped": self.dropped, "of": sum(self.heads.values()), "expected": self.expected}
        origin = Origin(HeadDrop.slug, self.transformer, self.layers)
        return write_heads(path, self.method.to_dict(), self.tensors, origin, about)


def write_heads(
    path: str | Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], origin: Origin, about: dict[str, Any]
) -> Path:
    """Write a JSON file that ``enable`` and ``--method`` take, and tensors beside it.

    Args:
        path: ``NAME.json``, the tensors go into ``NAME.safetensors``; or a folder, for ``heads.json`` in it.
        settings: of the method.
        tensors: by layer and name; none are needed.
        origin: what they were made for.
        about: what the file says besides, JSON values.

    Returns:
        The JSON file.

    Raises:
        DitAttnError: it cannot be written.
    """
    place = files.user_path(path, "the file")
    place = place if place.suffix == ".json" else place / "heads.json"
    beside = place.with_suffix(".safetensors")
    settings = {**settings, "weights": beside.name if tensors else None, "about": about}
    with files.report_os_error(f"write {place}", "choose another place"):
        place.parent.mkdir(parents=True, exist_ok=True)
        if tensors:
            files.write_bytes(beside, dump_state(tensors, origin))
        files.write_text(place, json.dumps(settings, indent=2) + "\n")
    return place


@contextmanager
def enabled_file(pipe: Any, save: Callable[[str], Path]) -> Iterator[Session]:
    """Enable what ``save`` writes to a folder, for the length of a ``with`` block.

    Raises:
        DitAttnError: as for :func:`dit_attn.enable`.
    """
    with tempfile.TemporaryDirectory() as folder, api.enabled(pipe, str(save(folder))) as session:
        yield session
