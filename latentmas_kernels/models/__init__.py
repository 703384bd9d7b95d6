"""What is read off a model: its architecture, packed weights, rotary embedding, windows and settings."""
