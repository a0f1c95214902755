"""``python -m dit_attn`` is ``dit-attn``."""

import sys

from dit_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
