"""Will it fit, how long will it take, what would make it fit: arithmetic on a recipe. No torch.

    shape.py     a model's tensors, from a card, a config.json or the headers of its files
    weights.py   what every FSDP group stores: over all ranks, and on rank 0
    workload.py  ranks, rows and tokens of a step
    machine.py   GPUs, links, host memory and disk that a plan is for
    result.py    what comes out: memory by moment and category, host, disk, time, verdict, edits

The worker half reads these types too: a trace and a run are compared with them.
"""
