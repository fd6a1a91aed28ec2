"""The mechanism: who is active, which sites a path selects, the tap and the rules on it, the register of ports.

Knows values and paths; no port but a module's output, and nothing of what an intervention does.
"""

from nicehooks.core import copies as copies  # which puts what it makes into every tap
