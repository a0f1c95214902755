"""``--high-resolution``: the flags, their checks, and items that are made in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_attn.cli.options import Flag, Options
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.load_pipeline import LoadConfig
    from dit_attn.cli.model_source import Source
    from dit_attn.pipelines.high_resolution import HighResolution, HighResolutionResult, NativePass
    from dit_attn.processors.methods.base import Method
    from dit_attn.remote import Place

FLAGS = (
    Flag("high-resolution", "make --height x --width in two stages: a pass at the native size, then denoise its "
         "enlargement in windows", bool),
    Flag("native-height", "height of the native pass in pixels", int, "the model's", low=1),
    Flag("native-width", "width of the native pass in pixels", int, "the model's", low=1),
    Flag("sigma", "noise level at which the second stage begins: 1 is noise alone", float, "0.5, of clips 0.4", low=0.0,
         high=1.0),
    Flag("upscale", "filter that enlarges the native pass", default="bicubic",
         choices=("bicubic", "bilinear", "nearest-exact")),
    Flag("upscale-space", "what is enlarged: decoded pixels, or latents", default="pixel", choices=("pixel", "latent")),
    Flag("dense", "dense attention in the second stage too", bool),
)  # fmt: skip
FOLDER = "native"  # of the native passes, in the output folder
_NAMES = {"sigma": "sigma", "upscale": "upscale", "upscale_space": "space"}


def check_flags(options: Options) -> None:
    """Check the flags; nothing heavy is imported.

    Raises:
        DitAttnError: a flag of two stages without ``--high-resolution``, or some that contradict each other.
    """
    given = [flag for flag in FLAGS if flag.dest in options and flag.name != "high-resolution"]
    if not options.get("high_resolution"):
        if given:
            raise DitAttnError(f"--{given[0].name} is for two stages; add --high-resolution, or leave it out")
        return
    if options.get("sigma") == 0:
        raise DitAttnError("--sigma must be above 0: at 0 nothing is denoised; leave it out for what measured best")
    if options.get("dense") and (options.words or options.config.get("method")):
        raise DitAttnError("--dense and --method contradict each other; leave one of them out")
    if options.get("compile") is not None:
        raise DitAttnError("--compile cannot be used with --high-resolution: methods come and go with its stages")
    if ("native_height" in options) != ("native_width" in options):
        raise DitAttnError("--native-height and --native-width come together; give both, or neither")


def native_size(options: Options, defaults: dict[str, Any], make: HighResolution) -> tuple[int, int]:
    """Return (height, width) of the native pass: that of the flags, of the model's defaults, or of the pipeline."""
    known = defaults.get("height"), defaults.get("width")
    height, width = (known[0], known[1]) if all(known) else make.default_size()
    return options.get("native_height", height), options.get("native_width", width)


def second_methods(
    options: Options, make: HighResolution, native: tuple[int, int], methods: tuple[Method, ...]
) -> tuple[Method, ...]:
    """Return the methods of the second stage: what was asked for, the default of the procedure, or none.

    A native size that a preset says gives way to that of the native pass; one on the command line stays.
    """
    from dit_attn.cli.method_options import method_specs

    if options.get("dense"):
        return ()
    if not methods:
        return make.methods(native)
    said = any("native" in spec.settings for spec in method_specs(options))
    tokens = make.tokens(native)
    return tuple(method.at_native_size(tokens, keep=said) for method in methods)


@dataclass(frozen=True)
class TwoStages:
    """Two stages, checked.

    Attributes:
        native: (height, width) of the native pass in pixels.
        settings: keywords of :class:`~dit_attn.pipelines.HighResolution`.
        methods: of the second stage.
        resume: go on from native passes that are there.
    """

    native: tuple[int, int]
    settings: dict[str, Any]
    methods: tuple[Method, ...]
    resume: bool = False

    @classmethod
    def from_options(
        cls, options: Options, load: LoadConfig, jobs: Sequence[Job], methods: tuple[Method, ...]
    ) -> TwoStages | None:
        """Check the flags against a model and the calls; ``None`` without ``--high-resolution``.

        Args:
            options: the flags.
            load: the model, and where it will be.
            jobs: the calls, without the defaults of the model.
            methods: what was asked for with ``--method``.

        Raises:
            DitAttnError: no size, or one that does not fit; a pipeline that is not supported; a store of the methods
                that is larger than the memory.
        """
        if not options.get("high_resolution"):
            return None
        import torch

        from dit_attn.pipelines.high_resolution import HighResolution

        source = load.source
        settings = {name: options[flag] for flag, name in _NAMES.items() if flag in options}
        make = HighResolution(source.without_weights, **settings)
        native = native_size(options, source.defaults, make)
        for job in jobs:
            absent = [name for name in ("height", "width") if not job.call.get(name)]
            if absent:
                raise DitAttnError(f"--high-resolution needs the size of the result; give --{absent[0]} ({job.where})")
            make.check(job.call["height"], job.call["width"], native, job.call.get("num_inference_steps"))
        _check_schedule(source, jobs, make.sigma)
        make.method = methods = second_methods(options, make, native, methods)
        if any(method.has_twin for method in methods):
            torch.nn.Module.to(make.pipe.transformer, load.dtype)
            for job in jobs:
                frames = job.call.get("num_frames", source.defaults.get("num_frames"))
                make.check_store(job.call["height"], job.call["width"], native, frames, load.device)
        return cls(native, settings, methods, bool(options.get("resume")))

    def to_dict(self) -> dict[str, Any]:
        """Return what decides an output, as JSON values."""
        return {"native": list(self.native), **self.settings}

    def describe(self) -> str:
        """Return one line for ``--dry-run``."""
        height, width = self.native
        settings = "".join(f", {name} {value}" for name, value in self.settings.items())
        return f"native pass of {height} x {width} pixels, then the rest of the steps at the full size{settings}"

    def on(self, pipe: Any) -> HighResolution:
        """Return the two stages on a loaded pipeline."""
        from dit_attn.pipelines.high_resolution import HighResolution

        return HighResolution(pipe, self.methods or None, **self.settings)

    def native_file(self, job: Job, folder: Place, setup: dict[str, Any]) -> Place:
        """Return where the native pass of a job is kept: the same for all sizes, levels and methods that follow."""
        call = {**job.call, "height": self.native[0], "width": self.native[1]}
        known = {name: value for name, value in setup.items() if name not in ("methods", "high_resolution")}
        digest = replace(job, call=call).digest({**known, "space": self.settings.get("space", "pixel")})
        return folder / FOLDER / f"{digest[:16]}.safetensors"

    def make(self, pipe: Any, arguments: dict[str, Any], path: Place, on_stage: Any = None) -> HighResolutionResult:
        """Make one item; its native pass is kept.

        Args:
            pipe: the pipeline.
            arguments: of its call.
            path: of the native pass; one that is there is gone on from with ``resume``.
            on_stage: callback(name) when a stage begins.

        Raises:
            RunStopped: the native pass cannot be kept.
        """
        from dit_attn.cli import outputs

        def keep(first: NativePass) -> None:
            with outputs.report_unrecoverable(path):
                first.save(path)

        first = _found(path) if self.resume else None
        return self.on(pipe)(native=self.native, first=first, on_stage=on_stage, on_first=keep, **arguments)


def explained(
    options: Options, target: Any, defaults: dict[str, Any], methods: tuple[Method, ...]
) -> tuple[HighResolution, tuple[int, int]]:
    """Return the procedure on a pipeline without weights, and the (height, width) of its native pass.

    Raises:
        DitAttnError: no size; a transformer alone, or a pipeline that is not supported.
    """
    from dit_attn.pipelines.high_resolution import HighResolution

    absent = [name for name in ("height", "width") if name not in options]
    if absent:
        raise DitAttnError(f"--high-resolution needs the size of the result; give --{absent[0]}")
    if not hasattr(target, "transformer"):
        raise DitAttnError("--high-resolution needs the model's autoencoder; give a local folder, or a cached model")
    settings = {name: options[flag] for flag, name in _NAMES.items() if flag in options}
    make = HighResolution(target, **settings)
    native = native_size(options, defaults, make)
    make.method = second_methods(options, make, native, methods)
    return make, native


def _check_schedule(source: Source, jobs: Sequence[Job], sigma: float) -> None:
    """Refuse schedules without a step at most as noisy as ``sigma``, where configuration files say what they are."""
    import inspect

    import diffusers

    from dit_attn.cli.model_source import component
    from dit_attn.pipelines.high_resolution.late_start import ScheduleCall, late_start

    known = inspect.signature(source.pipeline.__call__).parameters["num_inference_steps"].default
    try:
        cls = getattr(diffusers, str(component(source.components, "scheduler")[1]))
        scheduler = cls.from_pretrained(source.path, subfolder="scheduler", revision=source.revision)
        default = source.defaults.get("num_inference_steps", known)
        for steps in sorted({job.call.get("num_inference_steps", default) for job in jobs}):
            late_start(scheduler, ScheduleCall((steps,)), sigma)
    except DitAttnError:
        raise
    except Exception:  # its steps depend on what only the pipeline's call knows, or its files are damaged
        return


def _found(path: Place) -> NativePass | None:
    from dit_attn.cli import outputs
    from dit_attn.pipelines.high_resolution import NativePass

    with outputs.report_unrecoverable(path, "read"):
        if not path.is_file():
            return None
    try:
        return NativePass.load(path)
    except DitAttnError:
        return None  # cut short: it is made again
