"""Every transformer class of diffusers has a row: supported, or refused with the reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
import pytest
import torch
from diffusers.models import transformers

import dit_attn
from dit_attn.processors.attach.families import Family, families, refused


def classes() -> set[str]:
    """Names of the model classes that the installed diffusers defines among its transformers."""
    files = pkgutil.iter_modules(transformers.__path__)
    modules = (importlib.import_module(f"{transformers.__name__}.{file.name}") for file in files)
    return {
        name
        for module in modules
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, diffusers.ModelMixin) and found.__module__ == module.__name__
    }


def test_every_transformer_of_diffusers_is_supported_or_refused_with_the_reason() -> None:
    named = [name for row in dit_attn.supported().values() for name in row["transformers"]]
    assert len(named) == len(set(named))
    assert not classes() - set(named), "add a row, or refuse them in attach/families/refused.py"
    assert all(row.refused or row.layers for row in families())


@pytest.mark.parametrize("row", refused.FAMILIES, ids=lambda row: row.name)
def test_a_refused_transformer_is_refused_in_one_line_before_anything_is_changed(row: Family) -> None:
    for name in row.transformers:
        model = type(name, (torch.nn.Module,), {})()
        for method in (dit_attn.BlockSparse(), dit_attn.SaaS()):
            with pytest.raises(dit_attn.DitAttnError, match=f"^{name} cannot take attention methods: ") as error:
                dit_attn.enable(model, method)
            assert str(error.value).endswith(str(row.refused)) and "\n" not in str(error.value)
