"""`python -m spanguard`: the same as the command `spanguard`."""

from spanguard.cli import main

if __name__ == "__main__":
    main(prog_name="spanguard")
