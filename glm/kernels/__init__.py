"""Faster ways to do the arithmetic of a layer than torch has; torch does all of it where they are missing."""
