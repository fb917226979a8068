"""Ops that upstream calls experimental, under its paths."""
