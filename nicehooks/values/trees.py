"""Nested values, by one name: what can be done with a whole value, with a part of it, and with one for another."""

from nicehooks.values.assignment import KEEP, assign, fits, is_complex, usable
from nicehooks.values.nodes import Node, is_nested, is_same, leaves, open_node, structure_of
from nicehooks.values.parts import each_index, get, length, rewrite
from nicehooks.values.regions import STAR, Chain, Heads, Rows, items_of, show_step
from nicehooks.values.sharded import beside, gathered, is_distributed
from nicehooks.values.whole import as_it_is, bytes_of, has_fractions, has_spine_of, map_children, map_tensors, place_in

__all__ = [
    "KEEP",
    "STAR",
    "Chain",
    "Heads",
    "Node",
    "Rows",
    "as_it_is",
    "assign",
    "beside",
    "bytes_of",
    "each_index",
    "fits",
    "gathered",
    "get",
    "has_fractions",
    "has_spine_of",
    "is_complex",
    "is_distributed",
    "is_nested",
    "is_same",
    "items_of",
    "leaves",
    "length",
    "map_children",
    "map_tensors",
    "open_node",
    "place_in",
    "rewrite",
    "show_step",
    "structure_of",
    "usable",
]
