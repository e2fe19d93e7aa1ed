"""Tests of pages in a real browser; a package, so that its conftest does not hide tests/conftest."""
