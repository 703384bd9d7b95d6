"""A chain of agents: what it is made of, how it is planned, and how it runs."""
