"""Released MoH-DiT weights: the table of layers, the layout against a reference of its own, and bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dit_attn
from dit_attn import DitAttnError
from dit_attn.pipelines.finetune import XL_2_90, load_moh_state, moh_transformer
from dit_attn.pipelines.finetune.moh_state import MOH_DIT

LAYERS = ((2, 2, 0), (4, 4, 0), (6, 3, 2))  # 8, 16 and 24 heads in small
C, SIZE, D = 32, 8, 8  # width, latents, channels of a head


def model() -> Any:
    torch.manual_seed(0)
    return moh_transformer(
        LAYERS, heads=C // D, head_dim=D, in_channels=4, out_channels=8, sample_size=SIZE, num_embeds_ada_norm=10
    ).eval()


def state() -> dict[str, torch.Tensor]:
    """Random weights by the names and shapes of the release."""
    torch.manual_seed(1)

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 0.2 * torch.randn(rows, columns), f"{name}.bias": 0.2 * torch.randn(rows)}

    found = {
        "pos_embed": torch.zeros(1, 16, C), "x_embedder.proj.weight": torch.randn(C, 4, 2, 2),
        "x_embedder.proj.bias": torch.randn(C), "y_embedder.embedding_table.weight": torch.randn(11, C),
        **linear("t_embedder.mlp.0", C, 256), **linear("t_embedder.mlp.2", C, C),
        **linear("final_layer.linear", 4 * 8, C), **linear("final_layer.adaLN_modulation.1", 2 * C, C),
    }  # fmt: skip
    for n, (heads, shared, _) in enumerate(LAYERS):
        block = f"blocks.{n}"
        found |= linear(f"{block}.attn.qkv", 3 * heads * D, C) | linear(f"{block}.attn.proj", C, heads * D)
        found |= linear(f"{block}.mlp.fc1", 4 * C, C) | linear(f"{block}.mlp.fc2", C, 4 * C)
        found |= linear(f"{block}.adaLN_modulation.1", 6 * C, C)
        found[f"{block}.attn.wg_1.weight"] = torch.randn(shared, C)
        if heads > shared:
            found[f"{block}.attn.wg.weight"] = torch.randn(heads - shared, C)
            found[f"{block}.attn.wg_0.weight"] = torch.randn(2, C)
    return found


def reference_attention(weights: dict[str, torch.Tensor], n: int, x: torch.Tensor) -> torch.Tensor:
    """The release's attention of block n, from the fused projection, written out."""
    heads, shared, active = LAYERS[n]
    own = {key.removeprefix(f"blocks.{n}.attn."): value for key, value in weights.items()}
    batch, tokens, _ = x.shape
    qkv = F.linear(x, own["qkv.weight"], own["qkv.bias"]).reshape(batch, tokens, 3, heads, D).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    z = (torch.softmax(q @ k.transpose(-2, -1) * D**-0.5, -1) @ v).transpose(1, 2)
    gate = shared * torch.softmax(x @ own["wg_1.weight"].T, -1)
    if heads > shared:
        p = torch.softmax(x @ own["wg.weight"].T, -1)
        value, index = p.topk(active, -1)
        routed = torch.zeros_like(p).scatter(-1, index, active * value / value.sum(-1, keepdim=True))
        both = 2 * torch.softmax(x @ own["wg_0.weight"].T, -1)
        gate = torch.cat([both[..., :1] * gate, both[..., 1:] * routed], -1)
    return F.linear((z * gate[..., None]).flatten(2), own["proj.weight"], own["proj.bias"])


def test_the_released_layers_have_their_counts_and_widths() -> None:
    assert len(XL_2_90) == 28
    assert sum(heads for heads, _, _ in XL_2_90) == 448 and sum(a + b for _, a, b in XL_2_90) == 403
    assert {72 * heads for heads, _, _ in XL_2_90} == {576, 1152, 1728}


@pytest.mark.parametrize(
    ("name", "layers", "heads", "active"),
    [
        ("XL/2-90", 28, 448, 403), ("XL/2-75", 28, 448, 336), ("L/2-90", 24, 384, 344), ("L/2-75", 24, 384, 288),
        ("B/2-90", 12, 144, 129), ("B/2-75", 12, 144, 108), ("S/2-90", 12, 72, 64), ("S/2-75", 12, 72, 54),
    ],
)  # fmt: skip
def test_every_model_of_the_release_has_its_active_share(name: str, layers: int, heads: int, active: int) -> None:
    found = MOH_DIT[name]
    assert len(found) == layers and sum(count for count, _, _ in found) == heads
    assert sum(shared + routed for _, shared, routed in found) == active
    assert round(100 * active / heads) in (int(name[-2:]), int(name[-2:]) - 1)
    dit_attn.MoH(layers=tuple((shared, routed) for _, shared, routed in found)).check_heads(
        "a model", [count for count, _, _ in found]
    )


def test_widths_follow_the_heads_and_routers_are_the_only_parameters_that_are_added() -> None:
    net, even = model(), moh_transformer(
        ((4, 4, 0),) * 3, heads=C // D, head_dim=D, in_channels=4, out_channels=8, sample_size=SIZE,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    sizes = [sum(p.numel() for p in one.parameters()) for one in (net, even)]
    each = D * (4 * C + 3)  # of a head: its rows of q, k and v with their biases, its columns of the output projection
    assert sizes[0] - sizes[1] == each * (sum(heads for heads, _, _ in LAYERS) - 3 * 4)
    assert [block.attn1.to_q.out_features for block in net.transformer_blocks] == [D * heads for heads, _, _ in LAYERS]
    session = dit_attn.enable(net, dit_attn.MoH(layers=tuple((shared, active) for _, shared, active in LAYERS)))
    routers = sum(p.numel() for p in session.learned.parameters())
    assert routers == sum(heads * C + 2 * C * (heads > shared) for heads, shared, _ in LAYERS)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_every_layer_is_that_of_the_release(ending: str, tmp_path: Path) -> None:
    weights, path, net = state(), tmp_path / f"moh.{ending}", model()
    save_file(weights, path) if ending == "safetensors" else torch.save({"ema": weights}, path)
    session = load_moh_state(net, path, LAYERS)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in session.layers:
        session.module(layer).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        net(torch.randn(2, 4, SIZE, SIZE), timestep=torch.tensor([5, 5]), class_labels=torch.tensor([3, 10]))
    for n, (x, out) in enumerate(seen):
        torch.testing.assert_close(out, reference_attention(weights, n, x), atol=1e-4, rtol=1e-3)
    assert len(seen) == len(LAYERS)
    assert torch.equal(net.transformer_blocks[2].norm1.linear.weight, weights["blocks.2.adaLN_modulation.1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.qkv.weight": torch.zeros(3, C)}, "must be"),
        ({"blocks.2.attn.wg.weight": None}, "routed is missing"),
        ({"blocks.2.attn.wg.weight": torch.full((3, C), torch.nan)}, "not finite"),
        ({"blocks.7.mlp.fc1.weight": torch.zeros(4 * C, C)}, "is no tensor of this model"),
        ({"final_layer.linear.bias": None}, "proj_out_2.bias is missing"),
    ],
)
def test_another_checkpoint_is_one_line_and_nothing_is_loaded(change: Any, message: str, tmp_path: Path) -> None:
    weights, net = state(), model()
    for key, value in change.items():
        weights.pop(key, None)
        weights |= {} if value is None else {key: value}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    save_file(weights, tmp_path / "moh.safetensors")
    with pytest.raises(DitAttnError, match=message) as error:
        load_moh_state(net, tmp_path / "moh.safetensors", LAYERS)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before.pop(key)) for key, value in net.state_dict().items()) and not before


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"blocks.0.attn.qkv.weight": Evil()}, tmp_path / "moh.pt")
    with pytest.raises(DitAttnError):
        load_moh_state(model(), tmp_path / "moh.pt", LAYERS)
    assert not (tmp_path / "ran").exists()


def test_layers_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(DitAttnError, match="has 1 entries, and DiTTransformer2DModel has 3 layers"):
        dit_attn.enable(model(), dit_attn.MoH(layers=((2, 0),)))
    with pytest.raises(DitAttnError, match=r"moh\.shared is 3, and a layer has 2 heads"):
        dit_attn.enable(model(), dit_attn.MoH(layers=((3, 0), (4, 0), (3, 2))))
    with pytest.raises(DitAttnError, match="pairs of counts"):
        dit_attn.MoH(layers=((2,),))
