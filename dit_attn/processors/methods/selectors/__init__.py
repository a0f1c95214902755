"""Selectors: rules that rank the key blocks of every query block, each in a file of its own with its paper.

A selector only ranks. How many blocks are chosen is the budget's part (:mod:`.budgets`), what becomes of the others the
method's. ``measured`` has no entry: its ranks come from the exact attention of an earlier step (:mod:`.measured`).
"""

from __future__ import annotations

from dit_attn.processors.methods.selectors.base import Selector
from dit_attn.processors.methods.selectors.dfs_attn import DFSAttn
from dit_attn.processors.methods.selectors.ear import EARCentered, EARValue
from dit_attn.processors.methods.selectors.error import PooledError
from dit_attn.processors.methods.selectors.mass import PooledMass
from dit_attn.processors.methods.selectors.pisa import PISALogVariance
from dit_attn.processors.methods.selectors.sol_attn import SolAttn
from dit_attn.processors.methods.selectors.sub_block import SubBlock

_ALL: tuple[Selector, ...] = (
    PooledMass(), PooledError(), SolAttn(), SubBlock(), EARValue(), EARCentered(), DFSAttn(), PISALogVariance()
)  # fmt: skip
RULES = {rule.name: rule for rule in _ALL}
"""Every rule by the value of the setting ``selector``."""
