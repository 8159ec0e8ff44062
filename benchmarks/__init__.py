"""Measurements that a reader can repeat; each prints a table and, last, one JSON line."""
