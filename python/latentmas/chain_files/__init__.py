"""Chains written down in YAML, and the shipped ones."""
