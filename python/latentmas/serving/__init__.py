"""An OpenAI-compatible server: chains run here, and vLLM writes their texts."""
