"""The file of a search is read back, refused on another model, and uploaded with its method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search.head_set import HeadSet
from tests._support.compose import tiny_pipeline


def saved(tmp_path: Path, **changes: Any) -> str:
    facts: dict[str, Any] = {"model": "m", "transformer": "FluxTransformer2DModel"}
    facts |= {"target": "identity", "joint": "joint"}
    heads = (("transformer_blocks.0.attn", 0, 0.5),)
    return str(HeadSet(**{**facts, "heads": heads, "scale": 3.0, **changes}).save(tmp_path / "heads.json"))


def test_heads_of_another_model_or_convention_are_refused_unless_forced(tmp_path: Path) -> None:
    pipe, _ = tiny_pipeline("sd3")
    file = saved(tmp_path)
    with pytest.raises(DitAttnError, match="found on FluxTransformer2DModel, and this model is SD3Transformer2DModel"):
        dit_attn.enable(pipe, dit_attn.SoftPAG(heads=file))
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads=file, force=True))
    dit_attn.disable(pipe)
    file = saved(tmp_path, joint="image-rows")
    with pytest.raises(DitAttnError, match="found with joint='image-rows'"):
        dit_attn.SoftPAG(heads=file)
    assert dit_attn.SoftPAG(heads=file, joint="image-rows").heads == "transformer_blocks.0.attn:0@0.5"


def test_pushing_uploads_the_method_and_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo: str, **_: Any) -> None: ...

        def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, **_: Any) -> str:
            sent[path_in_repo] = json.loads(path_or_fileobj)
            return "address"

        def create_commit(self, repo: str, operations: Any, **_: Any) -> str:
            sent.update({part.path_in_repo: json.loads(part.path_or_fileobj) for part in operations})
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert HeadSet.load(saved(tmp_path)).push_to_hub("me/heads") == "address"
    assert sent["heads.json"]["heads"] == [["transformer_blocks.0.attn", 0, 0.5]]
    method = dit_attn.Method.from_dict(sent["dit_attn_method.json"])
    assert isinstance(method, dit_attn.SoftPAG) and method.found_on == "FluxTransformer2DModel"
