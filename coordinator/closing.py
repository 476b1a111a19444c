"""What can be closed can stand in a `with`."""

from typing import Self


class Closing:
    """A context manager that closes itself at the end of its block, however that ends."""

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
