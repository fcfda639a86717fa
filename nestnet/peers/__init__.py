"""Other software that does the same, to compare with; each file needs it and is imported on request."""
