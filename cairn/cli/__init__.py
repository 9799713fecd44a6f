"""The command `cairn`."""


def main() -> None:
    """Parse, call, print; what is heavy is imported when it is used."""
    from cairn.cli.app import main

    main()
