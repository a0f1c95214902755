"""Base of every method: a frozen set of settings that can be checked, printed, saved and shared.

A ``Method`` holds no tensor and no state of a run; that lives in the run
(:class:`~dit_attn.processors.core.run_state.RunState`) and its layers. Tensors that it learns are modules of the
transformer (:mod:`dit_attn.processors.core.parameters`).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.parameters import LayerShape, on_device
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.methods import saved
from dit_attn.settings import check_fields, check_names
from dit_attn.settings import setting as setting

if TYPE_CHECKING:
    from typing_extensions import Self

TWIN = "twin"
"""Name of the pass that :meth:`Method.twin` asks for."""
Grid = tuple[int, int, int]

REGISTRY: dict[str, type[Method]] = {}
"""Every method by slug; a subclass with a slug of its own enters when it is defined."""


def resolve_count(amount: float | int, total: int) -> int:
    """Return ``amount`` of ``total`` as a count in [0, total]: a float is a fraction (rounded), an int is absolute."""
    count = round(amount * total) if isinstance(amount, float) else amount
    return max(0, min(int(count), total))


def in_steps(clock: Clock, start: float | int, stop: float | int) -> bool:
    """Return whether the current step is between two bounds, fractions of the run or counts; ``stop`` is excluded.

    With an unknown number of steps, fractions are of the noise that is removed.
    """
    if clock.total:
        return resolve_count(start, clock.total) <= clock.step < resolve_count(stop, clock.total)
    after = clock.progress >= start if isinstance(start, float) else clock.step >= start
    return after and (clock.progress < stop if isinstance(stop, float) else clock.step < stop)


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
class TwinPass:
    """A pass through the transformer before the plain one.

    Attributes:
        branches: guidance branches whose rows take part, all where empty.
        first_layer: index of the first self-attention layer at which the two passes differ. The plain pass does not
            compute the blocks before it again, where the model and its hooks allow that.
    """

    branches: tuple[str, ...] = ()
    first_layer: int = 0


class _InitSignature:
    """The signature of a method class is that of its constructor, whatever ``__new__`` checks."""

    def __get__(self, instance: object, owner: Any) -> inspect.Signature:
        _, *parameters = inspect.signature(owner.__init__).parameters.values()
        return inspect.Signature(parameters)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Settings are keywords.

    Class attributes:
        slug: name used by ``enable(pipe, slug)`` and on the command line.
        role: methods of one role conflict. ``"sparse"``: decides which keys are attended to; ``"heads"``: which heads
            count; ``"guidance"``: uses the perturbed pass of a step; ``"negative"``: adds rows with a negative prompt,
            which is no room for a perturbed pass.
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
    __signature__: ClassVar[_InitSignature] = _InitSignature()

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        check_names(cls, args, settings)
        return super().__new__(cls)

    @property
    def weights(self) -> str | None:
        """Where the tensors that the method starts from were saved; a setting of methods that learn."""
        return None

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

    @property
    def resamples_tables(self) -> bool:
        """Whether positions may be rows between those of a table that is added to the tokens, without a rotary one."""
        return False

    @property
    def reads_input(self) -> bool:
        """Whether the method asks for ``call.layer.inputs``, the hidden states that enter a self-attention layer."""
        return False

    @property
    def reads_queries(self) -> bool:
        """Whether it asks for ``call.layer.raw_queries`` besides, the queries before their normalization."""
        return False

    def twin(self, clock: Clock, branches: Sequence[str]) -> TwinPass | None:
        """Return the pass through the transformer to run before the plain one of a call, ``None`` for none.

        The pass gets the arguments of the call, advances no clock, and no step cache answers it; its attention calls
        say ``call.pass_name == "twin"`` and have a ``layer.state`` of their own. The plain pass finds that with
        ``layer.state_of("twin")``. One method of a run may ask for twin passes.

        Args:
            clock: position in the run.
            branches: guidance branch of every batch row of the call.
        """
        return None

    def twin_at(self, grid: Grid | None) -> bool:
        """Return whether a twin pass makes a difference on a (T, H, W) grid of visual tokens."""
        return True

    def twin_work(self, steps: int, branches: int) -> float:
        """Return how many samples go through the transformer in twin passes, per step, as a mean over a run.

        Args:
            steps: of the run.
            branches: 2 with classifier-free guidance, else 1.
        """
        return 0.0

    def runs_negative(self, clock: Clock) -> bool:
        """Return whether the conditional rows of a call run once more with the text of a negative prompt.

        They are rows of the same call, of the branch ``"negative"``, and their predictions are dropped: the method
        makes use of them in the attention calls. The text is that of the method's ``negative_prompt``, or without one
        that of the pipeline's call. One method of a run may ask for such rows.

        Args:
            clock: position in the run.
        """
        return False

    @property
    def negative_prompt(self) -> str | None:
        """Text of the rows that :meth:`runs_negative` asks for; a setting of methods that do."""
        return None

    @property
    def has_negative(self) -> bool:
        """Whether :meth:`runs_negative` is to be asked."""
        return type(self).runs_negative is not Method.runs_negative

    @property
    def has_twin(self) -> bool:
        """Whether :meth:`twin` is to be asked."""
        return type(self).twin is not Method.twin

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

    def kept(self, layers: Mapping[str, int | None]) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Return the heads that stay in every layer that loses some, for every part of the run (:meth:`part_at`).

        They are sliced away before attention; everything else, other methods too, sees the others alone.

        Args:
            layers: number of heads of every self-attention layer, by name and in order.

        Raises:
            DitAttnError: no such layer or head, or a layer that keeps none.
        """
        return ({},)

    def part_at(self, clock: Clock) -> int:
        """Return the part of the run, of those of :meth:`kept`, that the current step is in."""
        return 0

    @property
    def reduces_heads(self) -> bool:
        """Whether :meth:`kept` is to be asked."""
        return type(self).kept is not Method.kept

    @property
    def learns(self) -> bool:
        """Whether the method learns tensors."""
        return type(self).parameters_for is not Method.parameters_for

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module | None:
        """Return the module with the tensors that the method learns for one layer, ``None`` where it learns nothing.

        It is made on the CPU and moved to the layer's device; its type is up to the method.

        Args:
            shape: sizes of the layer.
        """
        return None

    def continues(self, other: Method) -> bool:
        """Return whether the tensors of ``other``, enabled before, stay when this method takes its place.

        By default they do where it is the same settings and names no ``weights``.
        """
        return self == other and self.weights is None

    def parameters(self, call: AttentionCall) -> torch.nn.Module:
        """Return the method's module for the layer of a call, on the device of the call.

        Call the module, rather than reading its tensors: offloading brings them when its ``forward`` runs.
        """
        return on_device(call.layer.learned[id(self)], call.q.device)

    def auxiliary_loss(self, modules: Iterable[torch.nn.Module]) -> torch.Tensor | None:
        """Return what a training adds to its loss after a call in training mode, ``None`` for nothing.

        Args:
            modules: those that the method made for the layers, among others.
        """
        return None

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

    def at_native_size(self, native: tuple[int, int], keep: bool = True) -> Method:
        """Return the method for a model trained at (h, w) tokens, itself where its settings do not refer to that.

        Args:
            native: (h, w) tokens.
            keep: leave a native size in the settings as it is.
        """
        return self

    def for_preset(self, name: str | None) -> Method:
        """Return the method with what it leaves to the model's preset filled in, itself where it leaves nothing.

        Args:
            name: of the preset that matches the model, ``None`` where none does.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, with the slug under ``"method"``."""
        return {"method": self.slug, **{k: plain(v) for k, v in dataclasses.asdict(self).items()}}

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
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the settings to ``folder`` as JSON, and beside them the tensors that ``weights`` names.

        Tensors of a transformer are saved by :meth:`~dit_attn.processors.attach.session.Session.save_pretrained`.

        Returns:
            The file of the settings.

        Raises:
            DitAttnError: the folder is a file, cannot be made or takes no more bytes.
        """
        return saved.write(folder, self.slug, self._contents())

    @staticmethod
    def from_pretrained(source: str | Path) -> Method:
        """Read settings from a folder, a JSON file, or a repository of the Hugging Face Hub (``org/name``).

        Learned tensors beside them become the method's ``weights``; they are read when it is enabled.

        Raises:
            DitAttnError: nothing readable there.
        """
        data, path = saved.read_settings(source)
        try:
            return Method.from_dict(data)
        except DitAttnError as error:
            raise DitAttnError(f"{path}: {error}") from error

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hugging Face Hub.

        Returns:
            The commit's address.
        """
        return saved.upload(repo_id, self.slug, self._contents(), **kwargs)

    def _contents(self) -> dict[str, bytes]:
        return saved.contents(self.to_dict(), saved.saved_tensors(self.weights) if self.weights else {})


def method_class(slug: object) -> type[Method]:
    """Return the class behind a slug.

    Raises:
        DitAttnError: no such method.
    """
    if not isinstance(slug, str) or slug not in REGISTRY:
        raise unknown("method", slug, REGISTRY)
    return REGISTRY[slug]


def plain(value: Any) -> Any:
    """Return a setting as a JSON value: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, tuple) else value
