"""Classes by name, imported when they are first asked for: the names alone need no torch."""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping


def imported(place: str) -> object:
    """What 'package.module:Name' refers to."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry(MutableMapping):
    """Name -> class. A class given as 'package.module:Class' is imported at its first use."""

    def __init__(self, classes: Mapping[str, str | type]) -> None:
        self.classes = dict(classes)

    def __getitem__(self, name: str) -> type:
        if isinstance(self.classes[name], str):
            self.classes[name] = imported(self.classes[name])
        return self.classes[name]

    def __setitem__(self, name: str, cls: type) -> None:
        self.classes[name] = cls

    def __delitem__(self, name: str) -> None:
        del self.classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self.classes

    def __iter__(self) -> Iterator[str]:
        return iter(self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __or__(self, other: Mapping[str, type]) -> dict[str, type]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, type]) -> dict[str, type]:
        return {**other, **self}


class OfDims:
    """The names of a registry whose classes are for images of `dims` axes."""

    def __init__(self, registry: Mapping[str, type], dims: int) -> None:
        self.registry, self.dims = registry, dims

    def __contains__(self, name: str) -> bool:
        return name in self.registry and getattr(self.registry[name], "dims", 3) == self.dims

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.registry if name in self)


class AnyOf:
    """The names of several lists or registries, in their order."""

    def __init__(self, *parts: Iterable[str]) -> None:
        self.parts = parts

    def __contains__(self, name: str) -> bool:
        return any(name in part for part in self.parts)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*self.parts)


class Joined:
    """The names of a list or registry, and several of them at once: 'kd', 'kd+cwd'."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = names

    def __contains__(self, name: str) -> bool:
        return all(part in self.names for part in name.split("+"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def lazily(package: str, places: Mapping[str, str]) -> Callable[[str], object]:
    """A module's `__getattr__` (PEP 562) for names that it offers and other modules define.

    places: name -> the module that defines it.
    """

    def find(name: str) -> object:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(places[name]), name)

    return find
