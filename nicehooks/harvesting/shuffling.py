"""A random order of any number of rows that takes no memory: the place of each is computed, not looked up."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROUNDS = 6


class Shuffle:
    """A random permutation of `0 … count - 1`.

    >>> shuffled = Shuffle(10, seed=0)(torch.arange(10))
    >>> sorted(shuffled.tolist()) == list(range(10)), shuffled.tolist() == list(range(10))
    (True, False)

    A list of a billion places would take 8 GB in every process that reads. This is a Feistel network over numbers of
    as many bits as `count` has, whose rounds depend on the seed; a number that comes out too large goes in again, as in
    Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9 (cycle walking). Any place can be asked for alone.

    Args:
        count: how many there are.
        seed: which permutation.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        self.count = count
        self.half = max(1, -(-max(1, (count - 1).bit_length()) // 2))
        words = hashlib.sha512(f"{seed} {count}".encode()).digest()
        self.keys = [int.from_bytes(words[8 * i : 8 * i + 8], "little", signed=True) for i in range(ROUNDS)]

    def __call__(self, places: Tensor) -> Tensor:
        """What stands at `places`, int64."""
        found = self._once(places)
        while (outside := found >= self.count).any():
            found[outside] = self._once(found[outside])
        return found

    def _once(self, numbers: Tensor) -> Tensor:
        low = (1 << self.half) - 1
        left, right = numbers >> self.half, numbers & low
        for key in self.keys:
            left, right = right, left ^ (_mixed(right, key) & low)
        return (left << self.half) | right


def _mixed(numbers: Tensor, key: int) -> Tensor:
    """Numbers of 64 bits that have nothing to do with each other: the finalizer of SplitMix64, which multiplies."""
    mixed = numbers ^ key
    mixed = (mixed ^ _shifted_right(mixed, 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ _shifted_right(mixed, 27)) * -0x6B2FB644ECCEEE15
    return mixed ^ _shifted_right(mixed, 31)


def _shifted_right(numbers: Tensor, by: int) -> Tensor:
    """As if there were no sign."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


def order_of(count: int, shuffle: bool, seed: int | str, part: tuple[int, int], size: int, at: int) -> Tensor:
    """Which rows are batch `at` of one of several readers: each has its own places of the one order, next to none."""
    index, parts = part
    places = torch.arange(at * size, (at + 1) * size) * parts + index
    places = places[places < count]
    return Shuffle(count, seed)(places) if shuffle else places
