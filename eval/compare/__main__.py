"""`python -m eval.compare`: what `singlora compare` does."""

from __future__ import annotations

import sys

from singlora_diffusion.cli import run

sys.exit(run("compare", sys.argv[1:]))
