"""Pictures of results: figures of matplotlib, and pages of HTML that need nothing beside themselves.

Knows numbers and labels; no model, no path, no cache. Figures need the extra `plot`, pages nothing.
"""
