"""Choosing a halting rule on development queries, with a guarantee where there are enough of them."""
