"""`python -m adq_search.cli` is `adq-search`."""

from adq_search.cli._app import main

if __name__ == "__main__":
    main()
