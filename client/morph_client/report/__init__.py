"""What is left after a load run: figures as JSON, a table, a picture and a page."""

from __future__ import annotations
