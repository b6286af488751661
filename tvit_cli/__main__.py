"""`python -m tvit_cli`, which is also what torchrun and accelerate launch start."""

from tvit_cli.main import run

if __name__ == "__main__":
    run()
