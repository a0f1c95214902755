"""The nodes in a real ComfyUI, on a tiny random Wan, on the CPU: ``make test-comfyui COMFYUI=path``.

Its sampler runs the stock model, and the model with the nodes. Density 1 must be stock to the bit, lower densities must
run and differ, guidance of scale 0 must be stock, and the model that the nodes patched must not have changed.
The result is one JSON file. Run it with the Python of the ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dit_attn.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS
from dit_attn.integrations.comfyui.patch import patch_of
from tests._support import torchvision
from tests._support.other_environment import commit, write_record

STEPS, SAMPLERS = 4, ("euler", "heun")
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 4,
    "num_layers": 2, "text_dim": 16, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
_LATENTS = (1, 16, 5, 16, 16)  # 320 tokens


def load(folder: Path) -> None:
    """Make the modules of a ComfyUI importable, on the CPU."""
    torchvision.install()
    sys.path.insert(0, str(folder))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def tiny_wan() -> Any:
    """A ``ModelPatcher`` of a random Wan."""
    import comfy.model_patcher
    import comfy.supported_models

    torch.manual_seed(0)
    config = comfy.supported_models.WAN21_T2V(dict(_WAN))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def sampled(model: Any, sampler: str, cfg: float = 3.0) -> torch.Tensor:
    """Latents of a run of ComfyUI's sampler."""
    import comfy.sample

    generator = torch.Generator().manual_seed(1)
    texts = [torch.randn(1, 12, _WAN["text_dim"], generator=generator) for _ in range(2)]
    positive, negative = ([[text, {}]] for text in texts)
    empty = torch.zeros(_LATENTS)
    noise = comfy.sample.prepare_noise(empty, 2)
    return comfy.sample.sample(
        model, noise, STEPS, cfg, sampler, "simple", positive, negative, empty, disable_pbar=True, seed=2
    )


def sparse(model: Any, density: float, method: str = "block-sparse", **more: Any) -> Any:
    """The model with the first node."""
    settings = json.dumps({"q_block": 32, "kv_block": 32})
    inputs = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 256, "settings": settings, **more}
    return NODE_CLASS_MAPPINGS["DitAttnSparseAttention"]().patch(model, method, density, **inputs)[0]


def guided(model: Any, scale: float) -> Any:
    """The model with the second node."""
    node = NODE_CLASS_MAPPINGS["DitAttnHeadGuidance"]()
    return node.patch(model, "1:0,2@0.7", scale, 1.0, "identity", 0.0, 1.0)[0]


def check(sampler: str) -> dict[str, Any]:
    """Every comparison with one sampler: its name, whether it holds, what was counted."""
    model = tiny_wan()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    stock = sampled(model, sampler)
    found: dict[str, Any] = {}

    def compare(name: str, patched: Any, same: bool, cfg: float = 3.0, against: torch.Tensor = stock) -> torch.Tensor:
        out = sampled(patched, sampler, cfg)
        equal, patch = bool(torch.equal(out, against)), patch_of(patched)
        relative = float((out - against).norm() / against.norm())
        ok = equal == same and bool(torch.isfinite(out).all())
        found[name] = {"ok": ok, "equal": equal, "difference": relative, "counted": patch.run.report() if patch else ""}
        return out

    compare("stock twice", model, True)
    compare("density 1", sparse(model, 1.0), True)
    for method in ("block-sparse", "rectified-spaattn", "re-ttention"):
        compare(f"{method} 0.25", sparse(model, 0.25, method), False)
    compare("outside the percents", sparse(model, 0.25, end_percent=0.01, start_percent=0.005), True)
    compare("scale 0", guided(model, 0.0), True)
    compare("guidance by heads", guided(model, 2.0), False)
    compare("both nodes", guided(sparse(model, 0.25), 2.0), False)
    compare(
        "both nodes, density 1", guided(sparse(model, 1.0), 2.0), True, against=sampled(guided(model, 2.0), sampler)
    )
    compare("stock after them", model, True)
    after = model.model.state_dict()
    weights = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    found["original model"] = {"ok": weights and not model.model_options["transformer_options"] and not model.callbacks}
    return found


def main() -> int:
    """Run every comparison, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of a ComfyUI")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    if not (args.comfyui / "comfy" / "samplers.py").is_file():
        print(f"{args.comfyui} is no ComfyUI: it has no comfy/samplers.py; give the folder with its main.py")
        return 2
    load(args.comfyui.resolve())
    from comfyui_version import __version__

    results = {sampler: check(sampler) for sampler in SAMPLERS}
    failed = 0
    for sampler, found in results.items():
        for name, result in found.items():
            failed += not result["ok"]
            print(f"{'ok  ' if result['ok'] else 'FAIL'} {sampler}: {name}; {result.get('counted', '')}")
    if args.output:
        versions = {"comfyui": __version__, "torch": torch.__version__}
        where = {"versions": versions, "comfyui_commit": commit(args.comfyui), "latents": _LATENTS, "steps": STEPS}
        write_record(args.output, "make test-comfyui COMFYUI=path", {**where, "results": results})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
