"""Recipes: whole experiments that write their own results."""
