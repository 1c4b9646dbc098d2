"""`python -m jaxdist`, which is the program `jaxdist`."""

from jaxdist.cli.__main__ import main

if __name__ == "__main__":
    main()
