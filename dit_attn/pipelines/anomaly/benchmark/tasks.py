"""What is segmented: a product with a defect, images to learn from and images to test on that nothing else touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.pixels import read_image
from dit_attn.pipelines.anomaly.sources import Shot, Source, images_in, natural

SEEN, NEW, OWN = "pairs of the model's training", "pairs never trained on", "given images"


@dataclass(frozen=True)
class Split:
    """The images of one seed.

    Attributes:
        normals: normal images to learn from.
        pool: defect images to learn from; k shots are its first k.
        test_normals, test_defects: images to test on.
        textures: images of other products.
    """

    normals: Sequence[Path]
    pool: Sequence[Shot]
    test_normals: Sequence[Path]
    test_defects: Sequence[Shot]
    textures: Sequence[Path] = ()


@dataclass(frozen=True)
class Task:
    """One (product, defect).

    Attributes:
        product, defect: names.
        group: what the model knew of it: ``SEEN``, ``NEW`` or ``OWN``.
        most: shots that there are to learn from.
        split: images of a seed.
        text: how many of what, for a dry run.
    """

    product: str
    defect: str
    group: str
    most: int
    split: Callable[[int], Split] = field(repr=False)
    text: str = ""

    @property
    def name(self) -> str:
        """``product+defect``."""
        return f"{self.product}+{self.defect}"


def given_tasks(source: Source, most: int) -> list[Task]:
    """Split a user's images: at most half of the defect images of a type are shots, the others are for the test.

    Normal images for the test are those of MVTec's ``test/good`` where there is such a folder, else the last third.

    Args:
        source: all images; which of them are shots already plays no role.
        most: shots wanted.

    Raises:
        DitAttnError: too few images for a test.
    """
    tasks = []
    every = sorted([*source.shots, *source.held_out], key=lambda shot: natural(shot.image))
    for product, defect in dict.fromkeys((shot.product, shot.defect) for shot in every):
        shots = [shot for shot in every if (shot.product, shot.defect) == (product, defect)]
        count = min(most, len(shots) // 2)
        normals, tests = _split_normals(source.normals.get(product, []))
        if not count or not normals or not tests:
            raise DitAttnError(
                f"{product}+{defect} has {len(shots)} defect images and {len(normals) + len(tests)} normal ones; a "
                "benchmark needs at least 2 and 3"
            )
        others = [path for name, paths in source.normals.items() if name != product for path in paths[:20]]
        tasks.append(Task(
            product, defect, OWN, count, _shuffled(normals, shots[:count], tests, shots[count:], others),
            f"{count} shots, {len(normals)} normal images; test: {len(shots) - count} with the defect, {len(tests)} "
            "without",
        ))  # fmt: skip
    return tasks


def _shuffled(
    normals: list[Path], pool: list[Shot], tests: list[Path], defects: list[Shot], textures: list[Path]
) -> Callable[[int], Split]:
    """Splits that differ in the order of the pool: every seed has other shots, and the same images to test on."""

    def split(seed: int) -> Split:
        order = np.random.default_rng(seed).permutation(len(pool))
        return Split(normals, [pool[i] for i in order], tests, defects, textures)

    return split


def _split_normals(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Normal images to learn from, and those of the test."""
    if images and images[0].parent.name == "good" and images[0].parent.parent.name == "train":
        folder = images[0].parent.parent.parent / "test" / "good"
        if folder.is_dir() and (found := images_in(folder)):
            return list(images), found
    cut = len(images) - len(images) // 3
    return list(images[:cut]), list(images[cut:])


def check_images(tasks: Sequence[Task]) -> None:
    """Read every defect image with its mask, and one normal image of each task.

    Raises:
        DitAttnError: one cannot be used.
    """
    for task in tasks:
        split = task.split(0)
        for shot in (*split.pool, *split.test_defects):
            shot.read()
        for path in (split.normals[0], split.test_normals[0]):
            read_image(path)


def world_tasks(
    folder: Path, pairs: Sequence[tuple[str, str, str]], *, shots: int, size: int, normals: int, tests: int
) -> list[Task]:
    """Tasks of the inspection world; every seed draws pieces of its own, which no model was trained on.

    Args:
        folder: gets the images.
        pairs: (product, defect, group).
        shots: to learn from.
        size: pixels along a side.
        normals: normal images to learn from.
        tests: images with, and as many without, the defect to test on.
    """
    text = f"{shots} shots, {normals} normal images; test: {tests} with the defect, {tests} without; drawn per seed"
    return [
        Task(product, defect, group, shots, _drawn(folder, product, defect, shots, size, normals, tests), text)
        for product, defect, group in pairs
    ]


def _drawn(
    folder: Path, product: str, defect: str, shots: int, size: int, normals: int, tests: int
) -> Callable[[int], Split]:
    def split(seed: int) -> Split:
        from dit_attn import files
        from dit_attn.eval.inspection_world.folders import write_folders
        from dit_attn.eval.inspection_world.products import PRODUCTS

        place = folder / f"{product}+{defect}" / str(seed)
        others = [name for name in PRODUCTS if name != product]
        with files.report_os_error(f"write {place}", "free some space and go on with --resume"):
            found = write_folders(
                place, product, defect, normals=normals + tests, shots=shots + tests, size=size, seed=1000 + seed
            )
            textures = [
                path
                for other in others
                for path in images_in(write_folders(place / other, other, defect, normals=8, shots=0, size=size)[0])
            ]
        good, bad, masks = (images_in(one) for one in found)
        drawn = [Shot(image, product, defect, mask=mask) for image, mask in zip(bad, masks)]
        return Split(good[:normals], drawn[:shots], good[normals:], drawn[shots:], textures)

    return split
