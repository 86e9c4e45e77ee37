"""What the project claims about itself, measured: each module is a command that prints a table and writes JSON."""
