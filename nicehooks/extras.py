"""Optional packages: imported where they are used, with an error that names the extra they come with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from nicehooks.errors import NiceHooksError


class MissingExtra(NiceHooksError, ImportError):
    """A package that only a part of this library needs is not installed."""


@contextmanager
def needs(extra: str) -> Generator[None, None, None]:
    """Says which extra to install where an import inside it fails.

    >>> with needs("plot"):
    ...     import a_package_for_plots
    Traceback (most recent call last):
    nicehooks.extras.MissingExtra: this needs the package 'a_package_for_plots', which is not installed.
        pip install "nicehooks[plot]"

    Args:
        extra: the name of the extra, as in `nicehooks[extra]`.

    Raises:
        MissingExtra: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        message = f"this needs the package {package!r}, which is not installed.\n"
        raise MissingExtra(f'{message}    pip install "nicehooks[{extra}]"', name=package) from error
