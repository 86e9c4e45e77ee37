"""How earlier tasks are kept."""
