"""Training the offline judge: it learns, stops and goes on, and leaves a folder transformers can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_attn.cli import main
from dit_attn.eval.shapes_world import world, world_clip
from dit_attn.models.world_clip import Recipe, Training, build_tokenizer


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for item in world.all_scenes()[::37]:
        text = world.caption(item)
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == text.split()


def test_the_loss_falls_and_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    recipe, cpu = Recipe(steps=16, batch=16, warmup=0.1), torch.device("cpu")
    straight = Training(recipe, 3, cpu)
    losses = [straight.advance() for _ in range(16)]
    assert sum(losses[-4:]) < sum(losses[:4])
    first = Training(recipe, 3, cpu)
    for _ in range(7):
        first.advance()
    first.save(tmp_path)
    second = Training(recipe, 3, cpu)
    second.restore(tmp_path)
    for _ in range(9):
        second.advance()
    pairs = zip(straight.model.parameters(), second.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_command_trains_exports_and_says_how_good_it_is(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "world-clip", "--output", str(tmp_path), "--threads", "1"]
    assert main([*words, "--steps", "1"]) == 0
    assert "of 200 held-out scenes" in capsys.readouterr().out
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["steps_done"] == 1 and record["recipe"]["batch"] == 96
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert world_clip.world_scores(images, ["a red circle", "a cat"], tmp_path / "model").shape == (2,)
    assert main([*words, "--steps", "1"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "world-clip", "--output", str(tmp_path / "none"), "--resume"]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert main(["train", "world-clap"]) == 2
    assert "unknown model 'world-clap'" in capsys.readouterr().err


def test_the_shipped_weights_say_how_they_were_made() -> None:
    record = json.loads((world_clip.FOLDER / "training.json").read_text())
    assert record["held_out"]["image_to_caption"] > 0.8 and record["held_out"]["of"] == 200
    assert sum(file.stat().st_size for file in world_clip.FOLDER.iterdir()) < 5e6


def test_pixels_agree_with_the_processor() -> None:
    images = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    made = world_clip.load()[1](images=list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(world_clip.pixels(images), made, atol=1e-6, rtol=0)
