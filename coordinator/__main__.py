"""The way into `glmpipe`, and `python -m coordinator`: first of all, what a signal does is settled."""

from typing import NoReturn

from glm.signals import end_at_signals

end_at_signals()


def main() -> NoReturn:
    """Run the command line of this process; see `coordinator.cli.main`."""
    from glm.standard_streams import open_standard_streams, run_program

    open_standard_streams()
    from coordinator.cli import main as run

    run_program("glmpipe", run)


if __name__ == "__main__":
    main()
