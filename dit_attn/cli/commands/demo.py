"""``dit-attn demo``: an image and a video of the embedded models, dense and with the methods that keep them best."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import Table, fields, show

if TYPE_CHECKING:
    from dit_attn.cli.outputs import Media
    from dit_attn.contact_sheet import Tile


@dataclass(frozen=True)
class Show:
    """What one model generates: a prompt from its held-out captions, dense and with each method from the same noise.

    Attributes:
        model: name of an embedded model.
        prompt, seed: dense and every method follow the prompt from this seed, which a test asserts.
        methods: as ``--method`` takes them, the best by ``docs/results.md`` first.
    """

    model: str
    prompt: str
    seed: int
    methods: tuple[str, ...]


SHOWS = (
    Show(
        "tiny-image",
        "a large purple cross at the right on gray",
        2,
        ("rectified-spaattn", "re-ttention:mask=selected"),
    ),
    Show("tiny-video", "a large purple circle moving left fast on black", 42, ("re-ttention:mask=selected",)),
)


@dataclass(frozen=True)
class Large:
    """The last picture: at several times the native size, from the native pass of a show, dense and in windows.

    Attributes:
        show: its model and prompt.
        factor: of the native size.
        sigma: noise level from which it is denoised at that size.
    """

    show: Show
    factor: int
    sigma: float


LARGE = Large(SHOWS[0], 4, 0.3)


@dataclass(frozen=True)
class LargeOutput:
    """The last picture, made one way.

    Attributes:
        method: ``"dense"`` or the slug of the method.
        file: path of the picture.
        seconds: of the denoising at the large size.
        steps: of it.
        met, attributes: attributes of the prompt that the pixels show, of how many.
    """

    method: str
    file: str
    seconds: float
    steps: int
    met: int
    attributes: int


@dataclass(frozen=True)
class Output:
    """One image or video.

    Attributes:
        model, prompt, seed: what was generated.
        method: as ``--method`` takes it; ``"dense"`` for stock attention.
        file: path of the output; its sidecar, with the summary and the time, is next to it.
        density: attention computed over the run as a share of dense, dense steps included.
        met, attributes: attributes of the prompt that the pixels show, of how many.
    """

    model: str
    prompt: str
    seed: int
    method: str
    file: str
    density: float
    met: int
    attributes: int

    @property
    def followed(self) -> bool:
        """Whether the full prompt is followed."""
        return self.met == self.attributes


GROUPS = {
    "output": (
        flags.Flag("output", "folder of the files", default="outputs/demo", short=("-o",), metavar="DIR"),
        flags.Flag("sheet", "also write the strip here, e.g. docs/images/demo.png", metavar="FILE"),
        flags.Flag("json", "print a JSON report instead of text", bool),
    ),
    "run": (
        flags.Flag("steps", "denoising steps", int, "the models' own, 20", low=1),
        *flags.only(flags.RUN, "device"),
    ),
}


@dataclass(frozen=True)
class DemoConfig:
    """One command.

    Attributes:
        device: where it runs.
        argv: the command line, for the records.
        output: folder of the files.
        sheet: second place of the strip.
        steps: denoising steps; ``None``: the models' own.
        json: print JSON.
    """

    device: Any
    argv: tuple[str, ...]
    output: Path = Path("outputs/demo")
    sheet: Path | None = None
    steps: int | None = None
    json: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> DemoConfig:
        """Check the flags.

        Raises:
            DitAttnError: no such device.
        """
        from dit_attn.cli import load_pipeline

        values = options.pick("steps", "json")
        values |= {name: Path(text).expanduser() for name, text in options.pick("output", "sheet").items()}
        with loading_libraries(not options.get("json")):
            device = load_pipeline.pick_device(options.get("device", "auto"))
            load_pipeline.quiet(show_progress=False)
        return cls(device, options.argv, **values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``demo``."""
    parsers.describe(
        parser,
        "demo [options]",
        "Generate an image and a video with the embedded models, dense and with the methods that keep them best, from "
        "the same noise, and an image at four times its size, dense and in windows; make one strip of everything and "
        "say what was gained.",
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Make everything. Returns 0.

    Raises:
        DitAttnError: an argument does not fit, or the output folder cannot be written.
    """
    from dit_attn import contact_sheet
    from dit_attn.cli import outputs

    config = DemoConfig.from_options(flags.merge(args, GROUPS))
    sheets = [config.output / "demo.png", *([config.sheet] if config.sheet else [])]
    for path in sheets:
        outputs.prepare_folder(path.parent)
    if config.device.type == "cpu":
        import torch

        torch.set_num_threads(1)  # tiny operations: on a busy machine more threads only wait for each other
    started = time.perf_counter()
    made: list[Output] = []
    tiles: list[Tile] = []
    for item in SHOWS:
        _print(config, f"{item.model}  {item.prompt}")
        for output, media in _generate(item, config):
            made.append(output)
            tiles.append(_tile(output, media))
    for path in sheets:
        outputs.write_image(contact_sheet.grid([tiles], columns=_titles(made)), path)
    large = _generate_large(LARGE, config)
    seconds = round(time.perf_counter() - started, 1)
    data = {"folder": str(config.output), "sheets": [str(path) for path in sheets], "seconds": seconds}
    data |= {"items": [asdict(output) for output in made], "gained": gained(made)}
    data |= {"large": [asdict(output) for output in large], "faster": faster(large)}
    outputs.write_json(data, config.output / "demo.json")
    if config.json:
        print(json.dumps(data, indent=1))
    else:
        files = fields({"files": config.output, "strip": sheets[-1], "time": f"{seconds:.0f} s"})
        show("", _table(made), "", files, "", gained(made))
        print(faster(large))
    return 0


def gained(made: list[Output]) -> str:
    """Return the last line: what the first method of each model saved, and whether the prompt is still followed."""
    parts = []
    for item in SHOWS:
        dense, best = [output for output in made if output.model == item.model][:2]
        kept = "prompt followed" if best.followed else "prompt not followed"
        if best.followed != dense.followed:
            kept += ", unlike dense"
        saved = 100 * (1 - best.density)
        parts.append(f"{saved:.0f} % of the attention on {item.model} with {_slug(best.method)} ({kept})")
    return f"Saved: {', '.join(parts)}."


def faster(made: list[LargeOutput]) -> str:
    """Return the line that says what windows saved on the last picture."""
    dense, window = made
    times = f"{dense.seconds:.1f} s dense, {window.seconds:.1f} s in windows"
    kept = f"{window.met} of {window.attributes} attributes right, dense {dense.met}"
    return f"{LARGE.factor}x the size, {window.steps} steps: {times}, {dense.seconds / window.seconds:.1f}x ({kept})."


def _generate_large(large: Large, config: DemoConfig) -> list[LargeOutput]:
    """One prompt at a large size, dense and in windows, from the same native pass."""
    import torch

    from dit_attn import models
    from dit_attn.cli import outputs
    from dit_attn.pipelines import HighResolution

    if config.device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    item = large.show
    pipe = models.load(item.model).to(config.device)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(item.model), "output_type": "np"}
    native = (call.pop("height"), call.pop("width"))
    height, width = (large.factor * side for side in native)
    _print(config, f"{item.model}  the same at {height} x {width} pixels, dense and in windows")
    first, made = None, []
    for name, method in (("dense", None), ("inward-window", "inward-window")):
        make = HighResolution(pipe, method, sigma=large.sigma)
        call["generator"] = torch.Generator().manual_seed(item.seed)
        result = make(item.prompt, height=height, width=width, native=native, first=first, **call)
        first, media = result.first, outputs.media_of(result.output)
        path = config.output / f"large-{name}.png"
        outputs.write_media(media, path, 1, {"prompt": item.prompt})
        right, total = _met(item.prompt, media)
        made.append(LargeOutput(name, str(path), round(result.seconds["denoise"], 2), result.steps, right, total))
    if config.device.type == "cpu":
        torch.set_num_threads(1)
    return made


def _slug(method: str) -> str:
    return method.partition(":")[0]


def _generate(item: Show, config: DemoConfig) -> list[tuple[Output, Media]]:
    """One prompt dense and with each method, from the same noise."""
    from dit_attn.cli import jobs, model_source, resolve_methods, run_record, runner
    from dit_attn.cli.load_pipeline import LoadConfig, load_pipeline, pick_dtype
    from dit_attn.cli.method_options import parse_method

    source = model_source.describe(item.model)
    options: dict[str, Any] = {"prompt": [item.prompt], "seed": item.seed}
    if config.steps:
        options["steps"] = config.steps
    (job,) = jobs.make_jobs(options, source.defaults)
    load = LoadConfig(source, config.device, pick_dtype("auto", source, config.device))
    pipe = load_pipeline(load)
    made = []
    for method in ("dense", *item.methods):
        specs = [] if method == "dense" else parse_method(method)
        methods = resolve_methods.resolve(specs, source.transformer, None)
        folder = config.output / f"{item.model}-{_slug(method)}"
        folder.mkdir(exist_ok=True)
        side = run_record.new_run(load, methods, folder, config.argv, pipe=pipe)
        with run_record.methods_enabled(side):
            media, seconds = runner.call_pipeline(pipe, job)
            result = runner.save_item(side, job, media, seconds)
        density = 1.0 if result.density is None else result.density
        right, total = _met(item.prompt, media)
        output = Output(item.model, item.prompt, item.seed, method, str(result.file), density, right, total)
        made.append((output, media))
    return made


def _met(prompt: str, media: Media) -> tuple[int, int]:
    """How many attributes of the caption the output shows, of how many; read from the pixels."""
    from dit_attn.eval.shapes_world import verify, world

    item = world.parse(prompt)
    values = media.frames.astype("float32") / 255.0
    if isinstance(item, world.VideoScene):
        verdict = verify.verify_video(values, item)
    else:
        verdict = verify.verify_image(values[0], item)
    return sum(verdict.values()), len(verdict)


def _tile(output: Output, media: Media) -> Tile:
    """The image, or first and last frame of the video, at its own size."""
    from dit_attn import contact_sheet

    followed = "prompt followed" if output.followed else f"{output.met} of {output.attributes} attributes"
    note = f"{100 * output.density:.0f} % of attention, {followed}"
    return contact_sheet.tile(media.frames, _slug(output.method), note, height=128, strip=2)


def _titles(made: list[Output]) -> list[str]:
    """The prompt above the first tile of each model."""
    return [output.prompt if output.method == "dense" else "" for output in made]


def _table(made: list[Output]) -> Table:
    rows = []
    for output in made:
        met = f"{output.met} of {output.attributes}"
        rows.append((output.model, output.method, f"{100 * output.density:.0f} %", met))
    return Table(("model", "method", ">attention computed", ">attributes right"), rows)


def _print(config: DemoConfig, text: str) -> None:
    if not config.json:
        print(text, flush=True)
