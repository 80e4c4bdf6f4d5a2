"""Finding out why a run ended: the root cause, not the noise of the ranks that lost a peer.

A rank that raises writes ``logs/rank-N.error.json``. A rank that is killed writes nothing, and its
peers then fail with network errors; torchrun's log tells who was killed and whom torchrun itself
ended afterwards. The patterns below are what torchrun 2.13 prints.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdpq.errors import (
    EnvironmentProblemError,
    ExitCode,
    FsdpqError,
    LaunchError,
    Location,
    Problem,
    RecipeError,
)
from fsdpq.run_files.paths import RunFiles
from fsdpq.run_files.rows import RankError
from fsdpq.tensor_files.base_manifest import WEIGHTS_NAME, damaged, read_manifest

MEMORY_HINT = (
    "use less memory: a smaller `training.micro_batch_size` or `data.seq_len`; on a CPU also "
    "fewer ranks (`launch.nproc_per_node`)"
)
FULL_DISK_BYTES = 1 << 16
_TAIL_LINES = 25
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
_FAILURE = re.compile(
    r"time\s*: (?P<time>\S+)\s+host\s*: .*\s+rank\s*: (?P<rank>\d+) .*\s+"
    r"exitcode\s*: (?P<code>-?\d+) \(pid: (?P<pid>\d+)\)"
)
_LOST_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|"
    r"remote process exited|Socket Timeout|recvValue failed|failed to recv|sendBytes failed|"
    r"NCCL communicator was aborted|collective operation timeout|DistNetworkError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class EndedRank:
    """How torchrun saw a rank fail.

    Attributes:
        rank: which rank.
        exit_code: negative for a signal.
        time: seconds since the epoch, whole ones.
        by_torchrun: torchrun itself ended it, because another rank had failed.
    """

    rank: int
    exit_code: int
    time: float
    by_torchrun: bool


@dataclass(frozen=True)
class RanksEnd:
    """How the ranks of one machine ended, as it sees that itself.

    Attributes:
        exit_code: torchrun's, negative for a signal; None where it had not ended.
        records: the errors that ranks wrote, the earliest first.
        killed: ranks that a signal ended, other than torchrun's own.
        oom_kills: processes that the kernel killed for memory meanwhile.
        on: `` on HOST`` where there are several machines, else empty.
    """

    exit_code: int | None
    records: tuple[RankError, ...] = ()
    killed: tuple[EndedRank, ...] = ()
    oom_kills: int = 0
    on: str = ""


def count_oom_kills() -> dict[str, int]:
    """Returns how many processes the kernel has killed for memory, by where it is counted."""
    counts: dict[str, int] = {}
    for name in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        try:
            lines = Path(name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("oom_kill "):
                counts[name] = int(line.split()[1])
    return counts


def count_new_oom_kills(before: Mapping[str, int]) -> int:
    """Returns how many more there are than `count_oom_kills` found before."""
    after = count_oom_kills()
    return max([after[key] - before.get(key, 0) for key in after], default=0)


def explain_failure(
    files: RunFiles,
    *,
    exit_code: int,
    oom_kills_before: Mapping[str, int],
    mapped_base: Path | None = None,
) -> FsdpqError:
    """Returns the error that tells the user why the run failed.

    Args:
        files: the run directory.
        exit_code: torchrun's, not 0.
        oom_kills_before: `count_oom_kills` from before the run.
        mapped_base: directory of the base that the ranks mapped (``fsdp.offload: disk``).
    """
    end = read_end(files, exit_code=exit_code, oom_kills_before=oom_kills_before)
    return explain_end(files, [end], mapped_base=mapped_base)


def read_end(
    files: RunFiles,
    *,
    exit_code: int | None,
    oom_kills_before: Mapping[str, int],
    log: Path | None = None,
) -> RanksEnd:
    """Returns how the ranks of this machine ended.

    Args:
        files: the run directory.
        exit_code: torchrun's.
        oom_kills_before: `count_oom_kills` from before the run.
        log: torchrun's; None is that of the only machine, or the first.
    """
    failures = read_torchrun_failures(log or files.torchrun_log)
    return RanksEnd(
        exit_code,
        tuple(read_rank_errors(files)),
        tuple(rank for rank in failures if _was_killed(rank)),
        count_new_oom_kills(oom_kills_before),
    )


def explain_end(
    files: RunFiles, ends: Sequence[RanksEnd], *, mapped_base: Path | None = None
) -> FsdpqError:
    """Returns the error that tells the user why ranks of one or several machines failed.

    Args:
        files: the run directory.
        ends: of every machine that is known of, this one first.
        mapped_base: directory of the base that the ranks mapped.
    """
    for end in ends:
        if end.exit_code is not None and end.exit_code < 0:
            return explain_signal(f"torchrun{end.on}", -end.exit_code, end.oom_kills)
    if not files.logs.is_dir():
        message = f"the run directory `{files.root}` is gone, and with it why the ranks ended"
        return EnvironmentProblemError(message, hint="bring it back, or start again elsewhere")
    if shutil.disk_usage(files.root).free < FULL_DISK_BYTES:
        message = f"the disk of `{files.root}` is full"
        return EnvironmentProblemError(message, hint="make room, or choose another --run-dir")
    records = sorted(
        ((record, end) for end in ends for record in end.records), key=lambda pair: pair[0].time
    )
    killed = [(rank, end) for end in ends for rank in end.killed]
    causes = [(record, end) for record, end in records if not _is_lost_peer(record)]
    if killed:
        first, end = min(killed, key=lambda pair: pair[0].time)
        if not any(record.time < first.time + 1 for record, _ in causes):
            who = f"rank {first.rank}{end.on}"
            if mapped_base is not None and first.exit_code == -signal.SIGBUS:
                return _lost_page(who, mapped_base)
            return explain_signal(who, -first.exit_code, end.oom_kills)
    if causes or records:
        record, end = (causes or records)[0]
        return explain_rank_error(record, log=files.rank_log(record.rank), on=end.on)
    codes = [end.exit_code for end in ends if end.exit_code]
    return _explain_by_logs(files, codes[0] if codes else 1)


def read_rank_errors(files: RunFiles) -> list[RankError]:
    """Returns the errors that ranks wrote, the earliest first."""
    found = [read_rank_error(path) for path in sorted(files.logs.glob("rank-*.error.json"))]
    return sorted((error for error in found if error), key=lambda error: error.time)


def read_rank_error(path: Path) -> RankError | None:
    """Returns the error in a file; None where a rank died before, or while, it was written."""
    try:
        return RankError(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_torchrun_failures(log: Path) -> list[EndedRank]:
    """Returns the ranks that torchrun's log calls failed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    ended = set(_ENDED_BY_TORCHRUN.findall(text))
    return [
        EndedRank(
            rank=int(match["rank"]),
            exit_code=int(match["code"]),
            time=_parse_time(match["time"]),
            by_torchrun=match["pid"] in ended,
        )
        for match in _FAILURE.finditer(text)
    ]


def explain_rank_error(error: RankError, *, log: Path, on: str = "") -> FsdpqError:
    """Returns the error of one rank as an exception; a traceback goes last.

    Args:
        error: what the rank wrote.
        log: what it printed.
        on: where it ran, as `RanksEnd.on` says it.
    """
    if error.problems:
        return RecipeError([_read_problem(fields) for fields in error.problems])
    if not error.traceback:
        known = LaunchError(error.message, hint=error.hint, details=error.details)
    else:
        message = f"rank {error.rank}{on} failed: {error.kind}: {_first_line(error.message)}"
        details = f"log: {log}\n\n{error.traceback.rstrip()}"
        known = LaunchError(message, hint=error.hint, details=details)
    known.exit_code = _exit_code(error.exit_code)
    return known


def _read_problem(fields: dict[str, Any]) -> Problem:
    location: dict[str, Any] | None = fields["location"]
    place = None if location is None else Location(**location)
    return Problem(fields["message"], fields["key"], place, fields["hint"])


def _exit_code(number: int) -> ExitCode:
    try:
        return ExitCode(number) if number else ExitCode.RUN_FAILED
    except ValueError:
        return ExitCode.RUN_FAILED


def _was_killed(rank: EndedRank) -> bool:
    return rank.exit_code < 0 and not rank.by_torchrun


def _is_lost_peer(record: RankError) -> bool:
    return bool(record.traceback and _LOST_PEER.search(record.message))


def explain_signal(who: str, number: int, num_oom_kills: int) -> LaunchError:
    """Returns the error for a process that a signal ended.

    Args:
        who: which one.
        number: of the signal.
        num_oom_kills: processes that the kernel killed for memory meanwhile.
    """
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    message = f"{who} was killed ({name})"
    if num_oom_kills > 0:
        times = "one process" if num_oom_kills == 1 else f"{num_oom_kills} processes"
        message += f": memory ran out, the kernel killed {times} for it during this run"
        return LaunchError(message, hint=MEMORY_HINT)
    if name == "SIGKILL":
        message += ": that is how the system ends a process when memory runs out"
        return LaunchError(message, hint=MEMORY_HINT)
    return LaunchError(message, hint="its log in `logs/` may tell more")


def _lost_page(who: str, base: Path) -> FsdpqError:
    """Returns the error for a rank that the system ended over a page of a file it cannot give."""
    path = base / WEIGHTS_NAME
    try:
        found, expected = path.stat().st_size, read_manifest(base).num_bytes
    except (OSError, FsdpqError) as error:
        why = error.message if isinstance(error, FsdpqError) else error.strerror
        message = f"{who} was killed (SIGBUS) while it read the quantized base {path}: {why}"
        return LaunchError(message, hint="leave the base alone while a run uses it; start again")
    if found < expected:
        size = f"{found} bytes instead of {expected}"
        return damaged(
            base, f"{WEIGHTS_NAME} has {size}; {who}, which read it, was killed (SIGBUS)"
        )
    message = f"{who} was killed (SIGBUS) while it trained over the quantized base {path}, whose "
    message += "size is right: a disk that cannot be read does that, or a full `/dev/shm`"
    hint = f"look for disk errors with `dmesg`; copy {path} elsewhere to see whether it can be read"
    return LaunchError(message, hint=hint)


def _explain_by_logs(files: RunFiles, exit_code: int) -> LaunchError:
    parts: list[str] = []
    for path in sorted(files.logs.glob("*.log"), key=lambda path: "torchrun" not in path.name):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
        if tail.strip():
            parts.append(f"the end of {path}:\n{tail}")
    message = f"the ranks ended with exit code {exit_code} and without a message"
    hint = f"the logs are in `{files.logs}`"
    return LaunchError(message, hint=hint, details="\n\n".join(parts))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _parse_time(text: str) -> float:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d_%H:%M:%S"))
    except ValueError:
        return 0.0
