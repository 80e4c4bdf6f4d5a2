"""How the ranks of a machine ended, and where they hang, as launchers tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from fsdpq.launch.ranks.failure import EndedRank, RanksEnd
from fsdpq.launch.ranks.stacks import Frame, RankStack
from fsdpq.launch.ranks.watch import Hang
from fsdpq.run_files.beats import Beat
from fsdpq.run_files.rows import RankError


def own_part(end: RanksEnd, ranks: range, *, since: float) -> RanksEnd:
    """Returns ``end`` without what other machines, or earlier starts, wrote into the same folder.

    Args:
        end: as `fsdpq.launch.ranks.failure.read_end` found it.
        ranks: of this machine.
        since: when they started, in seconds since the epoch.
    """
    records = (record for record in end.records if record.rank in ranks and record.time >= since)
    return replace(end, records=tuple(records))


def end_as_json(end: RanksEnd) -> dict[str, Any]:
    """Returns ``end`` as plain data."""
    return asdict(end)


def end_from_json(values: Mapping[str, Any]) -> RanksEnd:
    """Returns what `end_as_json` gave."""
    return RanksEnd(
        exit_code=values["exit_code"],
        records=tuple(RankError(**record) for record in values["records"]),
        killed=tuple(EndedRank(**rank) for rank in values["killed"]),
        oom_kills=values["oom_kills"],
    )


def hang_as_json(hang: Hang) -> dict[str, Any]:
    """Returns ``hang`` as plain data."""
    return {
        "beats": {str(rank): asdict(beat) for rank, beat in hang.beats.items()},
        "stacks": {str(rank): asdict(stack) for rank, stack in hang.stacks.items()},
        "idle_s": hang.idle_s,
    }


def hang_from_json(values: Mapping[str, Any]) -> Hang:
    """Returns what `hang_as_json` gave."""
    stacks = {
        int(rank): RankStack(stack["state"], tuple(Frame(**frame) for frame in stack["frames"]))
        for rank, stack in values["stacks"].items()
    }
    beats = {int(rank): Beat(**beat) for rank, beat in values["beats"].items()}
    return Hang(beats, stacks, values["idle_s"])
