"""`python -m stage_worker`: first of all, what a signal does is settled."""

from glm.signals import end_at_signals

if __name__ == "__main__":
    end_at_signals()
    from glm.standard_streams import open_standard_streams, run_program

    open_standard_streams()
    from stage_worker.cli import main

    run_program("glmpipe worker", main)
