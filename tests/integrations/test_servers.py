"""The server plug-ins on stubs of what they hook; a moved signature is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.integrations import server_options, sglang, vllm_omni
from dit_attn.processors.attach.attach import session_of
from tests._support.wan import WAN

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="tomllib is part of Python from 3.11 on")


def pipeline() -> Any:
    """A small Wan."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler}
    return WanPipeline(transformer=WanTransformer3DModel(**WAN).eval(), **parts)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module that can be imported by its name, with the packages it lies in."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        found = ModuleType(".".join(parts[:count]))
        monkeypatch.setitem(sys.modules, found.__name__, sys.modules.get(found.__name__, found))
    sys.modules[name].__dict__.update(contents)
    return sys.modules[name]


class HookType(Enum):
    """Of SGLang's hooks."""

    AFTER = "after"


class HookRegistry:
    """SGLang's registry: hooks by their target, as ``fn(result, *args, **kwargs)``."""

    hooks: list[tuple[str, Callable[..., Any], HookType]]

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls.hooks.append((target, hook, hook_type))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> type[HookRegistry]:
    """An empty registry of an SGLang."""
    HookRegistry.hooks = []
    plugins = "sglang.multimodal_gen.runtime.platforms.plugins"
    module(monkeypatch, plugins, HookRegistry=HookRegistry, HookType=HookType)
    return HookRegistry


def adapter(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> Any:
    """A diffusers adapter of a vLLM-Omni whose ``load_weights`` is ``load``."""
    kind = type("DiffusersAdapterPipeline", (), {"load_weights": load})
    name = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_diffusers_adapter"
    module(monkeypatch, name, DiffusersAdapterPipeline=kind)
    return kind


def load_weights(self: Any) -> None:
    self._pipeline = pipeline()


def test_entry_points_name_the_functions() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    for group, plugin in (("sglang.multimodal_gen.plugins", sglang), ("vllm_omni.general_plugins", vllm_omni)):
        (value,) = project["entry-points"][group].values()
        path, _, name = value.partition(":")
        assert getattr(import_module(path), name) is plugin.register


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers are not even imported."""
    monkeypatch.delenv(server_options.VARIABLE, raising=False)
    sglang.register()
    vllm_omni.register()


def test_sglang_enables_after_its_attention_backend(
    monkeypatch: pytest.MonkeyPatch, registry: type[HookRegistry]
) -> None:
    monkeypatch.setenv(server_options.VARIABLE, "block-sparse")
    sglang.register()
    ((target, hook, kind),) = registry.hooks
    assert target == sglang.TARGET and kind is HookType.AFTER
    first, second = pipeline(), pipeline()
    assert hook(None, object(), first, object()) is None  # the result stays what it is
    hook(None, object(), second, server_args=object())
    for pipe in (first, second):
        session = session_of(pipe.transformer)
        assert session is not None and session.methods[0].slug == "block-sparse"


@pytest.mark.parametrize("args", [(), (1, 2), (1, 2, 3, 4)])
def test_sglang_refuses_a_moved_signature(
    monkeypatch: pytest.MonkeyPatch, registry: type[HookRegistry], args: tuple[int, ...]
) -> None:
    monkeypatch.setenv(server_options.VARIABLE, "block-sparse")
    sglang.register()
    with pytest.raises(DitAttnError, match=r"other arguments than \(self, pipe, server_args\)"):
        registry.hooks[0][1](None, *args)


def test_vllm_omni_enables_after_the_weights_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server_options.VARIABLE, '{"method": "block-sparse", "density": 0.5}')
    kind = adapter(monkeypatch, load_weights)
    vllm_omni.register()
    wrapped = kind.load_weights
    vllm_omni.register()
    assert kind.load_weights is wrapped
    one = kind()
    one.load_weights()
    session = session_of(one._pipeline.transformer)
    assert session is not None and session.methods == (dit_attn.BlockSparse(density=0.5),)


def test_vllm_omni_refuses_a_moved_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server_options.VARIABLE, "block-sparse")
    adapter(monkeypatch, lambda self, weights: None)
    with pytest.raises(DitAttnError, match=r"takes \(self, weights\), not \(self\) as in vLLM-Omni 0\.30\.0"):
        vllm_omni.register()
    kind = adapter(monkeypatch, lambda self: None)
    vllm_omni.register()
    with pytest.raises(DitAttnError, match="no _pipeline"):
        kind().load_weights()


def test_copies_of_a_request_share_the_methods_of_the_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server_options.VARIABLE, '{"method": "block-sparse", "dense_steps": 0}')
    pipe = pipeline()
    server_options.enable_on(pipe, server_options.requested_methods())
    copy = WanPipeline.from_pipe(pipe)
    out = copy(
        prompt_embeds=torch.randn(1, 8, 16), negative_prompt_embeds=torch.randn(1, 8, 16), height=128, width=128,
        num_frames=13, num_inference_steps=2, output_type="latent",
    )  # fmt: skip
    assert torch.isfinite(out.frames).all() and dit_attn.summary(copy).sparse_calls == 8


def test_several_methods_and_saved_ones_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(server_options.VARIABLE, " block-sparse , softpag")
    assert server_options.requested_methods() == ("block-sparse", "softpag")
    saved = dit_attn.BlockSparse(density=0.5).save_pretrained(str(tmp_path))
    monkeypatch.setenv(server_options.VARIABLE, str(saved))
    assert server_options.requested_methods() == (dit_attn.BlockSparse(density=0.5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse", "sparse"),
        ("{", "DIT_ATTN_METHODS"),
        ('{"density": 0.5}', "slug"),
        ('{"method": "block-sparse", "density": 7}', "block-sparse.density"),
        ('[{"method": "block-sparse"}, {"method": "re-ttention"}]', "cannot run together"),
        ("missing.json", "missing.json"),
    ],
)
def test_bad_options_get_one_line_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv(server_options.VARIABLE, text)
    for plugin in (sglang, vllm_omni):
        with pytest.raises(DitAttnError, match=message) as caught:
            plugin.register()
        assert "\n" not in str(caught.value) and str(caught.value).startswith(server_options.VARIABLE)
