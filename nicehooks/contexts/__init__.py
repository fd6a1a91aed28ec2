"""The interventions, and the functions made of them: what users enter.

Knows the core and the caches; no port by its name, and no family of models.
"""
