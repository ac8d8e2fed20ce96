"""Triton's metrics page, fetched over one connection that is kept."""

from __future__ import annotations

import http.client


class MetricsPage:
    """One reader; for one thread."""

    def __init__(self, address: tuple[str, int], timeout_s: float = 1.0) -> None:
        """`address` is host and port of the endpoint."""
        self._address = address
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def read(self) -> str:
        """The page's text.

        Raises:
            OSError, http.client.HTTPException: it cannot be had now; the next call connects anew.
        """
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=self._timeout_s)
        try:
            self._connection.request("GET", "/metrics")
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        if response.status != 200:
            raise OSError(f"status {response.status}")
        return body.decode("utf-8", "replace")

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
