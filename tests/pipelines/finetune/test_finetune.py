"""Fine-tuning with a sparse method: examples, losses, the loop and its checkpoints, the result."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dit_attn
from dit_attn import SLA, BlockSparse, DitAttnError, MoH, RectifiedSpaAttn, ReTtention, SoftPAG, models
from dit_attn.errors import RunStopped
from dit_attn.pipelines.finetune import (
    Example,
    Finetune,
    FinetuneConfig,
    load_sla_state,
    merge_weights,
    read_example,
    read_examples,
    record_examples,
    write_example,
)
from dit_attn.pipelines.finetune.loop import CHECKPOINT
from dit_attn.pipelines.finetune.objective import Parameterization, prepare
from dit_attn.pipelines.worker_share import WorkerShare
from tests._support.compose import forward, tiny
from tests._support.ranks import run_ranks

PROMPTS = ["a large purple circle moving left fast on black", "a small red square moving right slow on white"]
CALL = {**models.call_defaults("tiny-video"), "num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 4}
METHOD = SLA(density=0.2, q_block=32, kv_block=32, order="none")
CONFIG = FinetuneConfig(METHOD, steps=3, batch=1, lr=1e-3, log_every=3, held_out=0.0)


def small() -> Any:
    """What the loop needs of a pipeline, around a random transformer of two layers, the same every time."""
    scheduler = SimpleNamespace(config={"use_flow_sigmas": True, "prediction_type": "sample"})
    return SimpleNamespace(transformer=tiny("wan")[0], scheduler=scheduler)


@pytest.fixture(scope="module")
def pipe() -> Any:
    found = models.load("tiny-video")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def recorded(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four calls of the teacher."""
    return record_examples(pipe, PROMPTS, tmp_path_factory.mktemp("calls"), calls_per_run=2, call=CALL)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Calls of the small transformer with what it predicts, dense."""
    model, args = tiny("wan")
    folder, rng = tmp_path_factory.mktemp("examples"), torch.Generator().manual_seed(0)
    for index in range(4):
        given = {**args, "hidden_states": torch.randn(args["hidden_states"].shape, generator=rng)}
        write_example(Example(given, forward(model, given)), folder / f"{index}.safetensors")
    return read_examples(folder)


@pytest.fixture(scope="module")
def clean(examples: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same without a time step: clean latents."""
    folder = tmp_path_factory.mktemp("clean")
    for path in examples[:2]:
        given = {name: x for name, x in read_example(path).arguments.items() if name != "timestep"}
        write_example(Example(given), folder / path.name)
    return read_examples(folder)


# -- examples ----------------------------------------------------------------------------------------------------------


def test_the_target_of_a_recorded_call_is_what_the_dense_model_gives(pipe: Any, recorded: list[Path]) -> None:
    for example in map(read_example, recorded):
        with torch.no_grad():
            found = pipe.transformer(**example.arguments, return_dict=False)[0]
        assert not example.clean and torch.equal(found, example.target)


def test_runs_that_are_there_are_not_made_again(pipe: Any, recorded: list[Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("a run was made again"))
    folder = recorded[0].parent
    assert record_examples(pipe, PROMPTS, folder, calls_per_run=2, call=CALL) == recorded == read_examples(folder)


def test_processes_share_the_runs_and_get_the_files_of_all(pipe: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"calls_per_run": 1, "call": CALL}
    record_examples(pipe, PROMPTS, tmp_path, share=WorkerShare(1, 2), **given)
    assert {path.name[:5] for path in tmp_path.iterdir()} == {f"{n:05d}" for n in range(1, len(PROMPTS), 2)}
    found = record_examples(pipe, PROMPTS, tmp_path, share=WorkerShare(0, 2), **given)
    assert len(found) == len(PROMPTS)


def test_a_route_that_learns_nothing_is_refused_where_it_is_all_that_is_trained(examples: list[Path]) -> None:
    with pytest.raises(DitAttnError, match="moh has nothing to train with these settings"):
        Finetune(small(), replace(CONFIG, method=MoH(route="query", top_k=1), stage="proj"), examples)


def test_launches_that_split_the_model_in_other_ways_are_refused(examples: list[Path], monkeypatch: Any) -> None:
    import accelerate

    with pytest.raises(DitAttnError, match="one process has nothing to split"):
        Finetune(small(), CONFIG, examples, fsdp=True)
    split = SimpleNamespace(distributed_type=accelerate.DistributedType.DEEPSPEED)
    monkeypatch.setattr(accelerate, "Accelerator", lambda cpu: split)
    with pytest.raises(DitAttnError, match="launch without it and split with --fsdp"):
        Finetune(small(), CONFIG, examples)


def test_what_a_run_ends_in_is_a_clean_example(pipe: Any, tmp_path: Path) -> None:
    (file,) = record_examples(pipe, PROMPTS[:1], tmp_path, clean=True, call=CALL)
    example = read_example(file)
    generator = torch.Generator("cpu").manual_seed(0)
    expected = pipe(PROMPTS[0], generator=generator, output_type="latent", **CALL).frames
    assert example.clean and torch.equal(example.arguments["hidden_states"], expected)


def test_arguments_come_back_as_they_were(tmp_path: Path) -> None:
    given = {"hidden_states": torch.randn(1, 2), "nested": [torch.ones(2), {"x": torch.zeros(1), "y": 3}], "flag": None}
    write_example(Example(given), tmp_path / "one.safetensors")
    found = read_example(tmp_path / "one.safetensors")
    assert found.clean and found.target is None and found.arguments["nested"][1]["y"] == 3
    assert torch.equal(found.arguments["hidden_states"], given["hidden_states"])
    with pytest.raises(DitAttnError, match="cannot be saved"):
        write_example(Example({"hidden_states": torch.ones(1), "bad": object()}), tmp_path / "two.safetensors")


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    (
        ({"a": torch.ones(1)}, None, "is no training example"),
        ({"a": torch.ones(1)}, '{"x": {"tensor": "a"}}', "has no latents"),
        ({"a": torch.ones(1)}, '{"hidden_states": {"tensor": "a"}, "timestep": 3}', "a time step and no target"),
        ({"a": torch.ones(1)}, '{"hidden_states": {"tensor": "b"}}', "is no training example"),
    ),
)
def test_a_file_that_is_no_example_is_one_line(tmp_path: Path, tensors: Any, about: Any, message: str) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"arguments": about} if about else None)
    with pytest.raises(DitAttnError, match=message):
        read_examples(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(DitAttnError, match="no file of weights alone"):
        read_example(file)
    with pytest.raises(DitAttnError, match="has no examples"):
        read_examples(tmp_path / "absent")


# -- losses ------------------------------------------------------------------------------------------------------------


def test_clean_latents_are_noised_and_the_targets_are_those_of_the_formulas() -> None:
    x = torch.randn(2, 3, 4)
    config = FinetuneConfig(METHOD, loss="flow")
    for predicts in ("flow", "sample"):
        about = Parameterization(predicts, 1000.0, True)
        generator = torch.Generator().manual_seed(0)
        given, target, weight = prepare(Example({"hidden_states": x}), about, config, generator, pytest.fail)
        s = given["timestep"][0] / 1000
        noise = (given["hidden_states"] - (1 - s) * x) / s
        torch.testing.assert_close(noise[0], noise[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(target, noise - x if predicts == "flow" else x, atol=1e-4, rtol=1e-4)
        expected = 1.0 if predicts == "flow" else float(s.clamp(min=0.05)) ** -2
        torch.testing.assert_close(weight, torch.full((2,), expected))
    with pytest.raises(DitAttnError, match="predicts epsilon"):
        Parameterization("epsilon", 1000.0, False).check(config, clean=True)
    with pytest.raises(DitAttnError, match="needs clean latents"):
        Parameterization("flow", 1000.0, True).check(config, clean=False)


@pytest.mark.parametrize("loss", ("flow", "teacher"))
def test_clean_latents_train_by_either_loss(clean: list[Path], loss: str, tmp_path: Path) -> None:
    job = Finetune(small(), replace(CONFIG, loss=loss, steps=2), clean)
    job.fit(tmp_path)
    assert job.step == 2 and job.log[-1]["loss"] > 0.0


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_the_loss_falls_by_more_than_half_and_gradients_reach_everything(examples: list[Path], tmp_path: Path) -> None:
    job = Finetune(small(), replace(CONFIG, steps=50, warmup=5, log_every=50), examples)
    trained = {name: x.detach().clone() for name, x in job.trained.items()}
    job.held_out = examples
    before = job.held_out_loss()
    job.fit(tmp_path)
    after = job.held_out_loss()
    assert before is not None and after is not None and after < 0.5 * before, (before, after)
    moved = {name for name, x in job.trained.items() if not torch.equal(x, trained[name])}
    assert {name for name in trained if ".attn1.to_" in name or name.startswith("dit_attn.")} <= moved


def test_a_stopped_run_ends_as_one_that_was_not(examples: list[Path], tmp_path: Path) -> None:
    config = replace(CONFIG, ema=0.9, held_out=0.3, densities=(0.4, 0.2), gradient_checkpointing=True)
    whole = Finetune(small(), config, examples)
    whole.fit(tmp_path / "whole")
    assert [entry["density"] for entry in whole.log] == [0.4, 0.2] and "held_out" in whole.log[-1]
    part = Finetune(small(), config, examples)

    def stop(step: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.fit(tmp_path / "part", stop)
    again = Finetune(small(), config, examples)
    again.restore(tmp_path / "part")
    assert again.step == 2
    again.fit(tmp_path / "part")
    assert all(torch.equal(x, whole.trained[name]) for name, x in again.trained.items())
    assert all(torch.equal(x, whole.average[name]) for name, x in again.average.items())
    other = Finetune(small(), replace(config, stage="proj"), examples)
    with pytest.raises(DitAttnError, match="belongs to another model, method, stage"):
        other.restore(tmp_path / "part")
    with pytest.raises(DitAttnError, match="nothing to resume"):
        other.restore(tmp_path)


def train_rank(rank: int, folder: Path, kinds: dict[str, list[Path]]) -> None:
    """One of two processes, for each kind of examples: two steps, a checkpoint, and the third step of a new job."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    for kind, files in kinds.items():
        Finetune(small(), replace(CONFIG, steps=2, log_every=1), files).fit(folder / kind / "run")
        torch.distributed.barrier()
        job = Finetune(small(), replace(CONFIG, steps=3, log_every=1), files)
        job.restore(folder / kind / "run")
        job.fit(folder / kind / f"run{rank}")
        losses = [entry["loss"] for entry in job.log if "loss" in entry]
        (folder / kind / f"log{rank}.json").write_text(json.dumps(losses))


def test_two_processes_train_like_one_with_their_batch_and_one_writes(
    examples: list[Path], clean: list[Path], tmp_path: Path
) -> None:
    kinds = {"examples": examples, "clean": clean}
    run_ranks(train_rank, 2, tmp_path, kinds)
    for kind, files in kinds.items():
        job, folder = Finetune(small(), replace(CONFIG, steps=3, log_every=1, batch=2), files), tmp_path / kind
        job.fit(folder / "alone")
        alone = [entry["loss"] for entry in job.log if "loss" in entry]
        for rank in (0, 1):
            assert json.loads((folder / f"log{rank}.json").read_text()) == pytest.approx(alone, rel=1e-4)
        assert (folder / "run0" / CHECKPOINT).exists() and not (folder / "run1" / CHECKPOINT).exists()


def train_part(rank: int, folder: Path, examples: list[Path], config: FinetuneConfig) -> None:
    """One of two processes with a part of the model: the last steps of a run of one process, and the result."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    job = Finetune(small(), config, examples, fsdp=True)
    assert sum(x.to_local().numel() for x in job.trained.values()) < 0.6 * sum(x.numel() for x in job.trained.values())
    job.restore(folder / "one")
    job.fit(folder / "two")
    (folder / f"log{rank}.json").write_text(json.dumps([entry["held_out"] for entry in job.log]))
    job.gather()
    if rank == 0:
        job.export(folder / "result")


def test_a_split_model_goes_on_from_a_whole_one_and_ends_as_it_would(examples: list[Path], tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3, log_every=1, ema=0.5, held_out=0.3, gradient_checkpointing=True)
    whole = Finetune(small(), replace(config, batch=2), examples)
    whole.fit(tmp_path / "whole")
    begun = Finetune(small(), replace(config, batch=2, steps=1), examples)
    begun.fit(tmp_path / "one")
    run_ranks(train_part, 2, tmp_path, examples, config)
    losses = [entry["held_out"] for entry in whole.log]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"log{rank}.json").read_text()) == pytest.approx(losses, rel=1e-4)
    expected, found = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("whole", "two"))
    for part in ("trained", "average"):
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, atol=2e-4, rtol=1e-3)
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    whole.export(tmp_path / "expected")
    names = {file.relative_to(tmp_path / "expected") for file in (tmp_path / "expected").rglob("*.*")}
    assert names == {file.relative_to(tmp_path / "result") for file in (tmp_path / "result").rglob("*.*")}
    for name in names:
        if name.suffix == ".safetensors":
            own, other = load_file(tmp_path / "result" / name), load_file(tmp_path / "expected" / name)
            for key, value in other.items():
                torch.testing.assert_close(own[key], value, atol=2e-4, rtol=1e-3)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(
    examples: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    job = Finetune(small(), replace(CONFIG, checkpoint_every=1), examples)
    stock = Finetune.loss_of

    def broken(self: Finetune, example: Example, generator: torch.Generator) -> torch.Tensor:
        loss = stock(self, example, generator)
        return loss * float("nan") if self.step == 1 else loss

    monkeypatch.setattr(Finetune, "loss_of", broken)
    with pytest.raises(RunStopped, match="loss of step 2 is not finite; the checkpoint of step 1 is kept"):
        job.fit(tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 1 and all(torch.isfinite(x).all() for x in state["trained"].values())


@pytest.mark.parametrize(
    "method", (BlockSparse(density=0.2, q_block=32, kv_block=32), RectifiedSpaAttn(q_block=32, kv_block=32))
)
def test_other_sparse_methods_take_its_place(examples: list[Path], method: Any, tmp_path: Path) -> None:
    pipe = small()
    job = Finetune(pipe, replace(CONFIG, method=method, steps=1, bf16=True), examples)
    job.fit(tmp_path)
    assert dit_attn.summary(pipe.transformer).sparse_calls
    assert [place.name for place in job.export(tmp_path)] == ["method", "transformer"]


def test_adapters_train_with_the_projections_and_are_written(examples: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pipe = small()
    stock = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    job = Finetune(pipe, replace(CONFIG, stage="lora", rank=2, steps=1), examples)
    assert all("lora_" in name or name.startswith("dit_attn.") for name in job.trained)
    job.fit(tmp_path)
    assert [place.name for place in job.export(tmp_path)] == ["method", "lora"]
    assert list((tmp_path / "lora").glob("*.safetensors"))
    dit_attn.disable(pipe)
    pipe.transformer.unload_lora()
    assert all(torch.equal(x, stock[name]) for name, x in pipe.transformer.state_dict().items())


def test_the_result_is_what_from_pretrained_and_enable_take(examples: list[Path], tmp_path: Path) -> None:
    pipe = small()
    job = Finetune(pipe, replace(CONFIG, ema=0.5), examples)
    job.fit(tmp_path)
    job.export(tmp_path)
    arguments = read_example(examples[0]).arguments
    job.model.eval()
    with torch.no_grad():
        expected = job.predict(arguments)
    tuned = type(pipe.transformer).from_pretrained(tmp_path / "transformer")
    dit_attn.enable(tuned, str(tmp_path / "method"))
    with torch.no_grad():
        assert torch.equal(tuned(**arguments, return_dict=False)[0], expected)
    assert all(torch.equal(job.trained[name], job.average[name]) for name in job.average)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"stage": "half"}, "unknown stage 'half'"),
        ({"loss": "l2"}, "unknown loss 'l2'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"densities": (0.5, 2.0)}, "densities must be above 0"),
        ({"method": SoftPAG()}, "softpag decides no keys and learns nothing"),
        ({"method": ReTtention()}, "goes by what earlier steps of a run stored"),
        ({"method": BlockSparse(), "stage": "proj"}, "block-sparse learns no tensors of its own"),
        ({"method": BlockSparse(top_p=0.9), "densities": (0.5,)}, "has no density to change"),
    ),
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        FinetuneConfig(**{"method": METHOD, **changes})


# -- weights of others -------------------------------------------------------------------------------------------------


def test_a_merge_adds_what_the_tuning_changed(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base, target = ({"a": torch.randn(3, generator=rng), "b": torch.randn(2, generator=rng)} for _ in range(2))
    tuned = {**base, "a": base["a"] + 1.0}
    target = {name: x.bfloat16() for name, x in target.items()}
    for name, state in (("base", base), ("tuned", tuned), ("target/transformer", target)):
        (tmp_path / name).mkdir(parents=True)
        save_file(state, tmp_path / name / "diffusion_pytorch_model.safetensors")
    (tmp_path / "target/transformer/config.json").write_text("{}")
    places = [tmp_path / name for name in ("base", "tuned", "target", "out")]
    assert merge_weights(*places) == {"tensors": 2, "changed": 1}
    found = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert torch.equal(found["b"], target["b"]) and (tmp_path / "out/config.json").is_file()
    torch.testing.assert_close(found["a"].float(), target["a"].float() + 1.0, atol=2e-2, rtol=0)
    save_file({**tuned, "a": torch.ones(4)}, tmp_path / "tuned/diffusion_pytorch_model.safetensors")
    with pytest.raises(DitAttnError, match=r"a is \(4,\) and in target \(3,\) in tuned"):
        merge_weights(*places)
    save_file({**tuned, "c": torch.ones(4)}, tmp_path / "tuned/diffusion_pytorch_model.safetensors")
    with pytest.raises(DitAttnError, match="c is missing in target"):
        merge_weights(*places)
    with pytest.raises(DitAttnError, match="has no transformer weights"):
        merge_weights(tmp_path / "absent", *places[1:])


def test_projections_of_other_projects_are_read_by_block(pipe: Any, tmp_path: Path) -> None:
    session = dit_attn.enable(pipe, METHOD)
    size = pipe.transformer.config.attention_head_dim
    name = "net.blocks.{}.self_attn.attn_op.local_attn.proj_l.{}"
    state = {name.format(i, "weight"): torch.full((size, size), float(i)) for i in range(6)}
    state |= {name.format(i, "bias"): torch.full((size,), float(-i)) for i in range(6)}
    save_file({**state, "net.blocks.0.ffn.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    assert load_sla_state(session, tmp_path / "x.safetensors") == 6
    for index, layer in enumerate(session.layers):
        module: Any = layer.learned[id(METHOD)]
        assert (module.weight == index).all() and (module.bias == -index).all()
    wrong = {**state, name.format(3, "weight"): torch.ones(4, 4)}
    for given, message in (
        (wrong, r"the weight of block 3 is \(4, 4\) and must be"),
        ({key: x for key, x in state.items() if ".5." not in key}, "projections of 5 layers and the transformer has 6"),
        ({"a": torch.ones(1)}, "has no projections"),
    ):
        save_file(given, tmp_path / "y.safetensors")
        with pytest.raises(DitAttnError, match=message):
            load_sla_state(session, tmp_path / "y.safetensors")
    assert (session.layers[5].learned[id(METHOD)].weight == 5).all()  # type: ignore[operator]
    with pytest.raises(DitAttnError, match="there is no such file"):
        load_sla_state(session, tmp_path / "absent.safetensors")
    with pytest.raises(DitAttnError, match="enable it first"):
        load_sla_state(dit_attn.enable(pipe, BlockSparse()), tmp_path / "x.safetensors")
