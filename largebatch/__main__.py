"""Run as ``python -m largebatch``, alone or under torchrun."""

from largebatch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
