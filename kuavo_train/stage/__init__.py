"""One stage, told as a story: opened, looked at, trained, concluded."""
