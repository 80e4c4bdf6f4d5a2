"""Measures training beside transformers + PEFT + bitsandbytes: ``make bench-train``.

Every contender is a process of its own that holds the same random Llama in NF4 with double
quantization and LoRA on all linears, and trains on the same batch with checkpointed layers, AdamW
and clipped gradients. On a CPU they take turns, one step each, so that a busy machine slows all of
them alike; on a GPU they run one after the other. Between them the machine's rate of matrix
products is measured with the model's own shapes.

- seconds of a step: the median, the first step left out.
- share: the counted products of a step, layers computed twice, over its seconds and the measured
  rate in that dtype; a contender that computes less has a higher share. Model FLOP utilisation
  (MFU) counts every layer once.
- peak: ``VmHWM`` of the process (set back before the steps of each batch), libraries included; on a
  GPU what the allocator of torch handed out.
"""
