"""Presents findings as a terminal table, an HTML page, JSON, JUnit, SARIF and reproducers."""
