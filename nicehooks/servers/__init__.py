"""Many requests in one engine, each under interventions of its own.

Knows the interventions, and in one file (`engine`) the engine of `transformers`; no family of models.
"""
