"""`python -m tvit_cli`, which is also what torchrun and accelerate launch start."""

from __future__ import annotations

from tvit_cli.cli import run

if __name__ == "__main__":
    run()
