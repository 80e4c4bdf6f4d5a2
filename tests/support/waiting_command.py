"""``fsdpq``, whose ranks are those of `misbehaving_worker`."""

from pathlib import Path

from fsdpq.launch.ranks import torchrun

torchrun.WORKER = (str(Path(__file__).with_name("misbehaving_worker.py")), "train")  # type: ignore[misc]

if __name__ == "__main__":
    from fsdpq.cli.main import main

    main()
