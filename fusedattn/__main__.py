"""Commands for the shell: ``python -m fusedattn demo | info | explain | check | bench``."""

import sys


def main() -> None:
    """Run the command line, or say in one line how to get what it needs."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"The command line needs the package {error.name}: "
            "python -m pip install 'fusedattn[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from fusedattn.cli.app import app

    app(prog_name="python -m fusedattn")


if __name__ == "__main__":
    main()
