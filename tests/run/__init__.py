"""Tests of the int8 execution."""
