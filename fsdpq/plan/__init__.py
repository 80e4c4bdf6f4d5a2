"""Will it fit, how long will it take, what would make it fit: arithmetic on a recipe. No torch.

What is asked:

    shape.py     a model's tensors; ``shapes/`` reads them off cards, configs and headers of files
    workload.py  ranks, rows and tokens of a step
    hardware/    machines, and GPUs by the names that people give them

What is computed:

    costs/       bytes that a quantizer, an adapter and an optimizer make of a tensor
    weights.py   what every FSDP group stores: over all ranks, and on rank 0
    device/      memory of rank 0, moment by moment
    host.py      memory of the machine
    disk.py      what lies on its disk
    time/        products, transfers and seconds of a step

What is answered:

    build.py     puts a plan together; ``result.py`` is what one says, ``as_json.py`` writes it down
    case.py      what does not change while changes are tried: the model and the machine
    changes/     edits that make it fit, limits, variants, what hides a transfer
    traced.py    what a trace or a measurement found, to be held beside a plan

The worker half imports this package too: quantizers and shards of a run are sized by it.
"""
