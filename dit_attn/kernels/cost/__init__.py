"""What block-sparse attention costs on a machine, as a fraction of dense attention: measured, shipped or guessed."""

from __future__ import annotations

from dit_attn.kernels.cost.lookup import cost_table
from dit_attn.kernels.cost.table import Cost, CostTable, Machine

__all__ = ["Cost", "CostTable", "Machine", "cost_table"]
