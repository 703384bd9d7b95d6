"""vLLM as a text-generation backend: in this process, as a server, and the KV connector that its workers load."""
