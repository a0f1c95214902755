"""Training: learns, resumes bit by bit, follows its schedule, and writes what the loader reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import items as world_items
from dit_attn.eval.shapes_world import multi, world
from dit_attn.models import evaluate, export, loop
from dit_attn.models.data import corrupt, draw
from dit_attn.models.recipe import RECIPES, NetSize, Stage, recipe

NAMES = sorted(RECIPES)
OF_SHAPES = [name for name in NAMES if RECIPES[name].kind not in ("inspect", "edit")]
OF_TEXT = [name for name in NAMES if RECIPES[name].kind != "edit"]  # the other: tests/models/test_omnigen.py


SMALL = {
    name: NetSize(hidden=32, layers=2, heads=4 if family == "joint" else 2, text_length=chosen.net.text_length)
    for name, chosen in RECIPES.items()
    for family in [chosen.family]
}


def _tiny(name, steps=4, **changes):
    stages = (Stage(0.5, 16, 1, 4, 1.0), Stage(0.5, 16 if name == "tiny-video" else 32, 1, 2, 2.0))
    if name == "tiny-video":
        stages = (stages[0], replace(stages[1], frames=3))
    return replace(recipe(name), steps=steps, warmup=2, stages=stages, net=SMALL[name], warm_start="", **changes)


def _run(name, steps=4, **changes):
    return loop.Run(_tiny(name, steps, **changes), seed=5, device=torch.device("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_and_resumed_run_ends_in_the_same_weights(name, tmp_path):
    whole = _run(name)
    loop.fit(whole, tmp_path / "whole", quiet=True)
    part = _run(name)
    part.recipe, full = replace(part.recipe, steps=4), part.recipe
    _stop_after(part, 2, tmp_path / "part")
    resumed = loop.Run(full, seed=99, device=torch.device("cpu"))
    resumed.restore(tmp_path / "part")
    assert (resumed.step, resumed.seed) == (2, 5)
    loop.fit(resumed, tmp_path / "part", quiet=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
        assert torch.equal(whole.average[key], resumed.average[key]), key


def _stop_after(run, steps, folder):
    """Interrupt `run` as Ctrl-C does, once it has done `steps` steps."""
    original = loop.Run.batch

    def batch(self):
        if self.step >= steps:
            raise KeyboardInterrupt
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(run, folder, quiet=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    run = _run(name, steps=60, lr=3e-3, muon_lr=3e-3)
    batch = run.batch()
    before = float(loop.loss_of(run.model, batch, 0.05).detach())
    for _ in range(30):
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loop.loss_of(run.model, batch, 0.05).backward()
        for optimizer in run.optimizers:
            optimizer.step()
    assert float(loop.loss_of(run.model, batch, 0.05).detach()) < 0.7 * before


def test_a_run_in_minutes_stops_early_and_leaves_a_checkpoint(tmp_path):
    run = _run("tiny-image", steps=1000)
    loop.fit(run, tmp_path, minutes=1e-6, quiet=True)
    assert run.step < 1000
    assert (tmp_path / loop.CHECKPOINT).is_file()


def test_no_temporary_file_is_left(tmp_path):
    loop.fit(_run("tiny-image"), tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == [loop.CHECKPOINT]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "nothing to resume"), (b"rubbish", "not a readable training checkpoint")]
)
def test_resume_without_a_good_checkpoint_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / loop.CHECKPOINT).write_bytes(content)
    with pytest.raises(DitAttnError, match=message) as error:
        _run("tiny-image").restore(tmp_path)
    assert "\n" not in str(error.value)


def test_resume_of_another_model_is_refused(tmp_path):
    _run("tiny-image").save(tmp_path)
    with pytest.raises(DitAttnError, match="belongs to 'tiny-image'"):
        _run("tiny-video").restore(tmp_path)


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    run = _run("tiny-image")
    run.save(tmp_path)
    before = (tmp_path / loop.CHECKPOINT).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DitAttnError, match="No space left"):
        run.save(tmp_path)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_stages_fill_the_run(name):
    chosen = RECIPES[name]
    assert sum(s.share for s in chosen.stages) == pytest.approx(1.0)
    assert chosen.stage_at(0) == chosen.stages[0]
    assert chosen.stage_at(chosen.steps - 1) == chosen.stages[-1]


def test_learning_rate_warms_up_stays_and_decays():
    chosen = recipe("tiny-image")
    scales = [chosen.lr_scale(s) for s in (0, chosen.warmup, chosen.steps // 2, chosen.steps - 1)]
    assert scales[0] < 0.1 and scales[1] == scales[2] == 1.0 and scales[3] < 0.05


def test_data_depend_on_seed_and_step_only():
    first, second = _run("tiny-image"), _run("tiny-image")
    first.model.zero_grad()
    torch.rand(3)
    assert torch.equal(first.batch().noisy, second.batch().noisy)
    second.step = 1
    assert not torch.equal(first.batch().clean, second.batch().clean)


@pytest.mark.parametrize("name", OF_TEXT)
def test_training_calls_the_parts_as_the_stock_pipeline_does(name):
    """A denoising step of the stock pipeline from pure noise equals the trainee's prediction."""
    run = _run(name)
    torch.nn.init.normal_(run.model.transformer.proj_out.weight, std=0.1)
    run.average = {k: v.clone() for k, v in run.model.state_dict().items()}
    pipeline = export.pipeline_of(run)
    pipeline.set_progress_bar_config(disable=True)
    text = "a small red circle at the left on white"
    seen = {}

    def note(module, args, kwargs, out):
        seen.update({"hidden_states": args[0] if args else None, **kwargs, "out": out[0]})

    pipeline.transformer.register_forward_hook(note, with_kwargs=True)
    call = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0}
    call["max_sequence_length"] = run.recipe.net.text_length
    binning = {"use_resolution_binning": False, "clean_caption": False}
    extra = {"tiny-image": binning, "tiny-inspect": binning, "tiny-video": {"num_frames": 1}}
    pipeline(text, output_type="latent", generator=torch.Generator().manual_seed(0), **call, **extra.get(name, {}))
    level = seen["timestep"].float().expand(len(seen["hidden_states"])) / 1000
    stage = Stage(1.0, 16, 1, 1, 1.0)
    tokens = corrupt(torch.zeros(1, 3, 16, 16), [text], stage, run.tokenizer, torch.Generator())
    with torch.no_grad():
        mine = run.averaged()(seen["hidden_states"][:1], level[:1], tokens.ids, tokens.mask)
    assert torch.allclose(mine, seen["out"][:1], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_export_is_a_folder_that_diffusers_loads_with_the_same_weights(name, tmp_path):
    import diffusers

    run = _run(name)
    torch.nn.init.normal_(run.model.transformer.proj_out.weight)
    run.average = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.tokenizer(["a large red circle"], padding="max_length", truncation=True)
    for _ in range(2):  # over an existing folder, too
        export.export(run, tmp_path / "out", {"note": 1})
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    for part in run.model.parts:
        for key, value in getattr(pipeline, part).state_dict().items():
            if f"{part}.{key}" in run.average:  # transformers leaves out tied copies
                assert torch.allclose(value.float(), run.average[f"{part}.{key}"], atol=2e-3), (part, key)
    parts = {name for name, part in pipeline.components.items() if part is not None}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model_index.json", "training.json", *parts}
    saved = [json.loads(path.read_text()) for path in tmp_path.rglob("tokenizer.json")]
    assert saved and all(one["padding"] is one["truncation"] is None for one in saved)  # not those of the last batch


def test_dropped_captions_are_empty_prompts():
    run = _run("tiny-image", caption_drop=1.0)
    batch = draw(run.recipe, run.recipe.stages[0], run.tokenizer, torch.Generator().manual_seed(0), run.device)
    assert batch.mask.sum(1).tolist() == [1] * 4  # the end token alone


def test_rates_of_a_tail_are_lower_and_fall_nearly_from_the_first_step():
    whole, tail = recipe("tiny-image"), recipe("tiny-image", tail=True)
    assert tail.lr < whole.lr and tail.muon_lr < whole.muon_lr
    second = tail.stretched(7, 0.5)
    assert (second.steps, second.lr, second.muon_lr) == (7, tail.lr / 2, tail.muon_lr / 2)
    assert tail.lr_scale(tail.steps // 2) < 0.6 and {stage.size for stage in tail.stages} == {128}


def test_interval_is_wilsons():
    low, high = evaluate.interval(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert evaluate.interval(10, 10)[1] == 1.0 and evaluate.interval(10, 10)[0] > 0.7


@pytest.mark.parametrize("name", OF_SHAPES)
def test_evaluation_scores_ground_truth_as_right(name):
    kind = recipe(name).kind
    items = world_items.held_out_sample(kind, 5 if kind == "video" else 12)
    if kind == "video":
        outputs = world.render_videos(items, 9, 48).permute(0, 2, 3, 4, 1).numpy()
    else:
        drawn = multi.render_scenes(items, 64) if kind == "multi" else world.render_scenes(items, 64)
        outputs = drawn.permute(0, 2, 3, 1).numpy()
    samples = [evaluate.judged(i, o) for i, o in zip(items, outputs)]
    result = evaluate.table(samples)
    assert result["whole_caption"]["accuracy"] == 1.0
    assert result["seen_pairs"]["of"] + result["never_seen_pairs"]["of"] == len(items)
    for figure in result["outlines"].values():
        assert figure["of"] == len(items) and figure["mean"] == pytest.approx(1.0, abs=0.03)
        assert figure["ci95"][0] <= figure["mean"] <= figure["ci95"][1]
    assert evaluate.contact_sheet(samples).size[0] > 100


def test_figures_of_objects_count_each_by_the_number_in_its_scene_and_words_where_it_is_present():
    """Of each pair the first object is drawn in the color of the second, and the second is left out."""
    scenes = [scene for scene in multi.held_out_sample(16) if len(scene.objects) < 3]
    samples = []
    for scene in scenes:
        first, *rest = scene.objects
        shown = (replace(first, color=rest[0].color if rest else first.color),)
        image = multi.render_scenes([multi.MultiScene(shown, scene.background)], 64)[0]
        samples.append(evaluate.judged(scene, image.permute(1, 2, 0).numpy()))
    found = evaluate.table(samples)["objects"]
    one, two = found["1"], found["2"]
    assert one["present"]["accuracy"] == one["color_given_present"]["accuracy"] == 1.0
    assert two["present"]["right"] == 4 and two["present"]["of"] == 8
    assert two["color_given_present"]["right"] == 0 and two["color_given_present"]["of"] == 4
    assert two["leak_given_present"]["right"] == 4 and two["shape_given_present"]["accuracy"] == 1.0
    assert found["all"]["present"]["of"] == 12
    assert "objects" not in evaluate.table(
        [evaluate.judged(world.Scene("circle", "red", "large", "left", 1, "white"), np.ones((64, 64, 3)))]
    )


def test_a_checkpoint_is_scored_as_the_run_it_belongs_to(tmp_path, monkeypatch, capsys):
    """``python -m dit_attn.models.evaluate tiny-multi --run DIR``: the weights of the run, not the shipped ones."""
    run = _run("tiny-multi")
    run.step = 3
    run.save(tmp_path)
    monkeypatch.setitem(RECIPES, "tiny-multi", run.recipe)
    words = ["--count", "2", "--steps", "1", "--size", "32", "--run", str(tmp_path)]
    words += ["--output", str(tmp_path / "out.json")]
    assert evaluate.main(["tiny-multi", *words]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record == json.loads(capsys.readouterr().out)
    assert record["command"].endswith(f"--steps 1 --size 32 --run {tmp_path}") and record["call"]["width"] == 32
    assert record["training_steps"] == 3 and record["objects"]["all"]["present"]["of"] == 3
