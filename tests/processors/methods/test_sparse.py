"""Densities by layer and part of the run: what they change, what they leave alone, and which tables are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method, RectifiedSpaAttn, ReTtention, models
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.methods.sparse import SparseMethod, part_of_run

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}
READERS = (
    BlockSparse(density=0.25, **BLOCKS),
    RectifiedSpaAttn(density=0.25, **BLOCKS),
    ReTtention(density=0.25, period=2, stagger=False, **BLOCKS),
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, method: SparseMethod | str | None = None, steps: int = 4) -> torch.Tensor:
    """The final latents of one run, with ``method`` on the pipeline."""
    call = {**models.call_defaults("tiny-image"), "num_inference_steps": steps}
    dit_attn.disable(pipe)
    if method is not None:
        dit_attn.enable(pipe, method)
    generator = torch.Generator().manual_seed(0)
    return pipe("a large red circle on white", generator=generator, output_type="latent", **call).images


@pytest.mark.parametrize("method", READERS, ids=lambda method: method.slug)
def test_density_1_in_all_layers_is_bit_equal_to_stock_and_declines(pipe: Any, method: SparseMethod) -> None:
    dense = dataclasses.replace(method, densities=(1.0,) * 6)
    assert torch.equal(latents(pipe, dense), latents(pipe))
    latents(pipe, dense)
    found = dit_attn.summary(pipe)
    assert found.sparse_calls == 0 and set(found.fallbacks) == {"density 1"}


@pytest.mark.parametrize("method", READERS, ids=lambda method: method.slug)
def test_one_density_in_every_cell_is_that_density(pipe: Any, method: SparseMethod) -> None:
    table = dataclasses.replace(method, densities=(0.25,) * 6)
    assert torch.equal(latents(pipe, table), latents(pipe, method))
    assert not torch.equal(latents(pipe, table), latents(pipe))


def test_every_layer_and_part_has_its_own(pipe: Any) -> None:
    first, second = (1.0, 0.5, 0.25, 0.125, 0.5, 1.0), (0.25, 1.0, 0.5, 0.5, 0.25, 1.0)
    seen: dict[tuple[int, int], float] = {}

    def observe(call: Any, request: Any, out: torch.Tensor) -> None:
        if call.q.shape[1] == call.k.shape[1]:
            kept = 1.0 if request.layout is None else request.layout.density
            seen[part_of_run(call.clock, 2), call.layer.index] = kept

    table = BlockSparse(densities=first + second, parts=2, **{**BLOCKS, "dense_steps": 0})
    dit_attn.disable(pipe)
    dit_attn.enable(pipe, table)
    with dit_attn.observing(pipe, observe):
        call = {**models.call_defaults("tiny-image"), "num_inference_steps": 4}
        pipe("a circle", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    wanted = {(p, n): value for p, row in enumerate((first, second)) for n, value in enumerate(row)}
    assert seen == pytest.approx(wanted)


def test_a_run_is_cut_into_equal_parts_by_steps_or_by_noise() -> None:
    parts = [part_of_run(Clock(run=1, step=step, total=20), 10) for step in range(20)]
    assert parts == [step // 2 for step in range(20)]
    assert [part_of_run(Clock(run=1, step=step, total=3), 2) for step in range(3)] == [0, 0, 1]
    assert part_of_run(Clock(run=1, timestep=900.0), 4) == 0 and part_of_run(Clock(run=1, timestep=0.0), 4) == 3


def test_the_table_survives_json_and_its_origin_is_not_compared(tmp_path: Path) -> None:
    table = RectifiedSpaAttn(densities=(1.0, 0.5, 0.25, 0.125), parts=2, calibration={"transformer": "X", "a": [1]})
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(table.to_dict()))
    back = Method.from_pretrained(file)
    assert back == table and back.to_dict() == table.to_dict() and hash(back) == hash(table)
    assert back == dataclasses.replace(table, calibration=None)
    assert eval(repr(back)) == table


def test_enable_takes_the_file_and_its_folder(pipe: Any, tmp_path: Path) -> None:
    table = BlockSparse(densities=(1.0, 0.5, 0.25, 0.25, 0.5, 1.0), **BLOCKS)
    path = table.save_pretrained(tmp_path / "mine")
    assert torch.equal(latents(pipe, str(path), 2), latents(pipe, table, 2))
    assert torch.equal(latents(pipe, str(path.parent), 2), latents(pipe, table, 2))


@pytest.mark.parametrize(
    "text, words",
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", 'slug under "method"'),
        ('{"densities": [0.5]}', 'slug under "method"'),
        ('{"method": "block-sparce"}', "Did you mean 'block-sparse'"),
        ('{"method": "block-sparse", "densities": [0.5, 2.0]}', "at most 1, got 2.0"),
        ('{"method": "block-sparse", "densities": 0.5}', "must be a list (a,b,...), each item a number"),
        ('{"method": "block-sparse", "densities": [0.5, 0.5], "parts": 3}', "each of 3 parts"),
    ],
)
def test_a_bad_file_is_named_in_one_line(pipe: Any, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(DitAttnError) as caught:
        dit_attn.enable(pipe, str(file))
    assert words in str(caught.value) and "bad.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub(pipe: Any) -> None:
    with pytest.raises(DitAttnError, match=r"no file nowhere\.json"):
        dit_attn.enable(pipe, "nowhere.json")


def test_densities_of_another_model_are_refused_before_anything_changes(pipe: Any) -> None:
    dit_attn.disable(pipe)
    with pytest.raises(DitAttnError, match="for 5 layers, but PixArtTransformer2DModel has 6"):
        dit_attn.enable(pipe, BlockSparse(densities=(0.5,) * 5))
    other = BlockSparse(densities=(0.5,) * 6, calibration={"transformer": "WanTransformer3DModel"})
    with pytest.raises(DitAttnError, match="measured on WanTransformer3DModel, this is PixArtTransformer2DModel"):
        dit_attn.enable(pipe, other)
    assert type(pipe.transformer.transformer_blocks[0].attn1.processor).__module__.startswith("diffusers")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: BlockSparse(densities=(0.5,), top_p=0.9), "densities or top_p"),
        (lambda: RectifiedSpaAttn(densities=(0.5,), top_p=0.9), "densities or top_p"),
        (lambda: BlockSparse(parts=2), "no densities to divide"),
        (lambda: ReTtention(densities=(0.5, 0.5), parts=2), "own schedule over steps"),
        (lambda: BlockSparse(densities=(0.0, 0.5)), "above 0"),
    ],
)
def test_tables_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        make()


def test_explain_counts_the_table(pipe: Any) -> None:
    found = dit_attn.explain(pipe, BlockSparse(densities=(1.0, 0.5, 0.5, 0.25, 0.25, 0.5), **BLOCKS))
    assert found.density == pytest.approx(0.5)
    assert any("density 1" in line for line in found.fallbacks)
