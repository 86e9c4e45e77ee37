"""What the project claims about itself, measured: each module is a command that prints a table and writes JSON."""

import kuavo_train  # noqa: F401 - says how threads wait, which must come before torch is imported
