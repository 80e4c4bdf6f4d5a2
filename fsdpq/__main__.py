"""``python -m fsdpq`` is the ``fsdpq`` command."""

from fsdpq.cli.main import main

if __name__ == "__main__":
    main()
