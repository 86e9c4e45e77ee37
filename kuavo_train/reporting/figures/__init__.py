"""What is drawn into the pages."""
