"""A worker without torch: writes a result, or fails for the benchmark that FAKE_BENCH names."""

import json
import os
import sys
from pathlib import Path

from fsdpq.run_files.bench_record import BenchResult, Column, Plot, Ratio, Spread, Table
from fsdpq.run_files.benchmarks import BenchJob

name, job_file, out, error = sys.argv[1:]
job = BenchJob.read(Path(job_file))
print(json.dumps({"text": f"measuring {name}"}), flush=True)
assert not list(job.directory.glob("model*"))
if name == os.environ.get("FAKE_BENCH"):
    record = {
        "rank": 0, "kind": "LaunchError", "message": "it broke", "hint": "mend it",
        "traceback": "", "exit_code": 1, "time": 0.0, "problems": [], "details": "",
    }  # fmt: skip
    Path(error.removeprefix("--error=")).write_text(json.dumps(record))
    sys.exit(1)
columns = (Column("who", ""), Column("speed", "rows/s", 1), Column("peak", "peak, MB"))
rows = [
    {"who": "fsdpq", "speed": Spread(20.0, 19.0, 22.5, 3), "peak": 1234.5},
    {"who": job.device, "speed": Spread(10.0, 10.0, 10.0, 1), "peak": None},
]
result = BenchResult(
    [Table(" ".join(f"{key}={value}" for key, value in job.settings.items()), columns, rows)],
    [
        Ratio("speed, of stock", 2.0, 1.9, 2.25, "higher", 1.5),
        Ratio("peak, of stock", 1.1, 1.1, 1.1, "lower", 1.0),
    ],
    [Plot(f"{name}-speed", "Speed", "", "rows/s", bars={"a": {"fsdpq": 20.0, "stock": 10.0}})],
    ["a note"],
)
Path(out.removeprefix("--out=")).write_text(json.dumps(result.as_json()))
