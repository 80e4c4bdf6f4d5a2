"""The benchmarks of ``fsdpq bench``; `fsdpq.run_files.benchmarks` lists them.

A worker coordinates: it makes up what is measured (random models, rows), starts fresh processes
and puts their numbers side by side. What is compared is measured in turns, in one run, because
machines differ from minute to minute more than programs do.
"""
