"""Utilities shared by the whole project. They import only the standard library, tyro and msgspec."""
