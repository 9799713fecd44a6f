"""`python -m cairn`, as `torchrun -m cairn` starts it: the command."""

from cairn.cli.app import main

if __name__ == "__main__":
    main()
