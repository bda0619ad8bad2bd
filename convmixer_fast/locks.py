"""Locks that a forked child finds free: whoever held them at the fork does not run there."""

import os
import threading
from typing import Protocol
from weakref import WeakSet


class _Owner(Protocol):
    _lock: threading.Lock


_owners: WeakSet[_Owner] = WeakSet()


def give_lock(owner: _Owner) -> None:
    """Sets owner._lock, and again in every forked child: what it guards must be whole between any two statements."""
    owner._lock = threading.Lock()
    _owners.add(owner)


def _renew() -> None:
    for owner in _owners:
        owner._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew)
