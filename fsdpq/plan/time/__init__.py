"""How long a step takes: what it computes, what it moves, and what of that hides behind what.

    matrices.py   the matrices of a decoder layer, in the order in which it multiplies by them
    work.py       products, dequantizations and kernels of one rank's step
    traffic.py    bytes over every link
    rates.py      how fast a GPU does that, with what each number was measured on
    estimate.py   both together: `plan_time`

docs/concepts/time.md compares what comes out with what was measured.
"""

from fsdpq.plan.time.estimate import plan_time, time_notes

__all__ = ["plan_time", "time_notes"]
