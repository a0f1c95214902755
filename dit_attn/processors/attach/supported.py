"""Which methods run on which families of transformers."""

from __future__ import annotations

from typing import Any

from dit_attn.processors.attach.families import families
from dit_attn.processors.attach.value_table import Rows, html_table, text_table
from dit_attn.processors.methods import methods


class SupportedFamilies(dict[str, dict[str, Any]]):
    """Families with their models and methods. Prints as a table; a plain dictionary otherwise.

    ``{family: {"models": ..., "transformers": [...], "methods": [slugs], "refused": reason or None}}``
    """

    def __repr__(self) -> str:
        return text_table(self._rows(), label=max(map(len, ("methods", *self))))

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> Rows:
        slugs = sorted({slug for row in self.values() for slug in row["methods"]})
        if slugs:
            yield "methods", ", ".join(slugs)
        for name, row in self.items():
            if row["refused"]:
                ending = f": none, {row['refused']}"
            else:
                missing = [slug for slug in slugs if slug not in row["methods"]]
                ending = f": without {', '.join(missing)}" if missing else ""
            yield name, row["models"] + ending


def supported_families() -> SupportedFamilies:
    """Return every family; as for :func:`dit_attn.supported`."""
    slugs = sorted(methods())
    return SupportedFamilies(
        {
            row.name: {
                "models": row.models,
                "transformers": list(row.transformers),
                "methods": [slug for slug in slugs if not (row.refused or slug in row.refused_methods)],
                "refused": row.refused,
            }
            for row in families()
        }
    )
