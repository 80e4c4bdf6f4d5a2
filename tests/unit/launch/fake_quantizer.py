"""A rank without torch that writes a quantized base, or waits where ``FAKE_QUANTIZER`` says so."""

import json
import os
import sys
import time
from pathlib import Path

from fsdpq.recipe.load import load_resolved
from fsdpq.run_files.paths import RunFiles
from fsdpq.tensor_files.base_manifest import BaseManifest, base_key, write_manifest

out, files = Path(sys.argv[2]), RunFiles(Path(sys.argv[-1]))
mode = os.environ.get("FAKE_QUANTIZER", "")
with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
    calls.write(f"{os.getpid()}\n")
(out / "base.safetensors").write_bytes(b"half")
if mode == "wait":
    time.sleep(600)
recipe = load_resolved(files.resolved)
key = base_key(
    model=json.loads(files.lock.read_text())["inputs"]["model"],
    quantization=recipe.quantization.model_dump(mode="json"),
    dtype=recipe.model.dtype,
    device=recipe.launch.device,
)
(out / "base.safetensors").write_bytes(b"w" * 1000)
(out / "checksums.bin").write_bytes(b"cccc")
write_manifest(out, BaseManifest(key, 1000, 1 << 20, 10, "", "", 500, 400))
