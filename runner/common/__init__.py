"""Utilities of the whole project; they import only the standard library, tyro and msgspec."""
