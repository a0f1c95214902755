"""What the flags of ``dit-attn anomaly`` name: the model, images, masks, regions and settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.cli import workers
from dit_attn.cli.commands.anomaly import estimate
from dit_attn.cli.model_source import check_reachable, locate
from dit_attn.cli.options import Options
from dit_attn.cli.progress import loading_libraries
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.masks import MaskSource, foreground
from dit_attn.pipelines.anomaly.pixels import read_image, read_mask
from dit_attn.pipelines.anomaly.sources import Source, from_folders, from_tree, images_in


def check_model(options: Options) -> None:
    """Refuse a model that is not there; for an estimate a built-in shape will do."""
    if options.get("estimate"):
        return estimate.check_model(options)
    kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    if kind == "hub":
        check_reachable(path, options.get("revision"))


def reject(options: Options, job: str, *names: str) -> None:
    """Refuse flags of other jobs."""
    for name in names:
        if name in options:
            raise DitAttnError(f"--{name.replace('_', '-')} is not for `anomaly {job}`; leave it out")


def find_source(options: Options, shots: bool, products: Sequence[str] = ()) -> Source:
    """Find the images that the flags name."""
    path = {name: files.user_path(options[name], f"--{name}") for name in ("normal", "defects", "masks", "data")
            if name in options}  # fmt: skip
    if ("data" in path) == ("normal" in path):
        raise DitAttnError("give either --data DIR, a known layout, or --normal DIR" + (" with --defects" * shots))
    if "data" in path:
        given = options.get("product", list(products))
        return from_tree(path["data"], options.get("shots"), given, options.get("defect", ()))
    names = options.get("product", list(dict.fromkeys(products)) or ["product"])
    if len(names) > 1:
        raise DitAttnError(f"--normal is of one product, and there are {', '.join(names)}; give --product NAME")
    if shots and "defects" not in path:
        raise DitAttnError("no defect images; give --defects DIR")
    defect = options.get("defect", ["defect"])
    if len(defect) > 1:
        raise DitAttnError("--defect names one type here; put the images of each type into a folder of its own")
    return from_folders(path["normal"], path.get("defects") if shots else None, path.get("masks"), names[0], defect[0])


def counts_of(options: Options, pairs: Sequence[Any]) -> dict[tuple[str, str], int]:
    """Return the quota of every pair: --per-defect of each, or --count in all."""
    wanted = [
        pair for pair in pairs
        if pair[0] in options.get("product", [pair[0]]) and pair[1] in options.get("defect", [pair[1]])
    ]  # fmt: skip
    if not wanted:
        raise DitAttnError(f"the concept has no such defect; it has {', '.join('+'.join(pair) for pair in pairs)}")
    if ("count" in options) == ("per_defect" in options):
        raise DitAttnError("give either --count N, pairs in all, or --per-defect N")
    if "per_defect" in options:
        return dict.fromkeys(wanted, options["per_defect"])
    share, rest = divmod(options["count"], len(wanted))
    return {pair: share + (i < rest) for i, pair in enumerate(wanted)}


def masks_of(options: Options, concept: Any, pair: tuple[str, str]) -> MaskSource:
    """Return where the masks of a pair come from."""
    kind = options.get("mask_source", "given" if "masks" in options else "real")
    if kind != "given":
        shapes = concept.shapes.get("+".join(pair), [])
        if not shapes:
            raise DitAttnError(f"the concept holds no masks of {'+'.join(pair)}; give --masks DIR")
        return MaskSource(kind, shapes)
    folder = files.user_path(options["masks"], "--masks")
    inside = folder / pair[1] if (folder / pair[1]).is_dir() else folder
    found = [read_mask(path, path) for path in images_in(inside)]
    if not found:
        raise DitAttnError(f"{inside} has no masks; check --masks")
    return MaskSource("given", found)


def region_of(text: str) -> Callable[[Path, np.ndarray], np.ndarray] | None:
    """Return what finds the region of interest of an image, ``None`` for its foreground."""
    if text == "auto":
        return None
    if text == "none":
        return lambda path, pixels: np.ones(pixels.shape[:2], bool)
    place = files.user_path(text, "--roi")
    if not place.exists():
        raise DitAttnError(f"--roi {text}: there is no such file or folder; give auto, none, an image or a folder")
    regions = {path.stem: path for path in (images_in(place) if place.is_dir() else [place])}

    def region(path: Path, pixels: np.ndarray) -> np.ndarray:
        file = place if place.is_file() else regions.get(path.stem)
        if file is None:
            return foreground(pixels)
        found = read_image(file).max(-1)
        if found.shape != pixels.shape[:2]:
            raise DitAttnError(f"--roi {file} is of another size than {path.name}; they must be equal")
        return found > int(found.max()) / 2

    return region


def output_folder(options: Options, job: str) -> Path:
    """Return the folder of the run's files."""
    output = files.user_path(options.get("output", f"outputs/anomaly-{job}"), "--output")
    if output.is_file():
        raise DitAttnError(f"--output {output} is a file; give a folder")
    return output


def train_config(options: Options) -> Any:
    """Return how a concept is learned."""
    from dit_attn.pipelines.anomaly.training import TrainConfig

    names = {"train_steps": "steps", "train_batch": "batch", "prompt_template": "prompt",
             "normal_template": "normal_prompt"}  # fmt: skip
    given = options.pick("tokens", "mask_tokens", "lora_rank", "flips", "seed", "licence")
    given |= {field: options[name] for name, field in names.items() if name in options}
    return TrainConfig(**given)


def generate_config(options: Options) -> Any:
    """Return how pairs are made."""
    from dit_attn.pipelines.anomaly.orders import GenerateConfig

    given = {"guidance": options["guidance_scale"]} if "guidance_scale" in options else {}
    return GenerateConfig(**options.pick("steps", "batch", "retries", "crop", "reweighting", "seed"), **given)


def load_backbone(options: Options, resolution: int | None = None) -> Any:
    """Load the model."""
    from dit_attn.cli.load_pipeline import LoadConfig, load_pipeline
    from dit_attn.pipelines.anomaly.backbone import FAMILIES, Backbone

    config = LoadConfig.from_options(options)
    device, _ = workers.join_workers(config.device, "device" in options)
    config = replace(config, device=device)
    name = config.source.pipeline.__name__
    if name not in FAMILIES:
        raise DitAttnError(f"anomalies are not there yet for {name}; they are for {', '.join(sorted(FAMILIES))}")
    size = options.get("resolution", resolution or config.source.defaults.get("height"))
    with loading_libraries(speaks(options)):
        pipe = load_pipeline(config)
    return Backbone(pipe, size)


def plan_of(source: Source, steps: int) -> str:
    """Return what would be learned, in words."""
    lines = []
    for product, defect in source.pairs:
        count = sum((shot.product, shot.defect) == (product, defect) for shot in source.shots)
        held = sum((shot.product, shot.defect) == (product, defect) for shot in source.held_out)
        lines.append(
            f"{product}+{defect}: {count} shots, {held} left alone, {len(source.normals[product])} normal images"
        )
    return "\n".join([*lines, f"{steps} optimizer steps"])


def speaks(options: Options) -> bool:
    """Return whether this process prints: the first, unless it is to print JSON alone."""
    return not options.get("json") and workers.process_rank()[0] == 0


def say(text: str) -> None:
    """Print on standard error, in the first process."""
    if workers.process_rank()[0] == 0:
        print(text, file=sys.stderr)
