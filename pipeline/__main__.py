"""The entry point of `simclr` and of `python -m pipeline`."""

import gc


def main() -> None:
    """Import the command line and run it."""
    # What is imported stays: to look through it for garbage while it grows is a fifth of the time of a quick command.
    gc.disable()
    from pipeline import cli  # noqa: PLC0415 - between these two lines

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
