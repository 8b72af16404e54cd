"""Threads that end with their work, so that what they computed with ends too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Made = TypeVar("Made")


class PassingThreads(Generic[Made]):
    """Runs one piece of work at a time, each in a thread of its own that ends with it.

    OpenMP keeps workers for every thread that has computed. As soon as all of them are more than the processors, they go to sleep between
    two operations, and refinement, hundreds of short operations a step, takes twice as long (docs/LOG.md). So in a server the engine's
    thread alone lives on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn, self._counting = threading.Lock(), threading.Lock()
        self._closed = False
        self.under_way = 0
        """Pieces of work that are not done, those that wait included."""

    def submit(self, work: Callable[[], Made]) -> Future[Made]:
        """Run some work when no other is; cancelled before its turn, it is never begun."""
        done: Future[Made] = Future()
        with self._counting:
            self.under_way += 1
        threading.Thread(target=self._run, args=(work, done), name=self._name, daemon=True).start()
        return done

    def close(self) -> None:
        """Begin nothing any more."""
        self._closed = True

    def _run(self, work: Callable[[], Made], done: Future[Made]) -> None:
        try:
            with self._turn:
                if self._closed:
                    done.cancel()
                if done.set_running_or_notify_cancel():
                    done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
            done.set_exception(error)
        finally:
            with self._counting:
                self.under_way -= 1
