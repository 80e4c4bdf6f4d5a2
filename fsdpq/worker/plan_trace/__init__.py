"""A training step of rank 0 of any number of ranks under fake tensors: no GPU, no weights.

unreal_gpu.py: a device that is not there, and a process group whose other ranks are not.
attention.py: what attention's kernels on a GPU allocate. workspaces.py: what other operators take
while they run. tracker.py: every allocation, by device and category. tags.py: which category that
is. run.py: the worker's own step, traced. measured.py: the same recipe for real, on a device that
is there.
"""
