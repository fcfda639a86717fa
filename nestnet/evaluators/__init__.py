"""Metrics of one network: small generators of (name, value)."""
