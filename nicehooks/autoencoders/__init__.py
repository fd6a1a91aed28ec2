"""Sparse autoencoders and transcoders, from the files in which others train them.

Knows contexts; an autoencoder is a module like any other, whose latents are a place in it.
"""
