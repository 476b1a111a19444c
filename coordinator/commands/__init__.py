"""One module per subcommand of `glmpipe`: `add_parser` describes it, `run` does it and returns the exit code."""
