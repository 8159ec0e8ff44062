"""Breaks real runs on purpose and checks that recovery was right."""
