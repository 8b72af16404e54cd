"""`python -m genembed.cli`, for launchers that start a module in several processes: `torchrun -m genembed.cli train ...`."""

from genembed.cli import main

if __name__ == "__main__":
    main()
