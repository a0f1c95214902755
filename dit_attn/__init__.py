"""dit_attn: attention processors that make diffusion transformers faster and easier to steer, on stock pipelines.

Importing this package loads nothing heavy and changes nothing; every public name is loaded at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "enable": "dit_attn.api",
    "disable": "dit_attn.api",
    "enabled": "dit_attn.api",
    "summary": "dit_attn.api",
    "explain": "dit_attn.api",
    "observing": "dit_attn.api",
    "run_context": "dit_attn.api",
    "spans": "dit_attn.api",
    "watch": "dit_attn.api",
    "supported": "dit_attn.api",
    "attn_processors": "dit_attn.api",
    "Session": "dit_attn.processors.attach.session",
    "Summary": "dit_attn.processors.attach.summary",
    "PromptSpan": "dit_attn.processors.attach.prompt_spans",
    "Explanation": "dit_attn.processors.attach.explain",
    "Method": "dit_attn.processors.methods.base",
    "Auto": "dit_attn.processors.methods.auto",
    "BlockSparse": "dit_attn.processors.methods.block_sparse",
    "RectifiedSpaAttn": "dit_attn.processors.methods.rectified_spaattn",
    "ReTtention": "dit_attn.processors.methods.re_ttention",
    "InwardWindow": "dit_attn.processors.methods.inward_window",
    "SLA": "dit_attn.processors.methods.sla",
    "HeadDrop": "dit_attn.processors.methods.head_drop",
    "MoH": "dit_attn.processors.methods.moh",
    "SoftPAG": "dit_attn.processors.methods.softpag",
    "SEG": "dit_attn.processors.methods.seg",
    "SLG": "dit_attn.processors.methods.slg",
    "STG": "dit_attn.processors.methods.stg",
    "GAG": "dit_attn.processors.methods.gag",
    "NAG": "dit_attn.processors.methods.nag",
    "SaaS": "dit_attn.processors.methods.saas",
    "SubjectIsolation": "dit_attn.processors.methods.subject_isolation",
    "SubjectReposition": "dit_attn.processors.methods.subject_reposition",
    "AdaptiveReweighting": "dit_attn.processors.methods.adaptive_reweighting",
    "DitAttnError": "dit_attn.errors",
}

if TYPE_CHECKING:
    from dit_attn.api import (
        attn_processors,
        disable,
        enable,
        enabled,
        explain,
        observing,
        run_context,
        spans,
        summary,
        supported,
        watch,
    )
    from dit_attn.errors import DitAttnError
    from dit_attn.processors.attach.explain import Explanation
    from dit_attn.processors.attach.prompt_spans import PromptSpan
    from dit_attn.processors.attach.session import Session
    from dit_attn.processors.attach.summary import Summary
    from dit_attn.processors.methods.adaptive_reweighting import AdaptiveReweighting
    from dit_attn.processors.methods.auto import Auto
    from dit_attn.processors.methods.base import Method
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
    "DitAttnError",
    "Explanation",
    "HeadDrop",
    "InwardWindow",
    "Method",
    "MoH",
    "PromptSpan",
    "ReTtention",
    "RectifiedSpaAttn",
    "SaaS",
    "Session",
    "SoftPAG",
    "SubjectIsolation",
    "SubjectReposition",
    "Summary",
    "__version__",
    "attn_processors",
    "disable",
    "enable",
    "enabled",
    "explain",
    "observing",
    "run_context",
    "spans",
    "summary",
    "supported",
    "watch",
]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        import importlib

        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dit_attn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
