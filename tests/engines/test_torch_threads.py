"""one_torch_thread(): this thread's operators run alone inside the block, and nobody else notices."""

import subprocess
import sys

CODE = """
import threading, torch
from latentmas_kernels.engines.torch_threads import one_torch_thread
torch.set_num_threads(3)
seen = {}
def look(where):
    def work():
        torch.ones(100_000).sum()  # a thread takes its number at its first operator
        seen[where] = torch.get_num_threads()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
with one_torch_thread():
    seen["inside"] = torch.get_num_threads()
    look("other thread")
seen["after"] = torch.get_num_threads()
try:
    with one_torch_thread():
        raise KeyError
except KeyError:
    seen["after an error"] = torch.get_num_threads()
look("later thread")
print(seen)
"""


def test_only_this_thread_and_only_inside():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    expected = {"inside": 1, "other thread": 3, "after": 3, "after an error": 3, "later thread": 3}
    assert run.stdout.strip() == str(expected)
