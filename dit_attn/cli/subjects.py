"""``--subjects FILE``: pieces of the prompt with boxes or masks, checked before torch is imported."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dit_attn import files
from dit_attn.cli import outputs
from dit_attn.cli.jobs import Job
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.subjects import (
    Size,
    Subject,
    check_mask_size,
    check_overlap,
    read_subjects,
    shown_boxes,
)
from dit_attn.remote import Place, place_of

if TYPE_CHECKING:
    from dit_attn.cli.model_source import Source

_DEFAULT = "isolation"  # what --subjects means without a method that takes them
_TAKE = (_DEFAULT, "reposition", "saas")


def with_subjects(options: Options, specs: Sequence[MethodSpec], jobs: Sequence[Job]) -> list[MethodSpec]:
    """Return the methods with the subjects of ``--subjects``, isolation where none of them takes any.

    Args:
        options: the flags.
        specs: the methods as they were written.
        jobs: what is to be made.

    Raises:
        DitAttnError: a file that is missing or malformed, a piece that a prompt lacks, boxes that overlap, a mask of
            another size, or subjects in two places.
    """
    if "subjects" not in options:
        return list(specs)
    where, size = f"--subjects {options['subjects']}", _size(options, jobs)
    subjects = read_subjects(options["subjects"], size, "--subjects")
    if not subjects:
        raise DitAttnError(f"{where} has no subject; write one with a piece of the prompt and a box")
    for job in jobs:
        _check_pieces(subjects, job, where)
    if size is not None:
        check_mask_size(subjects, size, where)
    taking = [spec for spec in specs if spec.name in _TAKE] or [MethodSpec(_DEFAULT)]
    for spec in taking:
        if "subjects" in spec.settings:
            raise DitAttnError(f"{spec.name} has subjects of its own, and {where} too; give one of them")
        if spec.name == "saas":
            if "pieces" in spec.settings:
                raise DitAttnError(f"saas has pieces, and {where} has them too; give one of them")
        elif spec.settings.get("overlap", "refuse") == "refuse":
            check_overlap(subjects)
        if spec.name == "reposition" and not any("from" in one or "reference" in one for one in subjects):
            raise DitAttnError(f'{where}: no subject is to be moved; add "from", the box that one comes from')
        spec.settings["subjects"] = list(subjects)
    return [*specs, *(spec for spec in taking if spec not in specs)]


def check_methods(methods: Sequence[Any], jobs: Sequence[Job], source: Source) -> None:
    """Refuse what the subjects and pieces of some methods cannot be in the items, before weights are loaded.

    Args:
        methods: what is to be enabled.
        jobs: what is to be made, with the arguments of the calls.
        source: the model.

    Raises:
        DitAttnError: a mask of another size than an item, or as for :func:`check_tokens`.
    """
    for method in methods:
        subjects = getattr(method, "subjects", ())
        for job in jobs if not isinstance(subjects, str) else ():
            width, height = job.call.get("width"), job.call.get("height")
            if width and height:
                check_mask_size(subjects, (width, height), job.where)
    if pieces_of(methods):
        try:
            pipe = source.with_tokenizers
        except Exception:  # damaged or missing files raise anything; loading says what is damaged
            return
        check_tokens(methods, jobs, pipe)


def pieces_of(methods: Iterable[Any]) -> list[str | tuple[int, int]]:
    """Return the pieces of the prompt that some methods name, each once."""
    found = [piece for method in methods for piece in getattr(method, "pieces", ())]
    for subjects in (getattr(method, "subjects", ()) for method in methods):
        found += [subject["piece"] for subject in subjects if not isinstance(subjects, str)]
    return list(dict.fromkeys(piece if isinstance(piece, str) else tuple(piece) for piece in found))


def check_tokens(methods: Iterable[Any], jobs: Sequence[Job], pipe: Any) -> None:
    """Refuse pieces that a prompt lacks, or that are cut off by the length of the text.

    Pipelines whose text is known in a run only, with the images that it stands for, are left to the run.

    Args:
        methods: what is enabled.
        jobs: what is to be made.
        pipe: the pipeline, with its tokenizers; it needs no weights.

    Raises:
        DitAttnError: so it is.
    """
    import dit_attn
    from dit_attn.processors.attach.prompt_spans import PieceMissing

    pieces = pieces_of(methods)
    for job in jobs if pieces else ():
        length = {key: job.call[key] for key in ("max_sequence_length",) if key in job.call}
        try:
            spans = dit_attn.spans(pipe, job.prompt, pieces, **length)
        except PieceMissing as error:
            raise DitAttnError(f"{job.where}: {error}") from error
        except DitAttnError:
            return
        for piece in pieces:
            if all(span.cut for span in spans if span.piece == piece):
                raise DitAttnError(
                    f"{job.where}: the prompt is too long, and {shorten(piece)} is cut off in the middle; shorten it, "
                    "or give a larger max_sequence_length with --pipeline-kwargs"
                )


def write_page(folder: Place, results: Iterable[Any], argv: Sequence[str]) -> bool:
    """Write ``subjects.html`` for the items whose methods have subjects or pieces; return whether there are any.

    Args:
        folder: of the items.
        results: what became of them.
        argv: the command line.
    """
    from dit_attn.eval.report import subjects_page

    sides = []
    for result in results:
        known = outputs.read_sidecar(place_of(result.file).with_suffix(".json")) if result.file else {}
        if known:
            measured = ((known.get("summary") or {}).get("reports") or {}).get("saas")
            given = [method["subjects"] for method in known.get("methods") or () if method.get("subjects")]
            if measured or given:
                named = [one for subjects in given if isinstance(subjects, list) for one in subjects]
                boxes = [(str(one["piece"]), box) for one in named for box in shown_boxes(one)]
                sides.append({**known, "boxes": boxes})
    if sides:
        facts = [("model", str(sides[0].get("model"))), ("items", str(len(sides)))]
        text = subjects_page.page(folder, sides, "Subjects", f"dit-attn {shlex.join(argv)}", facts)
        files.write_text(folder / "subjects.html", text)
    return bool(sides)


def _size(options: Options, jobs: Sequence[Job]) -> Size | None:
    """Width and height in pixels where all items have the same, by their flags or by an embedded model."""
    from dit_attn.models.registry import MODELS

    known = MODELS.get(options.get("model", ""))
    defaults: dict[str, Any] = known.call_defaults if known is not None else {}
    sizes = {tuple(job.call.get(key, defaults.get(key)) for key in ("width", "height")) for job in jobs}
    width, height = sizes.pop() if len(sizes) == 1 else (None, None)
    return (width, height) if width and height else None


def _check_pieces(subjects: Sequence[Subject], job: Job, where: str) -> None:
    for subject in subjects:
        piece = subject["piece"]
        lacking = piece not in job.prompt if isinstance(piece, str) else piece[1] > len(job.prompt)
        if lacking:
            raise DitAttnError(
                f"{where}: {shorten(piece)} is not in the prompt {shorten(job.prompt)} ({job.where}); a piece is words "
                "of the prompt as they are written there"
            )
