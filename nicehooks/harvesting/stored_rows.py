"""Some rows of a store, as a mapping from paths to tensors, and the spellings by which they are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nicehooks.errors import NotCaptured
from nicehooks.paths.grammar import ModulePath


class StoredRows(dict[str, Tensor]):
    """Some rows of a store: a tensor `[row, …]` for each place, by its path.

    Attributes:
        sample: the example that each row came from `[row]`, int64.
        position: its position among the tokens of the example `[row]`; None where a row is an example.
        token: its token `[row]`; None where there were none.
    """

    sample: Tensor
    position: Tensor | None = None
    token: Tensor | None = None

    @staticmethod
    def of(columns: dict[str, Tensor], origin: dict[str, Tensor]) -> StoredRows:
        """The rows with this origin."""
        rows = StoredRows(columns)
        for name, value in origin.items():
            setattr(rows, name, value)
        return rows

    def __missing__(self, key: str) -> Tensor:
        """Another spelling of a path; `"sample"`, `"position"` and `"token"`, too."""
        if key in ("sample", "position", "token") and getattr(self, key) is not None:
            return getattr(self, key)
        return dict.__getitem__(self, named(key, list(self)))

    def to(self, *args: Any, **kwargs: Any) -> StoredRows:
        """The same rows elsewhere or in another dtype, as `Tensor.to`; where they came from stays as it is."""
        origin = {n: value for n in ("sample", "position", "token") if (value := getattr(self, n, None)) is not None}
        return StoredRows.of({key: value.to(*args, **kwargs) for key, value in self.items()}, origin)

    def __repr__(self) -> str:
        return f"StoredRows: {len(self.sample)} rows of {', '.join(self)}"


def named(path: Any, names: Sequence[str]) -> str:
    """The one of `names` that `path` is a spelling of.

    Raises:
        NotCaptured: none is.
    """
    if path in names:
        return str(path)
    wanted = str(ModulePath.parse(str(path)))
    for name in names:
        if name == wanted:
            return name
    inside = [name for name in names if name.startswith(f"{wanted}[")]
    hint = f"\n    store[{inside[0]!r}]" if inside else ""
    raise NotCaptured(f"{str(path)!r} is not in this store, which has {', '.join(map(repr, names))}.{hint}")
