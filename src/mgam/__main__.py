"""`python -m mgam` is the same as the command `mgam`."""

from mgam.cli import main

if __name__ == "__main__":
    main()
