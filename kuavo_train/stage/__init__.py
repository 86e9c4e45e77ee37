"""One stage as a story: opened, looked at, trained, concluded."""
