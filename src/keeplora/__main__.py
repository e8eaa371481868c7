"""`python -m keeplora` is the command `keeplora`."""

from keeplora.cli.main import main

if __name__ == "__main__":
    main()
