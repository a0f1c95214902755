"""Attention methods for diffusion transformers. Every method class is named here and loaded at first use.

``core``: one attention call, one layer, the clock of a run, the executor; no host is known there. ``methods``: one
file per method. ``guidance``: perturbations of attention and the heads they apply to. ``attach``: how methods get onto
a stock diffusers pipeline and off it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_METHODS = {
    "AdaptiveReweighting": "adaptive_reweighting",
    "Auto": "auto",
    "BlockSparse": "block_sparse",
    "GAG": "gag",
    "HeadDrop": "head_drop",
    "InwardWindow": "inward_window",
    "MoH": "moh",
    "NAG": "nag",
    "RectifiedSpaAttn": "rectified_spaattn",
    "ReTtention": "re_ttention",
    "SEG": "seg",
    "SLA": "sla",
    "SLG": "slg",
    "STG": "stg",
    "SoftPAG": "softpag",
    "SaaS": "saas",
    "SubjectIsolation": "subject_isolation",
    "SubjectReposition": "subject_reposition",
}

if TYPE_CHECKING:
    from dit_attn.processors.methods.adaptive_reweighting import AdaptiveReweighting
    from dit_attn.processors.methods.auto import Auto
    from dit_attn.processors.methods.block_sparse import BlockSparse
    from dit_attn.processors.methods.gag import GAG
    from dit_attn.processors.methods.head_drop import HeadDrop
    from dit_attn.processors.methods.inward_window import InwardWindow
    from dit_attn.processors.methods.moh import MoH
    from dit_attn.processors.methods.nag import NAG
    from dit_attn.processors.methods.re_ttention import ReTtention
    from dit_attn.processors.methods.rectified_spaattn import RectifiedSpaAttn
    from dit_attn.processors.methods.saas import SaaS
    from dit_attn.processors.methods.seg import SEG
    from dit_attn.processors.methods.sla import SLA
    from dit_attn.processors.methods.slg import SLG
    from dit_attn.processors.methods.softpag import SoftPAG
    from dit_attn.processors.methods.stg import STG
    from dit_attn.processors.methods.subject_isolation import SubjectIsolation
    from dit_attn.processors.methods.subject_reposition import SubjectReposition

__all__ = [
    "GAG",
    "NAG",
    "SEG",
    "SLA",
    "SLG",
    "STG",
    "AdaptiveReweighting",
    "Auto",
    "BlockSparse",
    "HeadDrop",
    "InwardWindow",
    "MoH",
    "ReTtention",
    "RectifiedSpaAttn",
    "SaaS",
    "SoftPAG",
    "SubjectIsolation",
    "SubjectReposition",
]


def __getattr__(name: str) -> object:
    if name in _METHODS:
        import importlib

        value = getattr(importlib.import_module(f"{__name__}.methods.{_METHODS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
