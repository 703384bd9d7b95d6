"""An OpenAI-compatible server: chains think here, vLLM writes."""
