"""`python -m jaxdist.cli`: the command line."""

from jaxdist.cli.main import main

if __name__ == "__main__":
    main()
