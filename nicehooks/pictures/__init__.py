"""Pictures of results.

Knows numbers and labels; needs the extra `plot`.
"""
