"""A random order of any number of rows that takes no memory: the place of each is computed, not looked up."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

ROUNDS = 6


class Shuffle:
    """A random permutation of `0 … count - 1`.

    >>> shuffled = Shuffle(10, seed=0)(torch.arange(10))
    >>> sorted(shuffled.tolist()) == list(range(10)), shuffled.tolist() == list(range(10))
    (True, False)

    A list of a billion places would take 8 GB in every process that reads. Here a number is written as two digits, of
    about as many values each, and to either a function of the other is added in turns, which depends on the seed: a
    Feistel network. What comes out too large goes in again (Black and Rogaway 2002,
    https://doi.org/10.1007/3-540-45760-7_9). Any place can be asked for alone.

    Args:
        count: how many there are.
        seed: which permutation.
    """

    def __init__(self, count: int, seed: int | str) -> None:
        self.count = count
        self.left = max(1, math.isqrt(count))
        self.right = max(1, -(-count // self.left))
        words = hashlib.sha512(f"{seed} {count}".encode()).digest()
        self.keys = [int.from_bytes(words[8 * i : 8 * i + 8], "little", signed=True) for i in range(ROUNDS)]

    def __call__(self, places: Tensor) -> Tensor:
        """What stands at `places`, int64."""
        found = self._once(places)
        while (outside := found >= self.count).any():
            found[outside] = self._once(found[outside])
        return found

    def _once(self, numbers: Tensor) -> Tensor:
        left, right = numbers // self.right, numbers % self.right
        for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
            left = (left + _mixed(right, first)) % self.left
            right = (right + _mixed(left, second)) % self.right
        return left * self.right + right


def _mixed(numbers: Tensor, key: int) -> Tensor:
    """Numbers that have nothing to do with each other, from 0 on: as in SplitMix64, multiplied and shifted."""
    mixed = (numbers ^ key) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 32)) * -0x40A7B892E31B1A47
    return (mixed ^ (mixed >> 29)) & 0x7FFFFFFFFFFF


def order_of(count: int, shuffle: bool, seed: int | str, part: tuple[int, int], size: int, at: int) -> Tensor:
    """Which rows are batch `at` of one of several readers: each has its own places of the one order, next to none."""
    index, parts = part
    mine = -(-(count - index) // parts)
    places = torch.arange(min(at * size, mine), min((at + 1) * size, mine)) * parts + index
    return Shuffle(count, seed)(places) if shuffle else places
