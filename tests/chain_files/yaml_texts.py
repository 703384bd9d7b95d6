"""Pieces of chain files."""

from latentmas.chain.memory_policy import MemoryPolicy

THINKER = """\
agents:
  - name: planner
    output: latent
    prompt: |-
      Question: {question}

      Plan.
"""
JUDGER = """\
  - name: judger
    output: text
    prompt: Answer.
"""
LAST_AGENT = MemoryPolicy(agents="last")
LAST = "  - {name: judger, output: text, prompt: Answer.}\n"
