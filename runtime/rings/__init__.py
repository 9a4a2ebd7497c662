"""Rings of idle sessions → a row while one is free, then host memory, then a file, then gone."""
