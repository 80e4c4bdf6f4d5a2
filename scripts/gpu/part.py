"""The process of one part: ``python -m scripts.gpu.part NAME --rows FILE --device cuda``."""

from __future__ import annotations

import argparse
import gc
import importlib
import warnings
from pathlib import Path

import torch

from scripts.gpu.parts import Bench
from scripts.gpu.plan import PARTS
from scripts.gpu.rows import Rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    module, _, function = PARTS[arguments.part].partition(":")
    name = arguments.part + "*" * arguments.tiny
    device = torch.device(arguments.device, *([0] if arguments.device == "cuda" else []))
    bench = Bench(Rows(arguments.rows, name), device, arguments.tiny)
    run = getattr(importlib.import_module(module), function)
    gc.freeze()  # looking for garbage in what was imported takes longer than a tiny step
    run(bench)


if __name__ == "__main__":
    main()
