"""Engines of others that write the texts of a chain."""
