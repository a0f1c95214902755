"""What a native pass leaves behind for the second stage: enough to go on from it in another process, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, reason
from dit_attn.pipelines.high_resolution.late_start import ScheduleCall
from dit_attn.remote import Place, local_copy

Generators = torch.Generator | list[torch.Generator] | None
_FORMAT = "dit-attn native pass 1"


@dataclass(frozen=True)
class NativePass:
    """The first stage.

    Attributes:
        values: pixels in [0, 1], or latents as the pipeline denoises them; (B, C, H, W) or (B, C, F, H, W), on the CPU.
        space: ``"pixel"`` or ``"latent"``.
        schedule: how the pipeline set its time steps.
        generators: states of the generators after it.
    """

    values: torch.Tensor
    space: str
    schedule: ScheduleCall
    generators: tuple[torch.Tensor, ...] = ()

    def restore(self, generator: Generators) -> None:
        """Set generators to their states after the pass.

        Raises:
            DitAttnError: another number of generators.
        """
        given = _listed(generator)
        if len(given) != len(self.generators):
            raise DitAttnError(
                f"the native pass was made with {len(self.generators)} generators, got {len(given)}; make it again"
            )
        for one, state in zip(given, self.generators):
            one.set_state(state)

    def save(self, path: Place) -> Place:
        """Write the pass as safetensors, atomically.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {"values": self.values.contiguous()}
        tensors |= {f"generator.{index}": state for index, state in enumerate(self.generators)}
        about = {"format": _FORMAT, "space": self.space, "schedule": json.dumps(self.schedule.to_dict())}
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=about)
        return path

    @classmethod
    def load(cls, path: Place) -> NativePass:
        """Read what :meth:`save` wrote.

        Raises:
            DitAttnError: it is no such file, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with local_copy(path) as copy, safe_open(copy, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise DitAttnError(f"{path} is no native pass; make it again")
                states = sorted(name for name in file.keys() if name.startswith("generator."))  # noqa: SIM118
                schedule = ScheduleCall.from_dict(json.loads(about["schedule"]))
                generators = tuple(file.get_tensor(name) for name in states)
                return cls(file.get_tensor("values"), about["space"], schedule, generators)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DitAttnError(f"the native pass {path} cannot be read ({reason(error)}); make it again") from error


def generator_states(generator: Generators) -> tuple[torch.Tensor, ...]:
    """Return the states of the generators of a call."""
    return tuple(one.get_state() for one in _listed(generator))


def _listed(generator: Generators) -> list[torch.Generator]:
    return [] if generator is None else generator if isinstance(generator, list) else [generator]
