"""Networks in formats that other software reads and writes."""
