"""The command `nicehooks`: the only room that knows tokenizers, prompts and a terminal.

Knows everything else; nothing knows it.
"""
