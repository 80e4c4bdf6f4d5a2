"""Memory of rank 0 on its device, moment by moment.

    tape.py         allocations of operations, forward and backward: autograd in bytes
    operations.py   norms, linear layers with adapters, rotary embeddings
    attention.py    kernels of attention
    experts.py      mixtures of experts
    layer.py        a decoder layer as operations; passes.py: the ways to run it
    build_layers.py the layers of a recipe
    loss.py         the last norm and the loss in chunks
    gathers.py      what FSDP holds: unsharded groups, buffers, gradients
    moments.py      all of it put together
    resident.py     what stays for a whole step
    load.py         working memory of loading; update.py: of the optimizer's step
    overhead.py     what the allocator and CUDA take beside
    notes.py        what the arithmetic leaves out

What operations allocate is read in transformers 5.23, torch 2.13 and in the worker half; the tests
compare it with what the real step allocates.
"""

from fsdpq.plan.device.moments import plan_device_memory

__all__ = ["plan_device_memory"]
