"""The nodes on a fake of ComfyUI's contract."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn.integrations.comfyui as package
from dit_attn.errors import DitAttnError
from dit_attn.integrations.comfyui.nodes import METHODS, NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from dit_attn.integrations.comfyui.patch import OVERRIDE, Patch, patch_of
from dit_attn.processors.guidance.perturbation import TARGETS
from tests._support.fake_comfyui import SIGMAS, FakePatcher, copied, sample

SMALL = '{"q_block": 32, "kv_block": 32}'


def sparse(model: Any, density: float = 0.25, method: str = "block-sparse", **inputs: Any) -> Any:
    """The model with the first node."""
    given = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 256, "settings": SMALL, **inputs}
    return NODE_CLASS_MAPPINGS["DitAttnSparseAttention"]().patch(model, method, density, **given)[0]


def guided(model: Any, scale: float = 2.0, heads: str = "1:0", u: float = 1.0, **inputs: Any) -> Any:
    """The model with the second node."""
    given = {"target": "identity", "start_percent": 0.0, "end_percent": 1.0, **inputs}
    return NODE_CLASS_MAPPINGS["DitAttnHeadGuidance"]().patch(model, heads, scale, u, **given)[0]


def patch(model: Any) -> Patch:
    """What is enabled on a model."""
    found = patch_of(model)
    assert found is not None
    return found


def counted(model: Any) -> dict[str, int]:
    """Calls of the last run by what became of them."""
    run, found = patch(model).run, dict(patch(model).run.calls)
    for layer in run.layers:
        found["sparse"] = found.get("sparse", 0) + layer.stats.sparse_calls
        for reason, count in layer.stats.fallbacks.items():
            found[reason] = found.get(reason, 0) + count
    return found


@pytest.mark.parametrize("layout", ["wan", "joint"])
@pytest.mark.parametrize("method", METHODS)
def test_density_1_is_stock_to_the_bit_and_lower_ones_run(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any], method: str, layout: str
) -> None:
    model.model.layout = layout
    stock = sample(model, noise, conds)
    assert torch.equal(sample(sparse(model, 1.0, method), noise, conds), stock)
    patched = sparse(model, 0.25, method)
    out = sample(patched, noise, conds)
    assert torch.isfinite(out).all() and not torch.equal(out, stock)
    assert counted(patched)["sparse"] == 8  # 2 blocks, 4 steps; both conditionings in one call
    assert counted(patched).get("cross attention", 0) == (8 if layout == "wan" else 0)


def test_the_model_that_a_node_was_put_on_does_not_change(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    stock, options = sample(model, noise, conds), copied(model.model_options)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    sample(guided(sparse(model)), noise, conds)
    assert model.model_options == options and not model.callbacks and not model.wrappers
    assert all(torch.equal(value, weights[name]) for name, value in model.model.state_dict().items())
    assert torch.equal(sample(model, noise, conds), stock)


def test_the_override_that_was_there_gets_every_stock_call_with_its_arguments_unchanged(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    seen = []

    def other(func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((len(args), sorted(kwargs)))
        return func(*args, **kwargs)

    stock = sample(model, noise, conds)
    model.model_options["transformer_options"][OVERRIDE] = other
    assert torch.equal(sample(sparse(model, 1.0), noise, conds), stock)
    self_attention = (4, ["_inside_attn_wrapper", "mask", "transformer_options"])
    assert len(seen) == 16 and seen[0] == self_attention
    seen.clear()
    sample(sparse(model), noise, conds)
    assert len(seen) == 8 and self_attention not in seen  # the cross attention alone


@pytest.mark.parametrize("newer", [False, True])
def test_it_goes_on_top_again_where_another_node_took_its_place(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any], newer: bool
) -> None:
    def later(options: dict[str, Any]) -> None:
        below = options["transformer_options"][OVERRIDE]
        options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: below(func, *args, **kwargs)

    patched = sparse(model)
    expected = sample(patched, noise, conds)
    assert torch.equal(sample(patched, noise, conds, later=later, newer=newer), expected)
    assert counted(patched)["sparse"] == 8


def test_masks_of_keys_are_computed_with_and_square_ones_are_stock_and_counted(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    keys = torch.zeros(1, 1, 1, 320)
    keys[..., 300:] = float("-inf")
    model.model.mask = keys
    patched = sparse(model, 0.5)
    assert torch.isfinite(sample(patched, noise, conds)).all() and counted(patched)["sparse"] == 8
    model.model.mask = torch.ones(320, 320, dtype=torch.bool).tril()
    stock = sample(model, noise, conds)
    assert torch.equal(sample(patched, noise, conds), stock) and counted(patched)["square attention mask"] == 8


def test_percents_short_sequences_and_dense_blocks_are_stock_and_counted(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    late = sparse(model, start_percent=0.4)  # noise levels 0.6 and below: two of the four steps
    sample(late, noise, conds)
    assert counted(late)["outside the start and end percent"] == 4 and counted(late)["sparse"] == 4
    long = sparse(model, min_tokens=400)
    assert torch.equal(sample(long, noise, conds), sample(model, noise, conds))
    assert counted(long)["sequence under 400 tokens"] == 8
    some = sparse(model, dense_blocks="1")
    sample(some, noise, conds)
    assert counted(some)["dense layer"] == 4 and counted(some)["sparse"] == 4


def test_state_is_kept_by_block_and_conditioning_and_freed_at_the_end(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    patched, kept = sparse(model, method="re-ttention"), []
    run = patch(patched).run
    run.observers.append(lambda call, request, out: kept.append((call.clock.step, call.branches, run.window[0])))
    first = sample(patched, noise, conds)
    assert kept[0] == (0, ("cond", "uncond"), ("first", "second")) and kept[-1][0] == 3
    assert not any(layer.state for layer in run.layers)
    assert torch.equal(sample(patched, noise, conds), first)  # nothing of the run before is used


def test_state_is_not_kept_where_tiles_share_a_conditioning(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    patched = sparse(model, method="re-ttention")
    run, options = patch(patched).run, {"sigmas": torch.tensor([1.0]), "uuids": ["a"], "sample_sigmas": SIGMAS}
    run.begin_run()
    run.begin_model_call(noise, options, (1, 2, 2))
    assert run.layer_of({**options, "block_index": 0}, torch.zeros(1, 320, 2, 8)).stateless is None
    run.begin_model_call(noise, options, (1, 2, 2))
    assert run.layers[0].stateless == "one conditioning came again in the first step"


def test_blocks_whose_tokens_are_not_known_are_counted_but_not_perturbed(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    """As the first blocks of models that say where the image is in the later ones alone."""
    model.model.layout, model.model.silent = "joint", 1
    patched = sparse(model, dense_blocks="1")
    sample(patched, noise, conds)
    assert counted(patched) == {"unknown token layout for 332 tokens": 4, "dense layer": 4, "sparse": 0}
    sample(guided(model, heads="1:0"), noise, conds)
    with pytest.raises(DitAttnError, match=r"block double\.0 cannot be perturbed"):
        sample(guided(model, heads="0:0"), noise, conds)


def test_guidance_adds_the_difference_to_a_pass_with_perturbed_heads(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    stock = sample(model, noise, conds)
    assert torch.equal(sample(guided(model, 0.0), noise, conds), stock)
    assert torch.equal(sample(guided(model, u=0.0), noise, conds), stock)
    outs = [sample(guided(model, heads=heads), noise, conds) for heads in ("1:0", "1:1", "")]
    assert not any(torch.equal(a, b) for a, b in ((outs[0], stock), (outs[0], outs[1]), (outs[1], outs[2])))
    ended = guided(model, end_percent=0.2)  # the first step alone
    assert not torch.equal(sample(ended, noise, conds), outs[0])
    assert sum(layer.stats.calls for layer in patch(ended).run.layers) == 10


@pytest.mark.parametrize("target", TARGETS[:3])
def test_guidance_composes_with_a_sparse_method_in_any_order(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any], target: str
) -> None:
    one = sample(guided(sparse(model), target=target), noise, conds)
    assert torch.equal(sample(sparse(guided(model, target=target)), noise, conds), one)
    dense = sample(guided(sparse(model, 1.0), target=target), noise, conds)
    assert torch.equal(dense, sample(guided(model, target=target), noise, conds)) and not torch.equal(dense, one)


def test_a_second_node_of_a_kind_takes_the_place_of_the_first(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    twice = guided(sparse(guided(sparse(model, 0.5)), 0.25), 1.0)
    assert torch.equal(sample(twice, noise, conds), sample(guided(sparse(model, 0.25), 1.0), noise, conds))
    assert len(twice.model_options["sampler_post_cfg_function"]) == 1


@pytest.mark.parametrize(
    ("put", "inputs", "message"),
    [
        (sparse, {"settings": "{"}, "settings are not JSON"),
        (sparse, {"settings": "[1]"}, "settings must be a JSON object"),
        (sparse, {"settings": '{"blocks": 3}'}, "blocks"),
        (sparse, {"method": "sla"}, "does not run in ComfyUI"),
        (sparse, {"dense_blocks": "a"}, "dense_blocks"),
        (sparse, {"dense_blocks": "7"}, "names layer 7"),
        (sparse, {"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 is not before end_percent 0.2"),
        (guided, {"heads": "1:"}, "heads"),
        (guided, {"u": 2.0}, "softpag.u"),
    ],
)
def test_bad_input_gets_one_line(model: FakePatcher, put: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message) as caught:
        put(model, **inputs)
    assert "\n" not in str(caught.value) and not model.callbacks


def test_an_unknown_head_stops_the_run_in_one_line_and_leaves_no_state(
    model: FakePatcher, noise: torch.Tensor, conds: list[Any]
) -> None:
    with pytest.raises(DitAttnError, match="has no head 9"):
        sample(guided(model, heads="1:9"), noise, conds)


def test_the_folder_is_a_custom_node_by_one_link(tmp_path: Path) -> None:
    """It is loaded by its path, under another name."""
    link = tmp_path / "dit_attn_nodes"
    link.symlink_to(Path(package.__path__[0]))
    spec = importlib.util.spec_from_file_location("linked_node", link / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in module.NODE_CLASS_MAPPINGS.values():
        given = node.INPUT_TYPES()
        assert given["required"]["model"] == ("MODEL",) and hasattr(node, node.FUNCTION)


def test_an_environment_without_the_package_is_told_so_in_one_line(tmp_path: Path) -> None:
    link = tmp_path / "nodes"
    link.symlink_to(Path(package.__path__[0]))
    code = f"import runpy; runpy.run_path({str(link / '__init__.py')!r})"
    told = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "the Python of this ComfyUI has no dit_attn" in told.stderr.splitlines()[-1]
