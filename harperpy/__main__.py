"""`python -m harperpy`: the command line where its command is not on the path."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="harperpy")
