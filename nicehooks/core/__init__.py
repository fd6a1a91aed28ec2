"""The mechanism: who is active, which sites a path selects, the tap and the rules on it, the register of ports.

Knows values and paths; no port but a module's output, and nothing of what an intervention does.
"""

# ruff: noqa: F401  # each of these puts what it is into a table
from nicehooks.core import copies, fused_encoders, part_steps, rows
