"""Run modular pipelines of diffusers as the family tests run the others."""

from __future__ import annotations

from typing import Any


def modular(blocks: Any, components: dict[str, Any], output: str = "latents", **facts: Any) -> Any:
    """Return a modular pipeline that takes what a stock pipeline takes; its result is the one output.

    Args:
        blocks: the blocks that make the latents, without encoders and decoders.
        components: its components.
        output: name of what the run gives.
        facts: attributes of its class with other values, for tiny models.
    """
    stock = type(blocks.init_pipeline())

    def call(self: Any, state: Any = None, **kwargs: Any) -> Any:
        for name in ("output_type", "return_dict"):
            kwargs.pop(name, None)
        return (stock.__call__(self, state, output=output, **kwargs),)

    pipe = type(stock.__name__, (stock,), {"__call__": call, **facts})(blocks=blocks)
    pipe.update_components(**components)
    return pipe
