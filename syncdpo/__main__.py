"""`python -m syncdpo`: the command line, or what there is of it without the training extras."""

import sys


def main() -> None:
    """`syncdpo.cli.main`, where Typer is installed; `info` needs nothing but torch."""
    try:
        from syncdpo.cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        if sys.argv[1:] != ["info"]:
            sys.exit(
                "syncdpo: all commands but `syncdpo info` need the training extras: "
                "pip install 'syncdpo[train]'"
            )
        from syncdpo.info import describe

        print(describe())
    else:
        command_line()


if __name__ == "__main__":
    main()
