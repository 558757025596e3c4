"""The commands: each module has a docstring that says what it does, `add_arguments`, and `run`."""
