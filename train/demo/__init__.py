"""Adapters of the tiny pipeline that a new hub shows: trained by `python -m train.demo`, committed.

This file imports nothing heavy, so that a process without torch can find the folders.
"""

from pathlib import Path

CATALOGUE: Path = Path(__file__).parent / "catalogue"
"""One folder per repo: CATALOGUE / namespace / name."""

CONFIGS: Path = Path(__file__).parent / "configs"
"""One training configuration per adapter of the namespace `demo`."""

NAMESPACE = "demo"
