"""What a training run tells of itself: a line per step in log.jsonl, curves in TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Figures of every step, fetched from the device a few steps at a time.

    Args:
        out: the run's folder.
        start: the step the run begins at; later lines of an earlier run are dropped.
        tensorboard: also write curves under `out/logs`.
    """

    def __init__(self, out: Path, start: int, *, tensorboard: bool) -> None:
        path = out / "log.jsonl"
        before = path.read_text().splitlines()[:start] if start and path.exists() else []
        self.file = path.open("w")
        self.file.writelines(f"{line}\n" for line in before)
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "logs"), purge_step=start)
        self.rows: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def add(self, **row: Any) -> None:
        """Take a step's figures; tensors are read later."""
        self.rows.append({**row, "seconds": time.monotonic() - self.began})
        if len(self.rows) >= 10:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken."""
        for row in self.rows:
            plain = {key: value if isinstance(value, int) else round(float(value), 8) for key, value in row.items()}
            self.file.write(json.dumps(plain) + "\n")
            for key in ("loss", "lr", "u", "grad_norm"):
                if self.board is not None:
                    self.board.add_scalar(key, plain[key], plain["step"])
        self.file.flush()
        self.rows = []

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        self.file.close()
        if self.board is not None:
            self.board.close()
