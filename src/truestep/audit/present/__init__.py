"""Findings in words: terminal table, HTML page, JSON, JUnit, SARIF, reproducers."""
