"""Torch's own functions, wrapped for as long as somebody is attached whom they would pass over."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

User = TypeVar("User")


class Patch(Generic[User]):
    """A function of torch's under one or more owners; in place as long as it has users, which are held weakly.

    Args:
        owners: Classes or modules that have it as an attribute.
        name: Of the attribute.
        call: Called in its place, with the users, the original and the arguments.
    """

    def __init__(self, owners: tuple[Any, ...], name: str, call: Callable[..., Any]) -> None:
        self._owners, self._name, self._call = owners, name, call
        self._users: weakref.WeakSet[User] = weakref.WeakSet()
        self._originals: dict[Any, Callable[..., Any]] = {}

    def add(self, user: User) -> None:
        """Wrap the function, if it is not wrapped already."""
        self._users.add(user)
        weakref.finalize(user, self._restore).atexit = False
        for owner in self._owners:
            if owner not in self._originals:
                self._originals[owner] = original = vars(owner)[self._name]
                setattr(owner, self._name, self._wrapped(original))

    def discard(self, user: User) -> None:
        """The original again, after the last user."""
        self._users.discard(user)
        self._restore()

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            users = list(self._users)
            return self._call(users, original, *args, **kwargs) if users else original(*args, **kwargs)

        return wrapper

    def _restore(self) -> None:
        if list(self._users):  # the length of a weak set counts one that is just going
            return
        for owner, original in list(self._originals.items()):
            # What somebody else has put over ours stays; ours only passes on then.
            if getattr(vars(owner)[self._name], "__wrapped__", None) is original:
                setattr(owner, self._name, original)
                del self._originals[owner]
